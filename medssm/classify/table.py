"""Data sets of a classification: a folder with a subfolder for each class, or a CSV with a row for each image.

Images with one group, such as a patient or a smear, are never on two sides of a split.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medssm.errors import UserError
from medssm.segment.data import DATASET
from medssm.segment.folders import is_paired
from medssm.segment.images import check_slices, image_files, is_series, label_files
from medssm.segment.inputs import folders_below
from medssm.segment.patients import patient_of

CSV = ".csv"
NAMES = {  # of the columns, as people call them, in small letters without marks and spaces; the first one that a table has counts
    "path": ("path", "file", "filename", "filepath", "image", "imagepath", "imagefile", "img", "imgpath"),
    "label": ("label", "class", "target", "diagnosis", "category", "classname", "dx"),
    "group": (
        "group",
        "patient",
        "patientid",
        "subject",
        "subjectid",
        "participant",
        "participantid",
        "case",
        "caseid",
        "smear",
        "slide",
        "specimen",
    ),
}
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_SHOWN = 20


@dataclass(frozen=True)
class Sample:
    """One image: a file, or the folder of a DICOM series.

    name   its path as the data set has it
    label  the name of its class
    group  its patient, smear, ...
    """

    name: str
    path: Path
    label: str | None = None
    group: str | None = None

    @property
    def unit(self) -> str:
        """What is never on two sides of a split: the group, or the image itself where no group is known."""
        return f"image {self.path.resolve()}" if self.group is None else f"group {self.group}"


@dataclass(frozen=True)
class Columns:
    """Names of a CSV's columns; None finds each by its usual names (`NAMES`)."""

    path: str | None = None
    label: str | None = None
    group: str | None = None


