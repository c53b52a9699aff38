"""Data sets on disk: nnU-Net's folder layout or a MONAI datalist, folds, and the cases in a file or folder to be predicted."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from medssm.errors import UserError
from medssm.files import read_json
from medssm.segment.nifti import NIFTI_ENDINGS, different_grid, open_nifti, read_label, strip_ending

DATASET, FITTED = "dataset.json", "fitted.json"  # what describes a data set, and a trained network's data
_CHANNEL = re.compile(r"_(\d{4})$")  # nnU-Net's channel files end in _0000, _0001, ...
_SHOWN = 20


@dataclass(frozen=True)
class Case:
    """One image (a file for each channel, or one file), its label map if it has one, and the fold that it was given."""

    name: str
    images: tuple[Path, ...]
    label: Path | None = None
    fold: int | str | None = None  # a datalist's number, or "validation" for its validation section

    @property
    def label_file(self) -> Path:
        """The label map of a case of a data set: each of them has one."""
        if self.label is None:
            raise ValueError(f"{self.name}: expected a case with a label map")
        return self.label


@dataclass(frozen=True)
class Dataset:
    """Labelled cases, the names of their channels, and their classes ({name: value in the files}, background first).

    Voxels of the value `ignore` have no label; None if there is no such value.
    """

    name: str
    channels: tuple[str, ...]
    classes: dict[str, int]
    ignore: int | None
    cases: tuple[Case, ...]


def load_dataset(path: Path | str) -> Dataset:
    """The data set of a folder with dataset.json (nnU-Net v1 and v2, Medical Segmentation Decathlon) or of a MONAI datalist's JSON file.

    Raises UserError with one line for each bad file: missing, no NIfTI, a channel missing, label and image on different grids.
    """
    path = Path(path)
    description = path / DATASET if path.is_dir() else path
    if not description.is_file():
        raise UserError(f"{description}: no such file (expected nnU-Net's dataset.json or a MONAI datalist)")
    table = read_json(description)
    if not isinstance(table, dict):
        raise UserError(f"{description}: expected a JSON object, got {type(table).__name__}")
    root = description.parent
    channels = _channels(table, description)
    labels = _classes(table.get("labels"), description)
    if description.name == DATASET and _has_channel_files(root):
        cases = _folder_cases(root, len(channels), table.get("file_ending") or ".nii.gz")
    else:
        cases = _listed_cases(root, table, description)
    if not cases:
        raise UserError(f"{description}: no training case found")
    _complain([line for case in cases for line in _check(case, len(channels) or None)])
    if not channels:
        first = open_nifti(cases[0].images[0])
        count = first.shape[3] if first.ndim == 4 else len(cases[0].images)
        channels = tuple(f"channel_{i}" for i in range(count))
    ignore = labels.pop("ignore", None) if labels else None
    return Dataset(str(table.get("name") or root.name), channels, labels or _found_classes(cases), ignore, tuple(cases))


def load_classes(path: Path) -> tuple[dict[str, int], int | None]:
    """{name: value} and the ignored value, from a dataset.json, a fitted.json, or a folder with one of them. UserError if it names no classes."""
    files = [path / name for name in (FITTED, DATASET)] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file()), files[-1])
    table = read_json(file)
    classes = dict(table.get("classes") or _classes(table.get("labels"), file))
    if not classes:
        raise UserError(f"{file}: names no classes")
    ignore = classes.pop("ignore", None)
    return classes, table.get("ignore", ignore)


def split(
    dataset: Dataset, fold: int | None, *, folds: int = 5, splits: Path | str | None = None, seed: int = 0
) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Training and validation cases.

    Args:
        dataset: the data set
        fold: the part to validate on; None trains on every case outside a datalist's validation section
        folds: the number of parts, if neither `splits` nor the datalist gives the folds
        splits: nnU-Net's splits_final.json; it comes before the datalist's own fold numbers
        seed: of the shuffling into parts

    Raises:
        UserError: there is no such fold, or the splits file does not fit the data set.
    """
    held_out = tuple(case for case in dataset.cases if case.fold == "validation")
    cases = tuple(case for case in dataset.cases if case.fold != "validation")
    if fold is None:
        return cases, held_out
    if splits is not None:
        return _read_split(dataset, Path(splits), fold)
    if any(case.fold is not None for case in cases):
        numbers = {case.name: case.fold for case in cases}
    else:
        if not 2 <= folds <= len(cases):
            raise UserError(f"folds: expected 2 to {len(cases)} (the number of cases), got {folds}")
        names = sorted(case.name for case in cases)
        random.Random(seed).shuffle(names)
        numbers = {name: i % folds for i, name in enumerate(names)}
    validation = tuple(case for case in cases if numbers[case.name] == fold)
    training = tuple(case for case in cases if numbers[case.name] != fold)
    if not validation or not training:
        raise UserError(f"fold: expected one of {sorted({n for n in numbers.values() if n is not None})}, got {fold}")
    return training, validation


