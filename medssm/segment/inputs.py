"""What `medssm predict` is given, as cases with names for their label maps: files, folders with all below them, datalists, lists of paths."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from medssm.errors import UserError
from medssm.files import read_json
from medssm.segment.cases import Case, cases_in, one_of_each_name
from medssm.segment.data import DATASET
from medssm.segment.images import check_slices, ending_of, image_files, is_series, strip_ending

DATALIST, LIST = ".json", ".txt"
_TESTING = ("testing", "test")  # a datalist's sections of images to predict: MONAI's name and the Decathlon's


def cases_of(inputs: Sequence[Path], channels: int, *, out: Path, section: str | None = None) -> list[Case]:
    """The cases to predict. A case's name is the path of its label map in `out`, without the ending.

    Args:
        inputs: images; folders, whose cases are named by their paths below them; datalists (.json); text files (.txt) with a path in each line
        channels: of an image; see `cases.cases_in`
        out: nothing in it is an input, where it lies in a folder of inputs
        section: of a datalist; by default testing or test, or the only one that it has

    Raises:
        UserError: there is no such file, no image, no such section, two cases of one name, or slices of one series.
    """
    if section and not any(path.suffix == DATALIST for path in inputs):
        raise UserError(f"section: expected a datalist ({DATALIST}) as input, got {', '.join(map(str, inputs))}")
    found: dict[Case, None] = {}  # in their order: a case whose channels are named one by one is found again by each of them
    for path in inputs:
        if path.is_dir():
            cases = _below(path, channels, out)
        elif path.suffix in (DATALIST, LIST) and path.is_file():
            listed = _datalist(path, section) if path.suffix == DATALIST else _lines(path)
            cases = [_listed(name, files, channels) for name, files in listed]
        else:
            cases = cases_in(path, channels)
        found |= dict.fromkeys(cases)
    cases = list(found)
    if not cases:
        raise UserError(f"{', '.join(map(str, inputs))}: no image in it")
    check_slices([case.images[0] for case in cases])
    if len({case.name for case in cases}) < len(cases):  # files of one name: by their paths below the folder that all of them share
        folders = [case.images[0].resolve().parent for case in cases]
        common = Path(os.path.commonpath(folders))
        cases = [replace(case, name=_joined(folder.relative_to(common), case)) for case, folder in zip(cases, folders, strict=True)]
    return one_of_each_name(cases)


def _below(root: Path, channels: int, out: Path) -> list[Case]:
    """The cases of a folder and of those below it, named by their paths below `root`."""
    if (root / DATASET).is_file():
        raise UserError(f"{root}: the folder of a data set, with images and labels: name the folder of its images, or its {DATASET}")
    cases: list[Case] = []
    for folder in folders_below(root, {out.resolve()} - {root.resolve()}):
        if is_series(folder):
            cases += [replace(case, name=_joined(folder.relative_to(root).parent, case)) for case in cases_in(folder, channels)]
        elif image_files(folder):
            cases += [replace(case, name=_joined(folder.relative_to(root), case)) for case in cases_in(folder, channels)]
    return cases or cases_in(root, channels)  # which says that there is none


def folders_below(folder: Path, left_out: Set[Path] = frozenset()) -> Iterator[Path]:
    """A folder and those below it, links to folders among them, but no hidden one, none of `left_out`, and none inside of itself."""
    if folder.resolve() in left_out:
        return
    left_out = {*left_out, folder.resolve()}
    yield folder
    try:
        inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error
    for path in inner:
        yield from folders_below(path, left_out)


def _joined(folder: Path, case: Case) -> str:
    return (folder / case.name.rpartition("/")[2]).as_posix()


def references_of(path: Path, section: str | None) -> tuple[dict[str, Path], dict[str, str]]:
    """{case: its label map} and {case: its patient, where that is named} of a section of a datalist, such as train's cases.json.

    Raises UserError where an entry has no label, or two cases have one name.
    """
    labels: dict[str, Path] = {}
    patients: dict[str, str] = {}
    for i, entry in enumerate(_section(path, section)):
        label = entry.get("label") if isinstance(entry, dict) else None
        if not isinstance(label, str):
            raise UserError(f'{path}: [{i}]: expected {{"label": ...}}, got {entry!r}')
        name = str(entry.get("name") or strip_ending(Path(label)))
        if name in labels:
            raise UserError(f"{labels[name]} and {label}: two labels for the case {name}")
        labels[name] = path.parent / label
        if entry.get("patient") is not None:
            patients[name] = str(entry["patient"])
    return labels, patients


def scans_of(images: Path | None, references: Path, section: str | None) -> dict[str, Path]:
    """{case: its scan, the first channel's file}: of a folder or list of images, where NAME_0000 is the scan of NAME; else of a list of references.

    Raises UserError where `images` cannot be read; a datalist that names no images has no scans.
    """
    path = images or references
    listed = path.suffix == DATALIST
    if images is None and not listed:
        return {}
    try:
        cases = cases_of([path], 1, out=path, section=section if listed else None)
    except UserError:
        if images is None:
            return {}
        raise
    return {case.name.removesuffix("_0000"): case.images[0] for case in cases}


def _datalist(path: Path, section: str | None) -> list[tuple[str | None, list[Path]]]:
    """(name, where one is given, files) of each case of a datalist. Paths begin at the datalist's folder."""
    found = []
    for i, entry in enumerate(_section(path, section)):
        table = entry if isinstance(entry, dict) else {"image": entry}
        image: Any = table.get("image", table.get("images"))  # images: as train's cases.json has it
        files: list[Any] = image if isinstance(image, list) else [image]
        if not files or not all(isinstance(file, str) and file for file in files):
            raise UserError(f'{path}: [{i}]: expected a path or {{"image": ...}}, got {entry!r}')
        name = table.get("name")
        if name is not None and (not isinstance(name, str) or Path(name).is_absolute() or {"..", ""} & {*name.split("/")}):
            raise UserError(f"{path}: [{i}]: name: expected the name of a file, got {name!r}")
        found.append((name, [path.parent / file for file in files]))
    return found


def _section(path: Path, section: str | None) -> list[Any]:
    """The entries of a datalist: of a plain list, or of a section of a table."""
    entries: Any = read_json(path)
    if isinstance(entries, dict):
        sections = [name for name, value in entries.items() if isinstance(value, list) and value]
        wanted = [section] if section else [name for name in _TESTING if name in sections] or sections
        if len(wanted) != 1 or wanted[0] not in sections:
            raise UserError(
                f"{path}: expected one section (--section) of {', '.join(sections) or 'cases, got none'}{f', got {section}' * bool(section)}"
            )
        entries = entries[wanted[0]]
    if not isinstance(entries, list):
        raise UserError(f"{path}: expected a list of images, or a table of such lists, got {type(entries).__name__}")
    return entries


def _lines(path: Path) -> list[tuple[None, list[Path]]]:
    """The paths of a text file, one in each line. They begin at the file's folder; empty lines and those that begin with # are left out."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable text file ({error})") from error
    return [(None, [path.parent / line]) for line in lines if line and not line.startswith("#")]


def _listed(name: str | None, files: Sequence[Path], channels: int) -> Case:
    """A case that a list names: all its files, or one of which the rules for a single file say the others."""
    file = files[0]
    if len(files) == 1 and not file.exists():  # nnU-Net's first dataset.json lists NAME.nii.gz for NAME_0000.nii.gz, ...
        first = file.with_name(f"{strip_ending(file)}_0000{ending_of(file)}")
        file = first if first.exists() else file
    case = cases_in(file, channels)[0]
    return replace(case, name=name or case.name, images=tuple(files) if len(files) > 1 else case.images)
