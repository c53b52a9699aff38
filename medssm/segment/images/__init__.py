"""Image files of every format through one reader and one writer.

    image = open_image(path)          its grid in millimetres, before any voxel is read
    data, image = read_image(paths)   one case: its channels (c, x, y, z)
    data, image = read_label(path)    a label map (x, y, z)
    write_image(path, data, image)    on the grid of `image`, in the format that the name of `path` says

A format is a module here, with the endings of its files, `open_file`, `beside`, `write`, `check_output` and `made_here`. The packages of the
extra `io` are imported when they are needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from medssm.errors import UserError
from medssm.segment.images import dicom, dicom_seg, formats, itk, nifti, pictures
from medssm.segment.images.image import PICTURES as PICTURES
from medssm.segment.images.image import Image as Image
from medssm.segment.images.image import Voxels as Voxels
from medssm.segment.images.image import aligned as aligned
from medssm.segment.images.image import different_grid as different_grid
from medssm.segment.images.image import far_apart as far_apart
from medssm.segment.images.image import lengths as lengths
from medssm.segment.images.image import ras_grid as ras_grid
from medssm.segment.images.image import say as say

_FORMATS = (nifti, itk, pictures, dicom_seg)
PICTURE_ENDINGS = pictures.ENDINGS
OUTPUTS = {"nifti": ".nii.gz", "nrrd": ".nrrd", "mha": ".mha", "png": ".png", "tiff": ".tif", "dicom-seg": ".dcm"}
_LIKE = {".nhdr": ".nrrd", ".mhd": ".mha", ".jpg": ".png", ".jpeg": ".png", ".tiff": ".tif"} | dict.fromkeys(
    (".nii", ".nii.zst", ".dcm", ""), ".nii.gz"
)
ENDINGS = tuple(ending for module in _FORMATS for ending in module.ENDINGS)


def open_image(path: Path) -> Image:
    """The image at `path`, with its header checked and its voxels not yet read. Raises UserError that says what is wrong with the file."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.is_dir():
        return dicom.open_folder(path)
    module = _format(path) or (dicom_seg if dicom.is_dicom(path) else None)
    if module is None:
        raise UserError(f"{path}: no format that is read{_content(path)} ({', '.join(ENDINGS)}, or a folder of DICOM)")
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
    files = open_channels(paths, channels)
    data = files[0].voxels(np.float32) if len(files) == 1 else np.concatenate([file.voxels(np.float32) for file in files])
    bad = int(data.size - np.isfinite(data).sum())
    if bad and nan is None:
        raise UserError(not_finite(files[0].path, bad))
    if bad:
        data[~np.isfinite(data)] = nan
    return data, files[0]


def open_channels(paths: Sequence[Path], channels: int | None = None) -> list[Image]:
    """One case's files as `read_image` takes them, with the axes of the first one. Raises UserError as `read_image`, where no voxel says why."""
    first, *others = [open_image(path) for path in paths]
    files = [first, *(aligned(other, first) for other in others)]
    for file in files if others else ():
        if file.channels > 1:
            raise UserError(f"{file.path}: expected 1 channel beside the other channels' files, got {file.channels}")
    found = sum(file.channels for file in files)
    if channels is not None and found != channels:
        raise UserError(f"{first.path}: expected {channels} channel(s), got {found}")
    return files


def check_nan(nan: float | None) -> None:
    """UserError for a number that cannot take the place of voxels that are not finite, as it is not finite itself."""
    if nan is not None and not np.isfinite(nan):
        raise UserError(f"nan: expected a finite number, got {nan}")


def not_finite(path: Path, count: int) -> str:
    """The line about a file with `count` voxels that are NaN or infinite."""
    return f"{path}: {count} voxel(s) are not finite (NaN or infinite): --nan VALUE puts a number in their place"


def open_label(path: Path) -> Image:
    """`open_image` for a label map. Raises UserError for JPEG too."""
    image = open_image(path)
    if image.format == "JPEG":
        raise UserError(f"{path}: JPEG changes values, so a label map in it cannot be trusted: save it as PNG, from its source")
    return image


def read_label(path: Path, like: Image | None = None) -> tuple[np.ndarray, Image]:
    """A label map as integers (x, y, z), with the axes of `like` where that is given.

    Raises UserError if it cannot be read, its values are no integers, or its voxels do not lie where those of `like` lie.
    """
    image = open_label(path)
    if like is not None:
        image = aligned(image, like)
    data = image.voxels(labels=True)
    if len(data) > 1:
        raise UserError(f"{path}: expected one label map, got {len(data)} channels")
    if data.dtype.kind in "iub":
        return data[0], image
    rounded = np.rint(data)
    with np.errstate(invalid="ignore"):
        wrong = ~((np.abs(data - rounded) <= 1e-3) & (np.abs(rounded) < 2**31))  # integers stored with a scale have rounding errors
    if wrong.any():
        raise UserError(f"{path}: expected integers as labels, got values such as {data[wrong][0]:g}")
    return rounded[0].astype(np.int32), image


