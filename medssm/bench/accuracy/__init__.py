"""medssm bench accuracy: networks x folds x seeds on one data set, with equal samples and one recipe, and a comparison of what they find.

A folder holds all of it: splits.json, settings.json, networks.json, runs/NETWORK/fold_F-seed_S.json (one for each training), weights/,
predictions/NETWORK/seed_S/ (label maps of all held-out cases), results.json, results.md and compare.html. What is there is not made again.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from filelock import FileLock, Timeout

from medssm import machine
from medssm.bench.accuracy import nnunet, runs, specs, summary
from medssm.bench.accuracy.runs import Run, Setting
from medssm.bench.accuracy.specs import Net
from medssm.errors import UserError
from medssm.files import first_line, read_json, write_json
from medssm.options import Option
from medssm.segment.data import Dataset, load_dataset, split
from medssm.segment.fit import check_units, fit_patch, fit_slice_axis, fit_spacing, resampled_shapes
from medssm.segment.patients import with_patients
from medssm.segment.train import train

SPLITS, SETTINGS, NETWORKS = "splits.json", "settings.json", "networks.json"
_VOXELS = {2: 192**2, 3: 64**3}  # of a patch
_MULTIPLE = 16  # of a patch's edges
_BATCH = {2: 12, 3: 2}
# Options of train that the comparison sets itself:
_SET_HERE = (
    "dataset out model model_kwargs size mixer fold folds splits group max_steps max_seconds batch seed device devices strategy resume "
    "overwrite quiet"
)


def accuracy(
    dataset: Path | str,
    *,
    models: Annotated[Sequence[str], Option(flag="--models")],
    out: Path | str,
    folds: int = 3,
    seeds: int = 1,
    splits: Path | str | None = None,
    group: str | None = None,
    steps: int = 500,
    batch: int | None = None,
    recipe: Mapping[str, Any] | None = None,
    equal_to: str = "medssm_unet",
    baseline: str | None = None,
    nsd_mm: float = 2.0,
    docs: Path | str | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> dict[str, Any]:
    """Train networks on every fold of a data set with every seed, with equal samples and one recipe, and compare what they find in held-out cases.

    A training that is finished is not made again, and one that was stopped goes on from its checkpoint: the same command goes on. Several may work
    in one folder at a time.

    Args: What is compared
        dataset: folder with dataset.json (nnU-Net), or a MONAI datalist's JSON file
        models: networks, each as NAME or NAME:option=value,option=value, with names of `medssm models`, monai.networks.nets.NAME, or nnunet:
            nnU-Net's own network by its own plans (nnunet:plans=FILE takes plans that are there)
        equal_to: a network named without options that has a width gets the width at which its multiply-adds are nearest to those of this one; none
            leaves every network as it is
        baseline: the one that the others are compared with (default: the first)
    Args: How
        out: folder for all results
        folds: parts of the cases; each is held out once
        seeds: trainings of each network on each fold, with the seeds 0, 1, ...
        splits: folds to take in place of drawn ones, as nnU-Net's splits_final.json; kept as splits.json, which is read from then on
        group: regular expression whose first group in a case's name is the patient, as for medssm train
        steps: of each training
        batch: patches in a step (default: 2 in 3D, 12 in 2D)
        recipe: more options of `medssm train` by their names, such as lr, patch, ema or spatial_dims: in JSON, or a table in a --config file
        nsd_mm: tolerance of the surface Dice in millimetres
        docs: page that gets the tables between its two marks (docs/accuracy.md)
        device: auto, cpu, cuda, cuda:1 or mps

    Returns:
        What results.json holds.

    Raises:
        UserError: for what the caller can mend. A network whose training fails does not stop the others.
        KeyboardInterrupt: it was stopped. A training that was going on is saved.
    """
    out = Path(out)
    for name, value in (("folds", folds), ("seeds", seeds), ("steps", steps), ("batch", 1 if batch is None else batch)):
        least = 2 if name == "folds" else 1
        if value < least:
            raise UserError(f"{name}: expected {least} or more, got {value}")
    if docs is not None:
        summary.check_page(Path(docs))
    recipe = _checked(dict(recipe or {}))
    nets = specs.parse(models)
    names = [net.text for net in nets]
    baseline = names[0] if baseline is None else baseline
    if baseline not in names:
        raise UserError(f"baseline: expected one of {', '.join(names)}, got {baseline!r}")
    table = load_dataset(dataset)
    setting = _setting(Path(dataset), table, out, steps, batch, recipe, device, nsd_mm)
    _keep_splits(setting, folds, splits, group)
    _keep_settings(setting)
    nets = _ready(nets, setting, equal_to)
    wanted = [Run(net, fold, seed) for seed in range(seeds) for fold in range(folds) for net in nets]
    failed: dict[str, str] = {}
    left: list[str] = []
    done: list[dict[str, Any]] = []
    for number, run in enumerate(wanted, 1):
        result = runs.finished(run, setting)
        if result is None:
            try:
                result = _made(run, setting, quiet)
            except KeyboardInterrupt as error:
                raise KeyboardInterrupt(f"{run.name}: stopped and saved; the same command goes on from here") from error
            except Timeout:
                left.append(run.name)
                continue
            except UserError as error:
                failed[run.name] = f"{run.name}: {error}"
            except (MemoryError, RuntimeError) as error:  # torch reports a lack of memory as RuntimeError
                failed[run.name] = f"{run.name}: {type(error).__name__}: {first_line(error)}"
            if not quiet:
                told = failed.get(run.name) or f"{run.name}: mean Dice {runs.mean_dice(result or {'cases': {}}):.4f}"
                print(f"[{number}/{len(wanted)}] {told}", file=sys.stderr, flush=True)
        if result:
            done.append(result)
    patients = {case.name: case.patient or case.name for case in with_patients(table.cases, group)}
    results = summary.write(setting, nets, done, patients, baseline, failed, left)
    if docs is not None:
        summary.fill(Path(docs), results)
    return results


def show(result: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Print the table and where the pages are."""
    summary.show(result)


