"""Data sets on disk: nnU-Net's folder layout or a MONAI datalist, and folds."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from medssm.errors import UserError
from medssm.files import read_json
from medssm.segment.cases import Case, distinct, grouped, refuse
from medssm.segment.folders import is_paired, paired_cases
from medssm.segment.images import (
    ENDINGS,
    PICTURES,
    Image,
    aligned,
    ending_of,
    image_files,
    open_image,
    open_label,
    ras_grid,
    read_label,
    say,
    strip_ending,
)
from medssm.segment.patients import check_apart, units, with_patients
from medssm.segment.regions import Regions, take_apart

DATASET, FITTED = "dataset.json", "fitted.json"  # what describes a data set, and a trained network's data
_KEYS = {"image", "label", "fold", "patient"}  # of a case in a datalist
_SHOWN = 20


@dataclass(frozen=True)
class Dataset:
    """Labelled cases, the names of their channels, and their classes ({name: value in the files}, background first).

    Voxels of the value `ignore` have no label; None if there is no such value. `regions` are made of classes; most data sets have none.
    """

    name: str
    channels: tuple[str, ...]
    classes: dict[str, int]
    ignore: int | None
    cases: tuple[Case, ...]
    regions: Regions = field(default_factory=Regions)


def load_dataset(path: Path | str) -> Dataset:
    """The data set of a folder with dataset.json (nnU-Net v1 and v2, Medical Segmentation Decathlon) or with images/ and masks/, or of a MONAI
    datalist's JSON file.

    Raises UserError with one line for each bad file: missing, no image, a channel missing, label and image on different grids.
    """
    dataset = described(path)
    files: list[Image] = []
    _complain([line for case in dataset.cases for line in faults(case, len(dataset.channels) or None, files)])
    say(files)
    grids = {file.path: ras_grid(file) for file in files}
    cases = tuple(replace(case, grid=grids[case.images[0]]) for case in dataset.cases)
    return replace(dataset, channels=dataset.channels or counted_channels(cases), classes=dataset.classes or _found_classes(cases), cases=cases)


def description_of(path: Path | str) -> Path:
    """The file that describes a data set: dataset.json in a folder, or the file that was named."""
    return Path(path) / DATASET if Path(path).is_dir() else Path(path)


def read_for(path: Path | str, table: Dataset) -> list[Path]:
    """The files of a data set, which no command writes over."""
    return [description_of(path), *(file for case in table.cases for file in (*case.images, case.label_file))]


def described(path: Path | str, complain: Callable[[str], None] = refuse) -> Dataset:
    """What the description of a data set says, with no image looked at: `channels` or `classes` is empty where it names none.

    `complain` gets the line about a channel too many and about two classes of one value; the second one is then left out.

    Raises UserError where the description cannot be read or contradicts itself, or two cases are one.
    """
    path, description = Path(path), description_of(path)
    if not description.is_file():
        if path.is_dir() and is_paired(path):
            return Dataset(path.resolve().name, (), {}, None, tuple(paired_cases(path)))
        expected = "expected nnU-Net's dataset.json, a MONAI datalist, or the folders images and masks; a folder of classes is for --task classify"
        raise UserError(f"{description}: no such file ({expected})")
    table = read_json(description)
    if not isinstance(table, dict):
        raise UserError(f"{description}: expected a JSON object, got {type(table).__name__}")
    root = description.parent
    channels = _channels(table, description)
    plain, regions = take_apart(table.get("labels"), table.get("regions_class_order"), description)
    labels = _classes(plain, description, complain)
    if description.name != DATASET or _is_listed(root, table):
        cases = _listed_cases(root, table, description)
    else:
        cases = _folder_cases(root, len(channels), table.get("file_ending") or ".nii.gz", complain)
    if not cases:
        meant = [key for key in table if key != "training" and difflib.get_close_matches(key.lower(), ["training"], 1, 0.8)]
        raise UserError(f"{description}: no training case found{f'; {meant[0]!r}: no such entry, training is one' if meant else ''}")
    ignore = labels.pop("ignore", None) if labels else None
    return Dataset(str(table.get("name") or root.name), channels, labels, ignore, tuple(cases), regions)


def counted_channels(cases: Sequence[Case]) -> tuple[str, ...]:
    """Names for the channels of a data set that names none, by the number that the first readable case has."""
    for case in cases:
        with contextlib.suppress(UserError):
            files = [open_image(file) for file in case.images]
            count = sum(file.channels for file in files)
            return ("red", "green", "blue") if count == 3 and files[0].format in PICTURES else tuple(f"channel_{i}" for i in range(count))
    return ("channel_0",)


def load_classes(path: Path) -> tuple[dict[str, int] | dict[str, tuple[int, ...]], int | None]:
    """{class: value} or {region: values}, and the ignored value, from a dataset.json, a fitted.json, or a folder with one of them.

    Raises UserError if it names no classes.
    """
    files = [path / name for name in (FITTED, DATASET)] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file()), files[-1])
    table = read_json(file)
    plain, regions = take_apart(table.get("labels"), table.get("regions_class_order"), file)
    classes = dict(table.get("classes") or _classes(plain, file))
    if not classes:
        raise UserError(f"{file}: names no classes")
    ignore = classes.pop("ignore", None)
    values = (table.get("regions") or {}).get("values") or regions.values
    return {name: tuple(region) for name, region in values.items()} or classes, table.get("ignore", ignore)


def split(
    dataset: Dataset, fold: int | None, *, folds: int = 5, splits: Path | str | None = None, group: str | None = None, seed: int = 0
) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Training and validation cases.

    Args:
        dataset: the data set
        fold: the part to validate on; None trains on every case outside a datalist's validation section
        folds: the number of parts, if neither `splits` nor the datalist gives the folds
        splits: nnU-Net's splits_final.json; it comes before the datalist's own fold numbers
        group: regular expression that finds the patient in a case's name; see `patients.with_patients`
        seed: of the shuffling into parts

    Raises:
        UserError: there is no such fold, the splits file does not fit the data set, or an image or a patient is on both sides.
    """
    training, validation = _split(replace(dataset, cases=with_patients(dataset.cases, group)), fold, folds, splits, seed)
    check_apart(training, validation)
    shared = {file.resolve() for case in training for file in case.images} & {file.resolve() for case in validation for file in case.images}
    if shared:
        raise UserError(f"{min(shared)}: an image of a training case and of a validation case")
    return training, validation


