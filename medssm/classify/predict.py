"""medssm predict for a classifier: the class of each image with the probability of every class, after temperature, as a CSV.

Each image is read as in training (fitted.json says how). Several weight folders, the folds of one training, are averaged.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import nn

from medssm.classify import calibration
from medssm.classify.images import Fitted, prepared
from medssm.classify.predictions import is_predictions, write_predictions
from medssm.classify.table import CSV, Columns, Sample, below, read_table
from medssm.classify.validation import logits_of
from medssm.errors import UserError
from medssm.files import first_line, protect
from medssm.options import Option
from medssm.segment import networks
from medssm.segment.data import FITTED
from medssm.segment.images import files_of
from medssm.segment.inputs import DATALIST, LIST, cases_of
from medssm.segment.predict import device_of, folders_of, half_of, listed, weights_of
from medssm.segment.progress import progress


def predict(
    run: Path | str | Sequence[Path | str],
    inputs: Annotated[Path | str | Sequence[Path | str], Option(several=True)],
    out: Path | str,
    *,
    more_runs: Sequence[Path | str] = (),
    weights: Literal["best", "last"] = "last",
    section: str | None = None,
    path_column: str | None = None,
    group_column: str | None = None,
    temperature: float | None = None,
    device: str = "auto",
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto",
    batch: int = 32,
    nan: float | None = None,
    overwrite: bool = False,
    model: nn.Module | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Classify images, folders or lists of them; writes a CSV with a row for each: path, group, label and the probability of every class.

    A file that is read is never written over. Nor is any other file that medssm predict did not write, without `overwrite`.

    Args: Files
        run: folder written by medssm train --task classify, or a folder of such folders (fold_0, fold_1, ...); in Python also a list of them
        inputs: image files (NIfTI, NRRD, MetaImage, PNG, JPEG, TIFF, DICOM); folders, with all below them, of images or of DICOM series; CSV with a
            column of paths; datalists (.json), such as cases.json of a training, or text files of paths (.txt)
        out: the CSV
        more_runs: further folders of trainings; the probabilities of all are averaged
        weights: those of the end of the training, or those with the best validation
        section: of a datalist (default: testing or test, or the only one)
        path_column: of a CSV (default: path, file, image or another usual name)
        group_column: of a CSV, copied (default: group, patient, subject or another usual name)
        overwrite: write over a file of other origin
    Args: Inference
        temperature: that the logits are divided by (default: the one that was fitted in training; 1 where no image was held out)
        batch: images at a time
        nan: number that takes the place of voxels that are not finite (default: such an image is an error)
        device: auto, cpu, cuda, cuda:1 or mps
        precision: auto is 16-mixed on CUDA, else 32-true
        model: the module to load the weights into, where `train` was given one

    Returns:
        {"images": {path: {"label", "probabilities": {class: value}}}, "failed": {path: reason}, "temperature": [of each run], "seconds"}: of several
        images one that fails does not stop the others.

    Raises:
        UserError: where nothing can be predicted, or the only image is bad.
    """
    if batch < 1:
        raise UserError(f"batch: expected 1 or more, got {batch}")
    if temperature is not None and not 0 < temperature < float("inf"):
        raise UserError(f"temperature: expected more than 0, got {temperature}")
    place, begun, out = device_of(device), time.perf_counter(), Path(out)
    half = half_of(precision, place)
    if out.suffix.lower() != CSV or out.is_dir():
        raise UserError(f"out: expected a file that ends in {CSV}, got {out}")
    folds = [_load(folder, model, weights, temperature, place) for folder in folders_of([*listed(run), *more_runs])]
    _check_alike(folds)
    samples = _samples([Path(path) for path in listed(inputs)], out, section, Columns(path=path_column, group=group_column))
    tables = [path for path in map(Path, listed(inputs)) if path.is_file()]
    protect(
        out,
        reads=[*tables, *(file for sample in samples if sample.path.exists() for file in files_of(sample.path))],
        made=is_predictions,
        overwrite=overwrite,
    )
    if not quiet and temperature is None and any(fold.temperature is None for fold in folds):
        print("temperature: none was fitted, since no image was held out in training: the probabilities are not calibrated", file=sys.stderr)
    found: list[np.ndarray] = []
    kept: list[Sample] = []
    failed: dict[str, str] = {}
    with progress("classifying", quiet) as show:
        for start in range(0, len(samples), batch):
            show(start / len(samples), samples[start].name)
            part: list[Sample] = []
            images: list[list[torch.Tensor]] = [[] for _ in folds]
            for sample in samples[start : start + batch]:
                try:
                    read = [prepared(sample.path, fold.fitted, nan) for fold in folds]
                except UserError as error:
                    if len(samples) == 1:
                        raise
                    failed[str(sample.path)] = str(error)
                    continue
                except (MemoryError, OSError, RuntimeError) as error:
                    failed[str(sample.path)] = f"{sample.path}: {type(error).__name__}: {first_line(error)}"
                    continue
                part.append(sample)
                for own, image in zip(images, read, strict=True):
                    own.append(image)
            if part:
                sums = [
                    calibration.scaled(logits_of(fold.network, own, range(len(own)), place, half, batch), fold.temperature or 1.0)
                    for fold, own in zip(folds, images, strict=True)
                ]
                found += list(np.mean(sums, axis=0))
                kept += part
    if not kept:
        raise UserError("\n".join(failed.values()))
    classes = folds[0].fitted.classes
    write_predictions(out, kept, found, classes)
    rows = {
        str(sample.path): {"label": classes[int(row.argmax())], "probabilities": dict(zip(classes, map(float, row), strict=True))}
        for sample, row in zip(kept, found, strict=True)
    }
    seconds = round(time.perf_counter() - begun, 2)
    return {"images": rows, "failed": failed, "temperature": [fold.temperature or 1.0 for fold in folds], "seconds": seconds}