def load_samples(path: Path | str, columns: Columns = Columns(), group: str | None = None) -> tuple[list[Sample], list[str]]:
    """The labelled images of a data set, by name, and what was found, for the user.

    Args:
        path: a CSV; or a folder with a subfolder for each class, or with one CSV that has columns of paths and labels
        columns: of a CSV
        group: regular expression whose first group in an image's name is its group; it comes before a CSV's column

    Raises:
        UserError: no such file, no class or one only, a row without a label, an image twice, or label maps in place of classes.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder (expected a folder with a subfolder for each class, or a CSV)")
    if path.is_dir():
        table = _table_in(path)
        samples, said = read_table(table, columns) if table else (_of_folders(path, columns), [f"classes: the folders of {path}"])
    elif path.suffix.lower() == CSV:
        samples, said = read_table(path, columns)
    else:
        raise UserError(f"{path}: expected a folder with a subfolder for each class, or a CSV ({CSV})")
    without = [sample for sample in samples if sample.label is None]
    if without:
        raise UserError(
            f"{path}: no label for {without[0].name} and {len(without) - 1} other(s)"
            if len(without) > 1
            else f"{path}: no label for {without[0].name}"
        )
    if group is not None:
        samples = [replace(sample, group=patient_of(sample.name, group, "group")) for sample in samples]
    partly = [sample for sample in samples if sample.group is None]
    if partly and len(partly) < len(samples):
        raise UserError(f"{path}: no group for {partly[0].name}, where other images have one")
    if partly:
        said.append("groups: none known, so every image is one of its own; images of one patient may then be on both sides (--group-column, --group)")
    _check(path, samples)
    return samples, said


def read_table(path: Path, columns: Columns = Columns()) -> tuple[list[Sample], list[str]]:
    """The images of a CSV, in its order, and which columns were taken. Paths begin at the CSV's folder; label and group may be missing.

    Raises UserError where it is no CSV, has no column of paths, lacks a column that was named, or lists an image twice.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, strict=True)
            headings = [heading for heading in rows.fieldnames or [] if heading]
            found = {kind: _column(path, headings, kind, getattr(columns, kind)) for kind in NAMES}
            lines = [(rows.line_num, row) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable CSV ({error})") from error
    if found["path"] is None:
        raise UserError(
            f"{path}: no column of paths: expected one of {', '.join(NAMES['path'])}, or --path-column, got {', '.join(headings) or 'none'}"
        )
    samples: dict[str, Sample] = {}
    for number, row in lines:
        values = {kind: (row.get(column) or "").strip() or None if column else None for kind, column in found.items()}
        name = values["path"]
        if name is None:
            raise UserError(f"{path}: line {number}: no path")
        if name in samples:
            raise UserError(f"{path}: line {number}: {name} a second time")
        samples[name] = Sample(name, path.parent / name, values["label"], values["group"])
    if not samples:
        raise UserError(f"{path}: no row in it")
    return list(samples.values()), [f"table: {path} ({', '.join(f'{kind}: {column!r}' for kind, column in found.items() if column)})"]


def below(folder: Path, left_out: Iterable[Path] = ()) -> list[Path]:
    """The images of a folder: its files, and those of the folders below it, of which one with DICOM files is itself an image, a series.

    Raises UserError where the folder itself has several slices of one series.
    """
    found: list[Path] = []
    for inner in folders_below(folder, {path.resolve() for path in left_out}):
        found += label_files(inner) if inner == folder else [inner] if is_series(inner) else image_files(inner)
    check_slices(found)
    return found


def classes_of(samples: Sequence[Sample]) -> tuple[str, ...]:
    """The names of the classes in their order: by number where all are numbers, else by letters."""
    names = {sample.label for sample in samples if sample.label is not None}
    return tuple(sorted(names, key=lambda name: (0, float(name), name) if all(map(_is_number, names)) else (1, 0.0, name)))


def groups_by_class(samples: Sequence[Sample]) -> dict[str, int]:
    """{class: the number of its groups}."""
    return dict(Counter(label for label, _ in {(str(sample.label), sample.unit) for sample in samples}))


def _of_folders(root: Path, columns: Columns) -> list[Sample]:
    if any((columns.path, columns.label, columns.group)):
        raise UserError(f"{root}: columns are those of a CSV, and this is a folder of classes")
    if (root / DATASET).is_file() or is_paired(root):
        raise UserError(f"{root}: a data set of label maps, one for each image: leave out --task classify to train a network that segments")
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    if folders and {folder.name.lower() for folder in folders} <= _SPLITS:
        raise UserError(f"{root}: {', '.join(folder.name for folder in folders)} are parts, no classes: name one of them, {folders[0]}")
    return [Sample(file.relative_to(root).as_posix(), file, folder.name) for folder in folders for file in below(folder)]


def _table_in(root: Path) -> Path | None:
    """The CSV of a folder that lists images with their labels, if it has exactly one."""
    found = []
    for file in sorted(root.glob(f"*{CSV}")):
        try:
            with open(file, newline="", encoding="utf-8-sig") as text:
                headings = next(csv.reader(text), [])
        except (OSError, UnicodeDecodeError, csv.Error):
            continue
        if all(any(_plain(heading) in NAMES[kind] for heading in headings) for kind in ("path", "label")):
            found.append(file)
    if len(found) > 1:
        raise UserError(f"{root}: {' and '.join(file.name for file in found)} list images: name the one to train on")
    return found[0] if found else None


def _column(path: Path, headings: Sequence[str], kind: str, wanted: str | None) -> str | None:
    if wanted is not None:
        if wanted not in headings:
            raise UserError(f"{path}: no column {wanted!r}: expected one of {', '.join(headings)} (--{kind}-column)")
        return wanted
    known: Mapping[str, str] = {_plain(heading): heading for heading in reversed(headings)}
    return next((known[name] for name in NAMES[kind] if name in known), None)


def _plain(heading: str) -> str:
    return re.sub(r"[\s_-]", "", heading.lower())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check(path: Path, samples: Sequence[Sample]) -> None:
    """Raise UserError with a line for each missing file, where two are one, or where the classes are no classes."""
    missing = [f"{sample.path}: no such file" for sample in samples if not sample.path.exists()]
    if missing:
        more = [f"and {len(missing) - _SHOWN} more"] if len(missing) > _SHOWN else []
        raise UserError("\n".join([*missing[:_SHOWN], *more]))
    first: dict[Path, Sample] = {}
    for sample in samples:
        if first.setdefault(sample.path.resolve(), sample) is not sample:
            raise UserError(f"{path}: {first[sample.path.resolve()].name} and {sample.name} are one file")
    classes = classes_of(samples)
    if classes and all((path if path.is_dir() else path.parent).joinpath(name).is_file() for name in classes):
        raise UserError(f"{path}: the labels are files such as {classes[0]}: label maps are for a network that segments; leave out --task classify")
    if len(classes) < 2:
        raise UserError(f"{path}: expected two classes or more, got {classes[0] if classes else 'none'}")