def cases_in(path: Path | str, channels: int) -> list[Case]:
    """The cases to predict in a NIfTI file or a folder: channel files (_0000, _0001, ...) together, any other file alone.

    Raises UserError if there is no such path or no NIfTI file in the folder.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    files = [path] if path.is_file() else nifti_files(path)
    if not files:
        raise UserError(f"{path}: no .nii or .nii.gz file in this folder")
    cases = {}
    for file in files:
        stem = strip_ending(file)
        if not _CHANNEL.search(stem):
            cases[stem] = Case(stem, (file,))
            continue
        name = _CHANNEL.sub("", stem)
        ending = file.name[len(stem) :]
        cases[name] = Case(name, tuple(file.with_name(f"{name}_{i:04d}{ending}") for i in range(channels)))
    return list(cases.values())


def nifti_files(folder: Path) -> list[Path]:
    """The NIfTI files of a folder, by name. Hidden ones are left out: a name with a leading dot is a file that is still being written."""
    return sorted(file for file in folder.iterdir() if file.name.endswith(NIFTI_ENDINGS) and not file.name.startswith("."))


def check_values(case: Case, values: np.ndarray, classes: dict[str, int], ignore: int | None) -> None:
    """Raise UserError if `values`, found in the case's label map, hold one that is neither a class nor ignored."""
    strange = sorted(set(values.tolist()) - set(classes.values()) - {ignore})
    if strange:
        raise UserError(f"{case.label}: label value(s) {', '.join(map(str, strange[:8]))} outside the classes {sorted(classes.values())}")


def _has_channel_files(root: Path) -> bool:
    folder = root / "imagesTr"
    return folder.is_dir() and any(_CHANNEL.search(strip_ending(file)) for file in nifti_files(folder))


def _folder_cases(root: Path, channels: int, ending: str) -> list[Case]:
    """imagesTr/CASE_0000.nii.gz, ... with labelsTr/CASE.nii.gz."""
    if ending not in NIFTI_ENDINGS:
        raise UserError(f"{root / DATASET}: file_ending: expected .nii.gz or .nii, got {ending!r}")
    if not channels:
        raise UserError(f'{root / DATASET}: channel_names: expected {{"0": name, ...}}, got none')
    names = {_CHANNEL.sub("", strip_ending(file)) for file in nifti_files(root / "imagesTr")}
    names |= {strip_ending(file) for file in nifti_files(root / "labelsTr")} if (root / "labelsTr").is_dir() else set()
    return [
        Case(name, tuple(root / "imagesTr" / f"{name}_{i:04d}{ending}" for i in range(channels)), root / "labelsTr" / f"{name}{ending}")
        for name in sorted(names)
    ]


def _listed_cases(root: Path, table: dict, description: Path) -> list[Case]:
    """{"training": [{"image": file or [files], "label": file, "fold": number}, ...], "validation": [...]}."""
    cases = []
    for section in ("training", "validation"):
        for i, entry in enumerate(table.get(section) or []):
            if not isinstance(entry, dict) or not entry.get("image") or not entry.get("label"):
                raise UserError(f'{description}: {section}[{i}]: expected {{"image": ..., "label": ...}}, got {entry!r}')
            images = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
            cases.append(
                Case(
                    strip_ending(entry["label"]),
                    tuple(root / file for file in images),
                    root / entry["label"],
                    "validation" if section == "validation" else entry.get("fold"),
                )
            )
    return _distinct(cases)