def _split(dataset: Dataset, fold: int | None, folds: int, splits: Path | str | None, seed: int) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    held_out = tuple(case for case in dataset.cases if case.fold == "validation")
    cases = tuple(case for case in dataset.cases if case.fold != "validation")
    if fold is None:
        return cases, held_out
    if splits is not None:
        return _read_split(dataset, Path(splits), fold)
    if any(case.fold is not None for case in cases):
        numbers = [case.fold for case in cases]
    else:
        shuffled, what = units(cases), "cases" if cases[0].patient is None else "patients"
        if len(shuffled) < 2:
            raise UserError(f"fold: expected at least 2 {what} to hold one out, got {len(shuffled)}")
        if not 2 <= folds <= len(shuffled):
            raise UserError(f"folds: expected 2 to {len(shuffled)} (the number of {what}), got {folds}")
        random.Random(seed).shuffle(shuffled)
        numbers = [0] * len(cases)
        for i, unit in enumerate(shuffled):
            for position in unit:
                numbers[position] = i % folds
    validation = tuple(case for case, number in zip(cases, numbers, strict=True) if number == fold)
    training = tuple(case for case, number in zip(cases, numbers, strict=True) if number != fold)
    if not validation or not training:
        raise UserError(f"fold: expected one of {sorted({n for n in numbers if n is not None}, key=str)}, got {fold}")
    return training, validation


def check_values(case: Case, values: np.ndarray, classes: dict[str, int], ignore: int | None) -> None:
    """Raise UserError if `values`, found in the case's label map, hold one that is neither a class nor ignored."""
    strange = sorted(set(values.tolist()) - set(classes.values()) - {ignore})
    if strange:
        raise UserError(f"{case.label}: label value(s) {', '.join(map(str, strange[:8]))} outside the classes {sorted(classes.values())}")


def _folder_cases(root: Path, channels: int, ending: str, complain: Callable[[str], None]) -> list[Case]:
    """imagesTr/CASE_0000.nii.gz, ... with labelsTr/CASE.nii.gz."""
    if ending not in ENDINGS:
        raise UserError(f"{root / DATASET}: file_ending: expected one of {', '.join(ENDINGS)}, got {ending!r}")
    if not channels:
        raise UserError(f'{root / DATASET}: channel_names: expected {{"0": name, ...}}, got none')
    images, labels = ([file for file in image_files(root / part) if ending_of(file) == ending] for part in ("imagesTr", "labelsTr"))
    cases = {case.name: replace(case, label=root / "labelsTr" / f"{case.name}{ending}") for case in grouped(images, channels, complain)}
    for label in labels:  # one without an image: its own line says so
        name = strip_ending(label)
        cases.setdefault(name, Case(name, tuple(root / "imagesTr" / f"{name}_{i:04d}{ending}" for i in range(channels)), label))
    return [cases[name] for name in sorted(cases)]