def show(result: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Print how many images were classified, and as what."""
    counts: dict[str, int] = {}
    for row in result["images"].values():
        counts[row["label"]] = counts.get(row["label"], 0) + 1
    failed = f", {len(result['failed'])} failed" if result["failed"] else ""
    found = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    print(f"{len(result['images'])} image(s) in {result['seconds']:.1f} s{failed} ({found}): {options['out']}")


@dataclass(frozen=True)
class _Fold:
    folder: Path
    network: nn.Module
    fitted: Fitted
    temperature: float | None


def _load(folder: Path, model: nn.Module | None, weights: str, temperature: float | None, device: torch.device) -> _Fold:
    name = weights_of(folder, weights)
    fitted = Fitted.load(folder / FITTED)
    network = networks.load(folder, copy.deepcopy(model), name)  # copied: every fold has weights of its own
    own = calibration.load(folder, weights) if temperature is None else temperature
    return _Fold(folder, networks.placed(network, device, len(fitted.shape)).eval(), fitted, own)


def _check_alike(folds: Sequence[_Fold]) -> None:
    for fold in folds[1:]:
        first, other = folds[0].fitted.classes, fold.fitted.classes
        if first != other:
            raise UserError(f"run: {fold.folder} has the classes {', '.join(other)}, {folds[0].folder} has {', '.join(first)}")


def _samples(inputs: Sequence[Path], out: Path, section: str | None, columns: Columns) -> list[Sample]:
    """The images to classify, each once."""
    samples: list[Sample] = []
    for path in inputs:
        if path.is_dir():
            samples += [Sample(str(file), file) for file in below(path, [out])]
        elif path.suffix.lower() == CSV:
            samples += read_table(path, columns)[0]
        elif path.suffix in (DATALIST, LIST):
            samples += [Sample(case.name, case.images[0], None, case.patient) for case in cases_of([path], 1, out=out, section=section)]
        elif path.exists():
            samples.append(Sample(str(path), path))
        else:
            raise UserError(f"{path}: no such file or folder")
    if not samples:
        raise UserError(f"{', '.join(map(str, inputs))}: no image in it")
    return [replace(sample, label=None) for sample in {sample.path.resolve(): sample for sample in samples}.values()]