def _checked(recipe: dict[str, Any]) -> dict[str, Any]:
    """Options for `train`; UserError for one that it has not or that is set here."""
    known = [name for name in inspect.signature(train).parameters if name not in _SET_HERE.split()]
    for name in recipe:
        if name not in known:
            raise UserError(f"recipe: expected options of medssm train ({', '.join(known)}), got {name!r}")
    return recipe


def _setting(dataset: Path, table: Dataset, out: Path, steps: int, batch: int | None, recipe: dict[str, Any], device: str, nsd_mm: float) -> Setting:
    """Spacing and patch are chosen once, from the headers of all cases, so that every training has the same."""
    check_units(table.cases)
    dims = recipe.pop("spatial_dims", 3)
    if dims not in (2, 3):
        raise UserError(f"recipe: spatial_dims: expected 2 or 3, got {dims}")
    slice_axis = fit_slice_axis(table.cases) if dims == 2 else None
    spacing = [float(edge) for edge in recipe.pop("spacing", None) or fit_spacing(table.cases)]
    axes = [axis for axis in range(3) if axis != slice_axis]
    shape = np.median(resampled_shapes(table.cases, spacing), axis=0)
    near = [spacing[axis] for axis in axes]
    patch = list(recipe.pop("patch", None) or fit_patch([shape[axis] for axis in axes], near, _VOXELS[dims], [_MULTIPLE] * dims))
    about: dict[str, Any] = {"commit": machine.commit(), "machine": machine.describe()}
    return Setting(dataset, table, out, out / SPLITS, steps, batch or _BATCH[dims], dims, spacing, patch, near, recipe, device, nsd_mm, **about)