def _is_listed(root: Path, table: dict) -> bool:
    """Whether the cases are those that the description lists: where all files of one of them are there, or no folder is to be searched."""
    for entry in table.get("training") or []:
        files = [root / file for key in ("image", "label") for file in _files(entry.get(key))] if isinstance(entry, dict) else []
        if files and all(file.exists() for file in files):
            return True
    return not (root / "imagesTr").is_dir()


def _files(value: Any) -> list[str]:
    return [file for file in (value if isinstance(value, list) else [value]) if isinstance(file, str)]


def _listed_cases(root: Path, table: dict, description: Path) -> list[Case]:
    """{"training": [{"image": file or [files], "label": file, "fold": number, "patient": name}, ...], "validation": [...]}."""
    cases = []
    for section in ("training", "validation"):
        for i, entry in enumerate(table.get(section) or []):
            where = f"{description}: {section}[{i}]"
            if not isinstance(entry, dict) or not entry.get("image") or not entry.get("label"):
                raise UserError(f'{where}: expected {{"image": ..., "label": ...}}, got {entry!r}')
            for key in entry.keys() - _KEYS:
                meant = [known for known in _KEYS if sorted(known) == sorted(key)] or difflib.get_close_matches(key.lower(), _KEYS, 1, 0.8)
                if meant:
                    raise UserError(f"{where}: {key!r}: no such entry; {meant[0]!r} is one")
            images = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
            cases.append(
                Case(
                    strip_ending(entry["label"]),
                    tuple(root / file for file in images),
                    root / entry["label"],
                    "validation" if section == "validation" else entry.get("fold"),
                    None if entry.get("patient") is None else str(entry["patient"]),
                )
            )
    return distinct(cases)


def _channels(table: dict, description: Path) -> tuple[str, ...]:
    """The channels' names in their order, from nnU-Net v2's channel_names or the older modality; empty if there are none."""
    names = table.get("channel_names") or table.get("modality") or {}
    try:
        return tuple(str(names[key]) for key in sorted(names, key=int))
    except (TypeError, ValueError) as error:
        raise UserError(f'{description}: channel_names: expected {{"0": name, ...}}, got {names!r}') from error


def _classes(labels: dict | None, description: Path, complain: Callable[[str], None] = refuse) -> dict[str, int]:
    """{name: value}, by value, from nnU-Net v2's {"liver": 1} or the older {"1": "liver"}; empty if the file names none."""
    if not labels:
        return {}
    try:
        table = {str(name): int(value) for name, value in labels.items()}
    except TypeError as error:
        raise UserError(f"{description}: labels: expected one value for each class, got {labels}") from error
    except ValueError:
        try:
            table = {str(name): int(value) for value, name in labels.items()}
        except ValueError as error:
            raise UserError(f"{description}: labels: expected {{name: value}} or {{value: name}}, got {labels}") from error
    table = dict(sorted(table.items(), key=lambda item: item[1]))
    for (name, value), (other, again) in itertools.pairwise(list(table.items())):
        if value == again:
            complain(f"{description}: labels: {name} and {other} have one value, {value}")
            del table[other]
    if 0 not in table.values():
        table = {"background": 0, **table}
    return table


def _found_classes(cases: Sequence[Case]) -> dict[str, int]:
    """For a datalist that names no classes: every value in any label map."""
    values: set[int] = set()
    for case in cases:
        values.update(np.unique(read_label(case.label_file)[0]).tolist())
    return unnamed_classes(values)


def unnamed_classes(values: Iterable[int]) -> dict[str, int]:
    """The classes of a datalist that names none, by the values in its label maps."""
    return {"background" if value == 0 else f"class_{value}": int(value) for value in sorted({0, *values})}


def absent_classes(classes: Mapping[str, int], found: Collection[int]) -> list[str]:
    """A line for each class but the background whose value is not `found` in any label map."""
    return [f"classes: no training case has {name}" for name, value in classes.items() if value and value not in found]


def faults(case: Case, channels: int | None, files: list[Image]) -> list[str]:
    """What is wrong with a case's files by their headers, one line each. Those that are right are added to `files`."""
    opened, lines = [], []
    for path, open_file in (*((image, open_image) for image in case.images), (case.label_file, open_label)):
        try:
            opened.append(open_file(path))
        except UserError as error:
            lines.append(str(error))
    if lines:
        return lines
    *images, label = opened
    if channels is not None and len(images) == 1 and channels != images[0].channels:
        lines.append(f"{case.images[0]}: expected {channels} channel(s), got {images[0].channels}")
    files.append(images[0])
    for image in (*images[1:], label):
        try:
            files.append(aligned(image, images[0]))
        except UserError as error:
            lines.append(str(error))
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
