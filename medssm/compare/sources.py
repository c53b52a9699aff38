"""The sides of a comparison: folders of label maps as they are, and runs, whose held-out cases are predicted now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from medssm.bench.networks import multiply_adds
from medssm.energy import Energy
from medssm.errors import UserError
from medssm.files import read_json, read_json_lines
from medssm.segment import networks
from medssm.segment.data import FITTED
from medssm.segment.evaluate import by_name
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
    """

    name: str
    folder: Path
    files: dict[str, Path] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


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
    return [Side(name, folder) for name, folder in zip(shown, folders, strict=True)]


def find(side: Side, place: Path, device: str, quiet: bool) -> None:
    """Fill in the side's files, and for a run its facts; a run's held-out cases are predicted into `place`.

    Raises UserError for a folder without label maps and a run that held nothing out.
    """
    runs = [side.folder] if (side.folder / FITTED).is_file() else sorted(file.parent for file in side.folder.glob(f"*/{FITTED}"))
    if not runs:
        side.files = by_name(side.folder)
        if not side.files:
            raise UserError(f"predictions: {side.folder}: no label map in it, and no {FITTED}, which a run has")
        return
    parts = []
    for run in runs:
        cases = read_json(run / CASES).get("validation")
        if not cases:
            raise UserError(f"predictions: {run}: a run that held no case out: predict other cases with it, and name the folder of these")
        with Energy() as energy:
            # Post-processing was chosen on these very cases, so it is left out.
            done = predict(run, run / CASES, place, section="validation", format="nifti", device=device, postprocessing="none", quiet=quiet)
        side.failed |= done["failed"]
        parts.append({**_trained(run), "inference_seconds": done["seconds"] / len(cases), "inference_joules": energy.joules})
    side.files = by_name(place)
    side.facts = {name: _same_or_mean([part[name] for part in parts]) for name in parts[0]} | {"runs": len(runs)}


def _trained(run: Path) -> dict[str, Any]:
    """What a run's files say of its network and its training."""
    config, finished = read_json(run / networks.CONFIG), read_json_lines(run / LOG)[-1].get("finished", {})
    fitted = Fitted.load(run / FITTED)
    cost = None
    if config.get("model"):  # else it was given as a module, which cannot be built again
        shape = (1, len(fitted.channels), *fitted.patch)
        steps = [step for step in config.get("compression", []) if step["kind"] != "int8"]  # in 8 bits there are as many
        cost = multiply_adds(networks.of_config({**config, "compression": steps}), torch.empty(shape, device="meta"))
    return {
        "model": config.get("model") or config.get("class"),
        "parameters": finished.get("parameters"),
        "multiply_adds": cost,
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
