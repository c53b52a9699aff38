"""Cases: the files of an image with its label map, found by nnU-Net's names, and names that no two cases share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from medssm.errors import UserError
from medssm.segment.images import PICTURE_ENDINGS, ending_of, image_files, is_series, open_image, ras_grid, strip_ending

_CHANNEL = re.compile(r"(.+)_(\d{4})")  # nnU-Net's channel files end in _0000, _0001, ...


@dataclass(frozen=True)
class Case:
    """One image (a file for each channel, or one file), its label map if it has one, and its fold and patient where they are given."""

    name: str
    images: tuple[Path, ...]
    label: Path | None = None
    fold: int | str | None = None  # a datalist's number, or "validation" for its validation section
    patient: str | None = None
    grid: tuple[np.ndarray, np.ndarray] | None = field(default=None, compare=False)  # what `ras` gives, once the header is read

    @property
    def label_file(self) -> Path:
        """The label map of a case of a data set: each of them has one."""
        if self.label is None:
            raise ValueError(f"{self.name}: expected a case with a label map")
        return self.label

    @property
    def ras(self) -> tuple[np.ndarray, np.ndarray]:
        """The image's spacing in millimetres and its shape along the RAS axes. UserError where its header has to be read and cannot be."""
        return self.grid or ras_grid(open_image(self.images[0]))


def cases_in(path: Path | str, channels: int) -> list[Case]:
    """The cases to predict: those of a folder (see `grouped`); the folder itself, where it holds a DICOM series; or the file itself, with the other
    channels beside it if the network takes several.

    Raises UserError if there is no such path, no image in the folder, DICOM beside other images, or two files that would give one label map.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir():
        files, series = image_files(path), is_series(path)
        if files and series:
            raise UserError(f"{path}: a DICOM series, and {files[0].name} beside it: name one of them, or give each a folder of its own")
        if series:
            return [Case(path.resolve().name, (path,))]
        if not files:
            raise UserError(f"{path}: no image in this folder")
        return grouped(files, channels)
    name, number = _channel(path)
    if number is None or number >= channels or _has_all_channels(path, channels):
        return [Case(strip_ending(path), (path,))]
    return [Case(name, _channel_files(path, name, channels))]  # one that is missing is named when the case is read


def refuse(line: str) -> None:
    """Raise UserError with this line: what a function does with a fault that it could go on after."""
    raise UserError(line)


def grouped(files: Iterable[Path], channels: int, complain: Callable[[str], None] = refuse) -> list[Case]:
    """Files as cases: NAME_0000, NAME_0001, … are the channels of NAME where all of them are there; every other file is a case of its own.

    Args:
        files: of one folder
        channels: of an image
        complain: gets the line about a channel too many, which is then left out

    Raises:
        UserError: two files have one name.
    """
    files = list(files)
    named = Counter(_channel(file)[0] for file in files)
    parts: dict[tuple[str, str], dict[int, Path]] = {}  # by the name and the ending
    cases = []
    for file in files:
        name, number = _channel(file)
        if number is None:
            cases.append(Case(name, (file,)))
        elif _has_all_channels(file, channels):
            nnunets = number == 0 and named[name] == 1 and ending_of(file).lower() in PICTURE_ENDINGS  # its name for a picture in colour
            cases.append(Case(name if nnunets else strip_ending(file), (file,)))
        else:
            parts.setdefault((name, ending_of(file)), {})[number] = file
    for (name, _), found in parts.items():
        wanted = set(range(channels))
        if wanted <= found.keys():
            surplus = sorted(found.keys() - wanted)
            if surplus:
                complain(
                    f"{found[surplus[0]]}: expected {channels} channel(s) as of {found[0].name}, got one more. "
                    "If these files are images of their own, rename them: an ending such as _0000 is a channel"
                )
            cases.append(Case(name, tuple(found[i] for i in range(channels))))
        elif channels > 1 and wanted & found.keys():
            cases.append(Case(name, _channel_files(next(iter(found.values())), name, channels)))  # one is missing: its own line says so
        else:
            cases += [Case(strip_ending(file), (file,)) for file in found.values()]
    return one_of_each_name(sorted(cases, key=lambda case: case.name))


def one_of_each_name(cases: Sequence[Case]) -> list[Case]:
    """The cases; UserError that names both files where two cases have one name."""
    first: dict[str, Case] = {}
    for case in cases:
        other = first.setdefault(case.name, case)
        if other is not case:
            raise UserError(f"{case.images[0]} and {other.images[0]}: two files for the case {case.name}")
    return list(cases)


def distinct(cases: Sequence[Case]) -> list[Case]:
    """The cases with distinct names. Equal file names (site_a/sub-01/seg.nii.gz, site_b/sub-01/seg.nii.gz) get as many of their folders' names as
    tell them apart.

    Raises UserError where one label map is listed twice.
    """
    labels: dict[Path, str] = {}
    for case in cases:
        place = case.label_file.resolve()
        if place in labels:
            raise UserError(f"{case.label}: listed twice, as a case and as another one")
        labels[place] = case.name
    names = [case.name for case in cases]
    for depth in range(2, max((len(case.label_file.parts) for case in cases), default=0)):
        again = {name for name in names if names.count(name) > 1}
        if not again:
            break
        names = [
            "_".join((*case.label_file.parts[-1 - depth : -1], case.name)) if name in again else name for name, case in zip(names, cases, strict=True)
        ]
    return [replace(case, name=name) for case, name in zip(cases, names, strict=True)]


def _channel(file: Path) -> tuple[str, int | None]:
    """The name without its channel's number, and the number."""
    stem = strip_ending(file)
    match = _CHANNEL.fullmatch(stem)
    return (match[1], int(match[2])) if match else (stem, None)


def _channel_files(beside: Path, name: str, channels: int) -> tuple[Path, ...]:
    return tuple(beside.with_name(f"{name}_{i:04d}{ending_of(beside)}") for i in range(channels))


def _has_all_channels(file: Path, channels: int) -> bool:
    """Whether a file has the image's several channels: its ending is then no channel's number."""
    if channels == 1:
        return False
    try:
        return open_image(file).channels == channels
    except UserError:
        return False
