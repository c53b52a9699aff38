"""Image files of every format through one reader and one writer.

    image = open_image(path)          its grid in millimetres, before any voxel is read
    data, image = read_image(paths)   one case: its channels (c, x, y, z)
    data, image = read_label(path)    a label map (x, y, z)
    write_image(path, data, image)    on the grid of `image`, in the format that the name of `path` says

A format is a module here, with the endings of its files, `open_file`, `write`, `check_output` and `made_here`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medssm.errors import UserError
from medssm.segment.images import nifti
from medssm.segment.images.image import Image as Image
from medssm.segment.images.image import aligned as aligned
from medssm.segment.images.image import different_grid as different_grid
from medssm.segment.images.image import far_apart as far_apart
from medssm.segment.images.image import lengths as lengths
from medssm.segment.images.image import ras_grid as ras_grid
from medssm.segment.images.image import say as say

_FORMATS = (nifti,)
ENDINGS = tuple(ending for module in _FORMATS for ending in module.ENDINGS)


def open_image(path: Path) -> Image:
    """The image at `path`, with its header checked and its voxels not yet read. Raises UserError that says what is wrong with the file."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.is_dir():
        raise UserError(f"{path}: expected an image file, got a folder")
    module = _format(path)
    if module is None:
        raise UserError(f"{path}: no format that is read ({', '.join(ENDINGS)})")
    return module.open_file(path)


def read_image(paths: Sequence[Path], channels: int | None = None, nan: float | None = None) -> tuple[np.ndarray, Image]:
    """One case's channels as float32 (c, x, y, z), and the first file, whose grid they lie on. A plane (x, y) becomes (c, x, y, 1).

    Args:
        paths: a file for each channel, or a single file with all of them
        channels: the number of channels that is expected; None takes any
        nan: what takes the place of voxels that are not finite; None refuses them

    Raises:
        UserError: a file cannot be read, lies on another grid, has another number of channels, or holds NaN or infinite voxels.
    """
    first, *others = [open_image(path) for path in paths]
    files = [first, *(aligned(other, first) for other in others)]
    for file in files if others else ():
        if file.channels > 1:
            raise UserError(f"{file.path}: expected 1 channel beside the other channels' files, got {file.channels}")
    found = sum(file.channels for file in files)
    if channels is not None and found != channels:
        raise UserError(f"{first.path}: expected {channels} channel(s), got {found}")
    data = files[0].voxels(np.float32) if not others else np.concatenate([file.voxels(np.float32) for file in files])
    bad = int(data.size - np.isfinite(data).sum())
    if bad and nan is None:
        raise UserError(not_finite(first.path, bad))
    if bad:
        data[~np.isfinite(data)] = nan
    return data, first


def not_finite(path: Path, count: int) -> str:
    """The line about a file with `count` voxels that are NaN or infinite."""
    return f"{path}: {count} voxel(s) are not finite (NaN or infinite): --nan VALUE puts a number in their place"


def read_label(path: Path, like: Image | None = None) -> tuple[np.ndarray, Image]:
    """A label map as integers (x, y, z), with the axes of `like` where that is given.

    Raises UserError if it cannot be read, its values are no integers, or its voxels do not lie where those of `like` lie.
    """
    image = open_image(path)
    if like is not None:
        image = aligned(image, like)
    data = image.voxels(labels=True)
    if len(data) > 1:
        raise UserError(f"{path}: expected one label map, got {len(data)} channels")
    if data.dtype.kind in "iub":
        return data[0], image
    rounded = np.rint(data)
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(data - rounded) <= 1e-3)  # integers stored with a scale have rounding errors
    if wrong.any():
        raise UserError(f"{path}: expected integers as labels, got values such as {data[wrong][0]:g}")
    return rounded[0].astype(np.int32), image


def write_image(path: Path, data: np.ndarray, like: Image) -> None:
    """Write `data` (x, y, z), or (x, y, z, c) as NIfTI, on the grid of `like`. Nothing but the grid is copied from `like`.

    Raises UserError if the format that the name says cannot hold it, or the file cannot be written; nothing half written is left.
    """
    check_output(path, like)
    module = _format(path)
    assert module is not None
    module.write(path, data, like)


def check_output(path: Path, like: Image) -> None:
    """UserError where a label map on the grid of `like` cannot be written in the format that the name of `path` says."""
    module = _format(path)
    if module is None:
        raise UserError(f"{path}: no format that is written ({', '.join(ENDINGS)})")
    module.check_output(path, like)


def is_made_here(path: Path) -> bool:
    """Whether `write_image` wrote the file."""
    module = _format(path)
    with contextlib.suppress(UserError):
        return module is not None and module.made_here(path)
    return False


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder, by name. Hidden ones are left out: a name with a leading dot is a file that is still being written.

    Raises UserError if the folder cannot be read.
    """
    try:
        return sorted(file for file in folder.iterdir() if ending_of(file) and not file.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error


def ending_of(path: Path) -> str:
    """The part of a file's name that says its format, as it stands there: .nii.gz, .png, ...; empty for other files."""
    name = Path(path).name
    return next((name[-len(ending) :] for ending in ENDINGS if name.lower().endswith(ending)), "")


def strip_ending(path: Path) -> str:
    """The file's name without .nii.gz, .png, ..."""
    return Path(path).name.removesuffix(ending_of(path))


def _format(path: Path):
    """The module of the format that a file's name says, or None."""
    ending = ending_of(path).lower()
    return next((module for module in _FORMATS if ending in module.ENDINGS), None)