def _keep_splits(setting: Setting, folds: int, splits: Path | str | None, group: str | None) -> None:
    """Write the folds once; UserError where the file has other ones than are asked for."""
    file = setting.splits
    if splits is not None:
        wanted = read_json(splits)
    elif file.is_file():
        wanted = read_json(file)
    else:
        parts = [split(setting.table, fold, folds=folds, group=group) for fold in range(folds)]
        wanted = [{"train": [case.name for case in training], "val": [case.name for case in held_out]} for training, held_out in parts]
    if not isinstance(wanted, list) or len(wanted) != folds:
        raise UserError(f"folds: {splits or file} has {len(wanted) if isinstance(wanted, list) else 'no'} folds, expected {folds}")
    if file.is_file() and read_json(file) != wanted:
        raise UserError(f"splits: {file} has other folds than {splits}: name another folder")
    for fold in range(folds):
        _check_split(setting, wanted, fold, splits or file, group)
    if not file.is_file():
        write_json(file, wanted)


def _check_split(setting: Setting, wanted: Any, fold: int, file: Path | str, group: str | None) -> None:
    """UserError where a fold is not one of this data set, holds nothing out, or shares a held-out case with an earlier one."""
    if Path(file).is_file():
        split(setting.table, fold, splits=file, group=group)
    if not wanted[fold]["val"]:
        raise UserError(f"{file}: fold {fold} holds no case out")
    twice = {case for other in wanted[:fold] for case in other["val"]} & set(wanted[fold]["val"])
    if twice:
        raise UserError(f"{file}: fold {fold} holds out {min(twice)}, which an earlier fold does too")


def _keep_settings(setting: Setting) -> None:
    """Write what the trainings share; UserError where the folder has trainings of other settings."""
    file = setting.out / SETTINGS
    now = {
        "dataset": setting.table.name,
        "cases": len(setting.table.cases),
        "steps": setting.steps,
        "batch": setting.batch,
        "spatial_dims": setting.dims,
        "spacing": list(setting.spacing),
        "patch": list(setting.patch),
        "nsd_mm": setting.nsd_mm,
        "recipe": json.loads(json.dumps(setting.recipe)),
    }
    before = read_json(file) if file.is_file() else now
    other = [f"{name} {before.get(name)}, now {value}" for name, value in now.items() if before.get(name) != value]
    if other:
        raise UserError(f"out: {setting.out} has trainings with {'; '.join(other)}: name another folder")
    if not file.is_file():
        write_json(file, now)


def _ready(nets: Sequence[Net], setting: Setting, equal_to: str) -> list[Net]:
    """The networks with all their options: nnU-Net's from its plans, widths of equal multiply-adds; kept in a file. Each is built once."""
    classes, shape, file = setting.classes, setting.shape, setting.out / NETWORKS
    known: dict[str, Any] = read_json(file) if file.is_file() else {}
    near = setting.patch_spacing
    wanted = None if equal_to == "none" else specs.cost(specs.strided(specs.parse([equal_to])[0], shape, near), shape, classes)
    ready = []
    for net in nets:
        before = known.get(net.text, {})
        if before.get("equal_to", equal_to) != equal_to:
            raise UserError(f"equal_to: {file} has {net.text} with {before['equal_to']}, now {equal_to}: name another folder")
        if before:
            net = Net(net.text, net.model, before["options"])
        elif net.model == nnunet.NAME:
            net = Net(net.text, net.model, nnunet.options(setting.dataset, setting.out, setting.dims, net.options))
        elif wanted is None:
            net = specs.strided(net, shape, near)
        else:
            net = specs.sized(net, wanted, shape, near, classes)
        net.build(setting.dims, shape[1], classes)
        known[net.text] = {"model": net.model, "options": dict(net.options), "equal_to": equal_to}
        ready.append(net)
    write_json(file, known)
    return ready


def _made(run: Run, setting: Setting, quiet: bool) -> dict[str, Any]:
    """A run made now; Timeout where another process is at it."""
    place = run.weights(setting.out)
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_suffix(".lock"), timeout=0):
        return runs.finished(run, setting) or runs.make(run, setting, quiet)
