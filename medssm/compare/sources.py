"""The sides of a comparison: folders of label maps as they are, and runs, whose held-out cases are predicted now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from medssm.bench.networks import multiply_adds
from medssm.compare import cost, disturb
from medssm.energy import Energy
from medssm.errors import UserError
from medssm.files import read_json, read_json_lines
from medssm.segment import networks
from medssm.segment.cases import Case
from medssm.segment.data import FITTED
from medssm.segment.evaluate import by_name
from medssm.segment.inputs import cases_of
from medssm.segment.loop import LOG
from medssm.segment.predict import predict
from medssm.segment.preprocess import Fitted
from medssm.segment.runs import CASES


@dataclass
class Side:
    """One of the things that are compared.

    Args:
        name: short, and no other side's
        folder: as it was given
        files: {case: label map}
        facts: what is known of the training and the prediction; {} for a folder of label maps
        failed: {case: why it could not be predicted}
        runs: the folders of its trainings; [] for a folder of label maps
    """

    name: str
    folder: Path
    files: dict[str, Path] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    runs: list[Path] = field(default_factory=list)


def sides_of(folders: Sequence[Path], names: Sequence[str] | None) -> list[Side]:
    """The sides with their names: those given, else the ends of their paths, as long as it takes to tell them apart.

    Raises UserError where there is no such folder, a folder is there twice, or the names do not fit.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"predictions: {folder}: {'a file, expected a folder' if folder.exists() else 'no such folder'}")
    places = [folder.resolve() for folder in folders]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise UserError(f"predictions: {folders[i]} is named twice")
    if len(places) < 2:
        raise UserError(f"predictions: expected two or more folders, got {len(places)}")
    if names is not None and (len(names) != len(places) or len(set(names)) < len(names)):
        raise UserError(f"names: expected {len(places)} different ones, one for each folder, got {', '.join(names)}")
    depth = 1
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    shown = names or ["/".join(place.parts[-depth:]) for place in places]
    return [Side(name, folder, runs=_runs(folder)) for name, folder in zip(shown, folders, strict=True)]


def _runs(folder: Path) -> list[Path]:
    return [folder] if (folder / FITTED).is_file() else sorted(file.parent for file in folder.glob(f"*/{FITTED}"))


def find(side: Side, place: Path, device: str, quiet: bool, measured_against: Mapping[str, Path] | None = None, ignore: int | None = None) -> None:
    """Fill in the side's files, and for a run its facts; a run's held-out cases are predicted into `place`.

    With references, {case: label map}, the facts also have what `cost` measures; `ignore` is a value of theirs.

    Raises UserError for a folder without label maps and a run that held nothing out.
    """
    if not side.runs:
        side.files = by_name(side.folder)
        if not side.files:
            raise UserError(f"predictions: {side.folder}: no label map in it, and no {FITTED}, which a run has")
        return
    parts, measure = [], measured_against is not None
    for run in side.runs:
        cases = _held_out(run)
        with Energy() as energy:
            # Post-processing was chosen on these very cases, so it is left out.
            done = predict(
                run,
                run / CASES,
                place,
                section="validation",
                format="nifti",
                device=device,
                postprocessing="none",
                save_probabilities=measure,
                quiet=quiet,
            )
        files = {case: Path(file) for case, file in done["cases"].items()}
        side.files |= files
        side.failed |= done["failed"]
        parts.append({**_trained(run), "inference_seconds": done["seconds"] / len(cases), "inference_joules": energy.joules})
        if measured_against is not None:
            parts[-1] |= {**cost.calibration(run, files, measured_against, ignore), **cost.cold_start(run, cases[0], device)}
    side.facts = {name: _same_or_mean([part[name] for part in parts]) for name in parts[0]} | {"runs": len(parts)}


def find_disturbed(side: Side, kind: str, scans: Path, place: Path, seed: int, device: str, quiet: bool) -> Side:
    """The side with what its runs find in their held-out cases with a disturbance of `disturb.KINDS`; the folder `scans` gets these."""
    found = Side(side.name, side.folder, runs=side.runs)
    for run in side.runs:
        listed, failed = disturb.write(_held_out(run), len(Fitted.load(run / FITTED).channels), kind, scans, seed)
        done = predict(run, listed, place, section=disturb.SECTION, format="nifti", device=device, postprocessing="none", quiet=quiet)
        found.files |= {case: Path(file) for case, file in done["cases"].items()}
        found.failed |= failed | done["failed"]
    return found


def _held_out(run: Path) -> list[Case]:
    if not read_json(run / CASES).get("validation"):
        raise UserError(f"predictions: {run}: a run that held no case out: predict other cases with it, and name the folder of these")
    return cases_of([run / CASES], len(Fitted.load(run / FITTED).channels), out=run, section="validation")


def _trained(run: Path) -> dict[str, Any]:
    """What a run's files say of its network and its training."""
    config, finished = read_json(run / networks.CONFIG), read_json_lines(run / LOG)[-1].get("finished", {})
    fitted = Fitted.load(run / FITTED)
    work = None
    if config.get("model"):  # else it was given as a module, which cannot be built again
        shape = (1, len(fitted.channels), *fitted.patch)
        steps = [step for step in config.get("compression", []) if step["kind"] != "int8"]  # in 8 bits there are as many
        work = multiply_adds(networks.of_config({**config, "compression": steps}), torch.empty(shape, device="meta"))
    return {
        "model": config.get("model") or config.get("class"),
        "parameters": finished.get("parameters"),
        "multiply_adds": work,
        "file_bytes": (run / networks.WEIGHTS).stat().st_size,
        "patch": list(fitted.patch),
        "steps": finished.get("steps"),
        "training_seconds": finished.get("seconds"),
        "training_joules": finished.get("joules"),
    }


def _same_or_mean(values: Sequence[Any]) -> Any:
    """Of folds: the mean of numbers, else the first one; None where one is not known."""
    if None in values:
        return None
    if isinstance(values[0], (int, float)):
        return values[0] if len(set(values)) == 1 else sum(values) / len(values)
    return values[0]