def _distinct(cases: list[Case]) -> list[Case]:
    """The cases with distinct names: equal file names (sub-01/seg.nii.gz, sub-02/seg.nii.gz) get their folders' names."""
    names = [case.name for case in cases]
    return [case if names.count(case.name) == 1 else replace(case, name="_".join((*case.label_file.parts[-3:-1], case.name))) for case in cases]


def _channels(table: dict, description: Path) -> tuple[str, ...]:
    """The channels' names in their order, from nnU-Net v2's channel_names or the older modality; empty if there are none."""
    names = table.get("channel_names") or table.get("modality") or {}
    try:
        return tuple(str(names[key]) for key in sorted(names, key=int))
    except (TypeError, ValueError) as error:
        raise UserError(f'{description}: channel_names: expected {{"0": name, ...}}, got {names!r}') from error


def _classes(labels: dict | None, description: Path) -> dict[str, int]:
    """{name: value}, by value, from nnU-Net v2's {"liver": 1} or the older {"1": "liver"}; empty if the file names none."""
    if not labels:
        return {}
    try:
        table = {str(name): int(value) for name, value in labels.items()}
    except TypeError as error:
        raise UserError(f"{description}: labels: expected one value for each class, got {labels} (regions are not supported)") from error
    except ValueError:
        try:
            table = {str(name): int(value) for value, name in labels.items()}
        except ValueError as error:
            raise UserError(f"{description}: labels: expected {{name: value}} or {{value: name}}, got {labels}") from error
    table = dict(sorted(table.items(), key=lambda item: item[1]))
    if 0 not in table.values():
        table = {"background": 0, **table}
    return table


def _found_classes(cases: Sequence[Case]) -> dict[str, int]:
    """For a datalist that names no classes: every value in any label map."""
    values = {0}
    for case in cases:
        values.update(np.unique(read_label(case.label_file)[0]).tolist())
    return {"background" if value == 0 else f"class_{value}": int(value) for value in sorted(values)}


def _check(case: Case, channels: int | None) -> list[str]:
    """What is wrong with a case's files by their headers, one line each."""
    opened, lines = [], []
    for path in (*case.images, case.label_file):
        try:
            opened.append(open_nifti(path))
        except UserError as error:
            lines.append(str(error))
    if lines:
        return lines
    *images, label = opened
    if channels is not None and len(images) == 1 and channels != (images[0].shape[3] if images[0].ndim == 4 else 1):
        lines.append(f"{case.images[0]}: expected {channels} channel(s), got the shape {images[0].shape}")
    for path, image in zip((*case.images[1:], case.label_file), (*images[1:], label), strict=True):
        difference = different_grid(image, images[0])
        if difference:
            lines.append(f"{path}: not on the grid of {case.images[0]}: {difference}")
    return lines


def _complain(lines: Sequence[str]) -> None:
    """Raise UserError with these lines, the first 20 of them, if there are any."""
    if lines:
        more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        raise UserError("\n".join([*lines[:_SHOWN], *more]))


def _read_split(dataset: Dataset, path: Path, fold: int) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """nnU-Net's [{"train": [names], "val": [names]}, ...]."""
    table = read_json(path)
    if not isinstance(table, list) or not all(isinstance(entry, dict) and {"train", "val"} <= entry.keys() for entry in table):
        raise UserError(f'{path}: expected a list of {{"train": [names], "val": [names]}}')
    if not 0 <= fold < len(table):
        raise UserError(f"fold: expected 0 to {len(table) - 1} ({path}), got {fold}")
    by_name = {case.name: case for case in dataset.cases}
    unknown = sorted({*table[fold]["train"], *table[fold]["val"]} - by_name.keys())
    if unknown:
        raise UserError(f"{path}: fold {fold} names cases the data set lacks: {', '.join(unknown[:8])}")
    shared = sorted(set(table[fold]["train"]) & set(table[fold]["val"]))
    if shared:
        raise UserError(f"{path}: fold {fold} trains on its own validation cases: {', '.join(shared[:8])}")
    return tuple(by_name[name] for name in table[fold]["train"]), tuple(by_name[name] for name in table[fold]["val"])
