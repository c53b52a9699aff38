"""One training of a comparison: a network on a fold with a seed, its held-out cases predicted and scored, and all of it as one JSON file."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from medssm.bench.accuracy import specs
from medssm.bench.accuracy.specs import Net
from medssm.compare.scores import over_classes, score
from medssm.energy import Energy
from medssm.errors import UserError
from medssm.files import read_json, write_json
from medssm.segment.data import Dataset
from medssm.segment.loop import CHECKPOINT
from medssm.segment.predict import predict
from medssm.segment.runs import CASES
from medssm.segment.train import train


@dataclass(frozen=True)
class Setting:
    """What all trainings of a comparison share.

    Args:
        dataset: the data set's folder or file
        table: what it says
        out: the folder of the comparison
        splits: the file of folds
        steps, batch: of each training
        dims: 2 or 3
        spacing, patch: of each training, in millimetres and voxels
        patch_spacing: the spacing along the patch's axes
        recipe: more options of `medssm train`
        device: for training and prediction
        nsd_mm: tolerance of the surface Dice
        commit: of the code that is running
        machine: that it runs on
    """

    dataset: Path
    table: Dataset
    out: Path
    splits: Path
    steps: int
    batch: int
    dims: Literal[2, 3]
    spacing: Sequence[float]
    patch: Sequence[int]
    patch_spacing: Sequence[float]
    recipe: Mapping[str, Any]
    device: str
    nsd_mm: float
    commit: str
    machine: Mapping[str, str]

    @property
    def classes(self) -> int:
        """Outputs of a network."""
        return len(self.table.regions.values) or len(self.table.classes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one patch: (1, channels, *patch)."""
        return (1, len(self.table.channels), *self.patch)


@dataclass(frozen=True)
class Run:
    """A network on a fold with a seed."""

    net: Net
    fold: int
    seed: int

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.net.text}, fold {self.fold}, seed {self.seed}"

    def file(self, out: Path) -> Path:
        """Its result."""
        return out / "runs" / self.net.folder / f"fold_{self.fold}-seed_{self.seed}.json"

    def weights(self, out: Path) -> Path:
        """What `medssm train` wrote."""
        return out / "weights" / self.net.folder / f"fold_{self.fold}-seed_{self.seed}"

    def predictions(self, out: Path) -> Path:
        """The label maps of all folds' held-out cases: no case is in two folds."""
        return out / "predictions" / self.net.folder / f"seed_{self.seed}"


def finished(run: Run, setting: Setting) -> dict[str, Any] | None:
    """The result of a run that is done; None for one that is not. Raises UserError where it was another network."""
    file = run.file(setting.out)
    if not file.is_file():
        return None
    result: dict[str, Any] = read_json(file)
    if (result["model"], result["options"]) != (run.net.model, _as_json(run.net.options)):
        raise UserError(f"{file}: is of {result['model']} with {result['options']}, now {run.net.model} with {_as_json(run.net.options)}")
    return result


def make(run: Run, setting: Setting, quiet: bool) -> dict[str, Any]:
    """Train, or go on where it was stopped; predict the held-out cases; score them; write the result.

    Raises UserError where the training fails or a case cannot be predicted, loop.Interrupted where it was stopped.
    """
    out, net = setting.out, run.net
    weights, predictions = run.weights(out), run.predictions(out)
    network = net.build(setting.dims, len(setting.table.channels), setting.classes)
    own = net.model == specs.nnunet.NAME  # no name that `train` could build it by
    stopped = (weights / CHECKPOINT).exists()
    options = {"model": network} if own else {"model": net.model, "model_kwargs": dict(net.options)}
    with Energy() as training_energy:
        trained = train(
            setting.dataset,
            weights,
            fold=run.fold,
            splits=setting.splits,
            spatial_dims=setting.dims,
            spacing=setting.spacing,
            patch=setting.patch,
            max_steps=setting.steps,
            batch=setting.batch,
            seed=run.seed,
            device=setting.device,
            resume=True,
            quiet=quiet,
            **{"validations": 0, **setting.recipe, **options},
        )
    with Energy() as inference_energy:
        predicted = predict(
            weights,
            weights / CASES,
            predictions,
            section="validation",
            format="nifti",
            device=setting.device,
            postprocessing="none",
            model=network if own else None,
            quiet=True,
        )
    for message in predicted["failed"].values():
        raise UserError(message)
    result = {
        "network": net.text,
        "model": net.model,
        "options": net.options,
        "fold": run.fold,
        "seed": run.seed,
        "steps": trained["steps"],
        "batch": setting.batch,
        "samples": trained["steps"] * setting.batch,
        "spacing": trained["spacing"],
        "patch": trained["patch"],
        "lr": trained["lr"],
        "parameters": trained["parameters"],
        "multiply_adds": specs.cost(net, setting.shape, setting.classes),
        "training_seconds": trained["seconds"],
        "training_joules": None if stopped or training_energy.joules is None else round(training_energy.joules, 1),
        "inference_seconds": predicted["seconds"],
        "inference_joules": None if inference_energy.joules is None else round(inference_energy.joules, 1),
        "inference_cases": len(predicted["cases"]),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "machine": setting.machine,
        "commit": setting.commit,
        "date": time.strftime("%Y-%m-%d"),
        "cases": scored(run, setting),
    }
    write_json(run.file(out), result)
    return result


def scored(run: Run, setting: Setting) -> dict[str, Any]:
    """{case: {class: metrics or None}} of a run's predictions, by the cases' names in the data set."""
    table, folder = setting.table, run.predictions(setting.out)
    names = {name: tuple(values) for name, values in table.regions.values.items()} or {
        name: (value,) for name, value in table.classes.items() if value
    }
    known = {case.name: case for case in table.cases}
    held_out = read_json(setting.splits)[run.fold]["val"]
    return {name: score(folder / f"{name}.nii.gz", known[name].label_file, names, table.ignore, setting.nsd_mm, []) for name in held_out}


def mean_dice(result: Mapping[str, Any]) -> float:
    """Of a run: over the classes of each case, then over the cases."""
    rows = [row["dice"] for case in result["cases"].values() if (row := over_classes(case))]
    return sum(rows) / len(rows) if rows else 0.0


def _as_json(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they are read from a file again."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