def write_image(path: Path, data: Voxels, like: Image, classes: Mapping[str, int] | None = None) -> None:
    """Write a label map (x, y, z) on the grid of `like`. No description of `like` is copied; `dicom_seg` says what DICOM-SEG demands.

    Args:
        path: its ending says the format
        data: the label map; NIfTI is written part after part, the other formats as a whole
        like: the image that it belongs to
        classes: {name: value}, for a format that keeps names (default: the values are the names)

    Raises UserError if the format that the name says cannot hold it, or the file cannot be written; nothing half written is left.
    """
    check_output(path, like)
    module = _format(path)
    assert module is not None
    data = data if module is nifti else np.asarray(data)
    module.write(path, data, like, {str(value): value for value in np.unique(np.asarray(data)).tolist()} if classes is None else classes)


def check_output(path: Path, like: Image) -> None:
    """UserError where a label map on the grid of `like` cannot be written in the format that the name of `path` says."""
    module = _format(path)
    if module is None:
        raise UserError(f"{path}: no format that is written ({', '.join(ENDINGS)})")
    if ending_of(path) != ending_of(path).lower():  # libraries write other names for some of these, or two files
        raise UserError(f"{path}: expected an ending in small letters, {ending_of(path).lower()}")
    module.check_output(path, like)


def is_made_here(path: Path) -> bool:
    """Whether `write_image` wrote the file."""
    module = _format(path)
    with contextlib.suppress(UserError):
        return module is not None and module.made_here(path)
    return False


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder, by name, without DICOM, of which the folder is the image.

    Hidden ones are left out: a name with a leading dot is a file that is still being written.

    Raises UserError if the folder cannot be read.
    """
    return [file for file in _visible(folder) if ending_of(file).lower() not in ("", *dicom_seg.ENDINGS)]


def is_series(folder: Path) -> bool:
    """Whether a folder holds DICOM files, so that it is itself an image. UserError if it cannot be read."""
    for file in _visible(folder):
        if ending_of(file).lower() in ("", *dicom_seg.ENDINGS) and file.is_file():
            with contextlib.suppress(UserError):  # of a file that cannot be read and may be anything
                if dicom.is_dicom(file):
                    return True
    return False


def check_slices(paths: Sequence[Path]) -> None:
    """UserError where several files are slices of one DICOM series: they are one image, which is their folder."""
    first: dict[str, Path] = {}
    for path in paths:
        series = None
        if ending_of(path).lower() in ("", *dicom_seg.ENDINGS) and path.is_file():
            with contextlib.suppress(UserError):  # a file that cannot be read has its own line, when its turn comes
                series = dicom.series_of_slice(path)
        other = first.setdefault(series, path) if series else path
        if other is not path:
            raise UserError(f"{path} and {other}: slices of one DICOM series: name their folder, which is one image")


def files_of(path: Path) -> list[Path]:
    """The files that an image is read from: itself with what belongs to it, or all that is in the folder of a series."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    return [path, *(_format(path) or nifti).beside(path)]


def output_ending(image: Path, format: str | None = None) -> str:
    """The ending of the label map of an image: of `format`, a key of OUTPUTS, or by default of the image's own kind."""
    return OUTPUTS[format] if format else _LIKE.get(ending_of(image).lower(), ending_of(image).lower())


def label_files(folder: Path) -> list[Path]:
    """`image_files` and DICOM files: each DICOM-SEG is a label map of its own."""
    return [file for file in _visible(folder) if ending_of(file)]


def ending_of(path: Path) -> str:
    """The part of a file's name that says its format, as it stands there: .nii.gz, .png, ...; empty for other files."""
    name = Path(path).name
    return next((name[-len(ending) :] for ending in ENDINGS if name.lower().endswith(ending)), "")


def strip_ending(path: Path) -> str:
    """The file's name without .nii.gz, .png, ..."""
    return Path(path).name.removesuffix(ending_of(path))


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.iterdir() if not file.name.startswith(".") and file.name != "DICOMDIR")
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error


def _content(path: Path) -> str:
    """What a file is, for a message."""
    try:
        found = formats.layers(path)[-1]
    except OSError:
        return ""
    return f": its content is {found}" if found else ""


def _format(path: Path):
    """The module of the format that a file's name says, or None."""
    ending = ending_of(path).lower()
    return next((module for module in _FORMATS if ending in module.ENDINGS), None)
