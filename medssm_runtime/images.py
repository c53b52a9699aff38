"""Images to classify: which files they are, and one read as channels with its grid: NIfTI by nibabel, PNG and JPEG by Pillow."""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssm_runtime import scans
from medssm_runtime.errors import UserError, first_line

PICTURES = (".png", ".jpg", ".jpeg")
ENDINGS = (*scans.ENDINGS, *PICTURES)
_OTHER = (".nii.zst", ".nrrd", ".nhdr", ".mha", ".mhd", ".tif", ".tiff", ".dcm")  # medssm predict reads them
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # a picture's columns go to the left, its rows to the back
_MODES = {"1": 1, "L": 1, "I;16": 1, "I": 1, "LA": 1, "RGB": 3, "RGBA": 3}  # Pillow's, with the channels that are not alpha


def images_of(paths: Sequence[Path]) -> list[Path]:
    """The images of files and folders, with the folders below these, each once. UserError for what is not there, or where there is none."""
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        for file in _below(path) if path.is_dir() else [path]:
            found.setdefault(file.resolve(), file)
    if not found:
        raise UserError(f"{', '.join(map(str, paths))}: no image in it ({', '.join(ENDINGS)})")
    return list(found.values())


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """An image's channels (c, x, y, z) in float32, and the affine in millimetres; a plane has one voxel along z.

    Raises UserError for a file that cannot be read, or holds voxels that are not finite or all equal.
    """
    if path.name.lower().endswith(scans.ENDINGS):
        return scans.read(scans.Case(path.name, (path,)), None)[:2]
    if not path.name.lower().endswith(PICTURES):
        raise UserError(f"{path}: expected an image ({', '.join(ENDINGS)}); medssm predict reads other formats and lists")
    data = _picture(path)
    scans.check_values(data, path)
    return data, _LPS @ np.diag([*_spacing(path), 1.0])


def _below(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """The images of a folder, also those that are refused when they are read, then those of the folders in it."""
    if folder.resolve() in above:  # a link to a folder that holds it
        return
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    yield from (path for path in inside if path.is_file() and path.name.lower().endswith((*ENDINGS, *_OTHER)))
    for inner in inside:
        if inner.is_dir():
            yield from _below(inner, above | {folder.resolve()})


def _picture(path: Path) -> np.ndarray:
    """Grey values (1, x, y, 1), or red, green and blue (3, x, y, 1), without alpha, turned as EXIF says."""
    pillow, upright = _pillow(path, "PIL.Image"), _pillow(path, "PIL.ImageOps").exif_transpose
    try:
        with pillow.open(path, formats=("PNG", "JPEG")) as file:
            mode, frames = file.mode, getattr(file, "n_frames", 1)
            palette = mode in ("P", "PA")
            channels = _MODES.get(mode, 0)
            whole = upright(file)
            if palette:
                colours = np.array(file.getpalette("RGB")).reshape(-1, 3)
                channels = 1 if (colours == colours[:, :1]).all() else 3
                whole = whole.convert("L" if channels == 1 else "RGB")
            data = np.asarray(whole)
    except Exception as error:  # Pillow raises what its parsers raise: OSError, SyntaxError, struct.error, DecompressionBombError, ...
        raise UserError(f"{path}: not a readable picture ({first_line(error)})") from error
    if frames > 1:
        raise UserError(f"{path}: expected one picture, got {frames}")
    if not channels:
        raise UserError(f"{path}: expected grey values or red, green and blue, got colours of the kind {mode}")
    if mode in ("RGB", "RGBA", "LA") and _depth(path) == 16:  # Pillow leaves out half of the bits
        raise UserError(f"{path}: colours of 16 bit are not read here; medssm predict reads them")
    found = data.reshape(*data.shape[:2], -1)[:, :, :channels]
    return np.ascontiguousarray(found.transpose(2, 1, 0)[..., None], np.float32)


def _pillow(path: Path, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: needs the package pillow: pip install pillow") from error


def _depth(path: Path) -> int:
    """The bits of a PNG's sample; 8 for another file."""
    with open(path, "rb") as file:
        begin = file.read(25)
    return begin[24] if begin[:4] == b"\x89PNG" and len(begin) == 25 else 8


def _spacing(path: Path) -> tuple[float, float, float]:
    """(x, y, z) in millimetres from NAME.json beside a picture, {"spacing": [z, y, x]}, with or without the channel's number; else 1."""
    for stem in dict.fromkeys((path.stem, re.sub(r"_\d{4}$", "", path.stem))):
        file = path.with_name(f"{stem}.json")
        try:
            table = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: not readable JSON ({first_line(error)})") from error
        if isinstance(table, dict) and "spacing" in table:
            found = table["spacing"]
            if not isinstance(found, list) or len(found) not in (2, 3) or not all(isinstance(v, (int, float)) and 0 < v < math.inf for v in found):
                raise UserError(f"{file}: spacing: expected 2 or 3 lengths in millimetres, z y x, got {found!r}")
            x, y, z = (*map(float, reversed(found)), 1.0)[:3]
            return x, y, z
    return 1.0, 1.0, 1.0
