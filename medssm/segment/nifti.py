"""NIfTI files: read with one clear line for whatever is wrong with them, and written in the geometry of another one."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from medssm import __version__
from medssm.errors import UserError
from medssm.files import atomic, first_line
from medssm.segment import formats

logger = logging.getLogger("medssm")

NIFTI_ENDINGS = (".nii.gz", ".nii")
_MILLIMETRES = {1: 1000.0, 2: 1.0, 3: 0.001}  # of a header's units of length: metre, millimetre, micron
_APART = 50  # times: cases whose spacings differ by more were not measured in one unit
_MADE_BY = f"medssm {__version__}".encode()  # in the header of each file that is written


def open_nifti(path: Path) -> nib.Nifti1Image:
    """The NIfTI file at `path`, with its header checked and its voxels not yet read.

    Raises UserError if it is missing, is no NIfTI file, or has another number of axes, other voxels or another affine than an image has.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file" if not path.exists() else f"{path}: expected a NIfTI file, got a folder")
    try:
        image = nib.load(path)
    except Exception as error:  # nibabel raises what its readers raise: ImageFileError, EOFError, zlib.error, HeaderDataError
        image = _misnamed(path, error)
    if not isinstance(image, (nib.Nifti1Image, nib.Nifti2Image)):
        raise UserError(f"{path}: expected a NIfTI file, got {type(image).__name__}")
    if image.ndim not in (2, 3, 4) or 0 in image.shape:
        raise UserError(f"{path}: expected 2 or 3 axes, or 4 with the channels last, got the shape {image.shape}")
    if image.get_data_dtype().kind not in "iufb":
        raise UserError(f"{path}: expected numbers, got voxels of the type {image.get_data_dtype()}")
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(affine_mm(image)[:3, :3])) < 1e-12:
        raise UserError(f"{path}: the affine cannot be inverted: {np.round(image.affine[:3, :3], 4).tolist()}")
    return image


def _misnamed(path: Path, error: Exception) -> nib.Nifti1Image:
    """A NIfTI file whose name does not fit its compression: .nii of a compressed one, .nii.gz of a plain one or one that was compressed twice.

    Raises UserError that says what the file is.
    """
    try:
        found = formats.layers(path)
        if found[-1] == formats.NIFTI and path.name.endswith(NIFTI_ENDINGS):
            logger.warning("%s: read as %s, which its name does not say", path, " in ".join(reversed([name or "unknown" for name in found])))
            data = formats.unpacked(path)
            kind = nib.Nifti2Image if data[4:8] == b"n+2\0" else nib.Nifti1Image
            return kind.from_bytes(data)
    except (OSError, EOFError, nib.spatialimages.HeaderDataError) as other:
        error = other
        found = []
    what = f": its content is {found[-1]}" if found and found[-1] not in (None, formats.NIFTI, formats.GZIP) else ""
    raise UserError(f"{path}: not a readable NIfTI file{what} ({first_line(error)})") from error


def read_image(paths: Sequence[Path], channels: int | None = None, nan: float | None = None) -> tuple[np.ndarray, nib.Nifti1Image]:
    """One case's channels as float32 (c, x, y, z), and the first file's NIfTI for its geometry. A plane (x, y) becomes (c, x, y, 1).

    Args:
        paths: a file for each channel, or a single file with the channels on a fourth axis
        channels: the number of channels that is expected; None takes any
        nan: what takes the place of voxels that are not finite; None refuses them

    Raises:
        UserError: a file cannot be read, lies on another grid, has another number of channels, or holds NaN or infinite voxels.
    """
    images = [open_nifti(path) for path in paths]
    first = images[0]
    for path, image in zip(paths[1:], images[1:], strict=True):
        difference = different_grid(image, first)
        if difference:
            raise UserError(f"{path}: not on the grid of {paths[0]}: {difference}")
    if first.ndim == 4 and len(images) > 1:
        raise UserError(f"{paths[0]}: expected 3 axes beside the other channels' files, got the shape {first.shape}")
    data = np.stack([_voxels(path, image, np.float32) for path, image in zip(paths, images, strict=True)])
    if first.ndim == 4:
        data = np.ascontiguousarray(np.moveaxis(data[0], -1, 0))
    if channels is not None and len(data) != channels:
        raise UserError(f"{paths[0]}: expected {channels} channel(s), got {len(data)}")
    bad = int(data.size - np.isfinite(data).sum())
    if bad and nan is None:
        raise UserError(not_finite(paths[0], bad))
    if bad:
        data[~np.isfinite(data)] = nan
    return data.reshape(len(data), *volume_shape(first)), first


def not_finite(path: Path, count: int) -> str:
    """The line about a file with `count` voxels that are NaN or infinite."""
    return f"{path}: {count} voxel(s) are not finite (NaN or infinite): --nan VALUE puts a number in their place"


def read_label(path: Path) -> tuple[np.ndarray, nib.Nifti1Image]:
    """A label map as integers (x, y, z), and its NIfTI. Raises UserError if it cannot be read or its values are no integers."""
    image = open_nifti(path)
    if image.ndim == 4 and image.shape[3] != 1:
        raise UserError(f"{path}: expected one label map, got the shape {image.shape}")
    data = _voxels(path, image, None).reshape(volume_shape(image))
    if data.dtype.kind in "iub":
        return data, image
    rounded = np.rint(data)
    if not np.isfinite(data).all() or np.abs(data - rounded).max() > 1e-3:  # integers stored with a scale have rounding errors
        raise UserError(f"{path}: expected integers as labels, got values such as {_odd_value(data, rounded):g}")
    return rounded.astype(np.int32), image


def volume_shape(image: nib.Nifti1Image) -> tuple[int, int, int]:
    """(x, y, z), with z 1 for a plane and the channels left out."""
    x, y, z = (*image.shape, 1)[:3]
    return x, y, z


def affine_mm(image: nib.Nifti1Image) -> np.ndarray:
    """The affine (4, 4) in millimetres, whatever the file's unit of length: what every command reads a file's geometry by.

    A header that names no unit, or one that NIfTI does not have, means millimetres.
    """
    unit = int(image.header["xyzt_units"]) & 7
    affine = np.array(image.affine, float)
    affine[:3] *= _MILLIMETRES.get(unit, 1.0)
    return affine


def spacing_mm(image: nib.Nifti1Image) -> np.ndarray:
    """A voxel's edges in millimetres, (3,), whatever the file's unit of length."""
    edges: np.ndarray = np.linalg.norm(affine_mm(image)[:3, :3], axis=0)
    return edges


def ras_grid(file: nib.Nifti1Image) -> tuple[np.ndarray, np.ndarray]:
    """A file's spacing in millimetres and its shape along the RAS axes, from its header."""
    orientation = nib.io_orientation(affine_mm(file))  # entry i: which RAS axis the file's axis i runs along
    order = np.argsort(orientation[:, 0])
    return spacing_mm(file)[order], np.array(volume_shape(file))[order]


def lengths(edges: np.ndarray) -> str:
    """Lengths for a message: "1 x 1 x 2.5"."""
    return " x ".join(f"{edge:.3g}" for edge in edges)


def far_apart(edges: np.ndarray, others: np.ndarray) -> bool:
    """Whether two spacings differ, along every axis, by more than two images of one kind do: they were not measured in one unit of length."""
    return bool((edges > _APART * others).all() or (others > _APART * edges).all())


def different_grid(image: nib.Nifti1Image, other: nib.Nifti1Image) -> str | None:
    """Why two images do not lie on the same grid, or None if they do: the same shape, and each corner within a tenth of a voxel."""
    shape, wanted = volume_shape(image), volume_shape(other)
    if shape != wanted:
        return f"shape {shape}, expected {wanted}"
    corners = np.array([[*(np.array(corner) * (np.array(shape) - 1)), 1] for corner in np.ndindex(2, 2, 2)], float)
    apart = np.linalg.norm((corners @ (affine_mm(image) - affine_mm(other)).T)[:, :3], axis=1).max()
    smallest = spacing_mm(other).min()
    if apart > 0.1 * smallest:
        return f"the affine puts a corner {apart:.3g} mm away (at most {0.1 * smallest:.3g} mm)"
    return None


def write_nifti(path: Path, data: np.ndarray, like: nib.Nifti1Image) -> None:
    """Write `data` (x, y, z) or (x, y, z, c) with the geometry, the codes and the units of `like`. If `like` is a plane, a plane is written.

    Raises UserError if the file cannot be written; nothing half written is left.
    """
    header = like.header.copy()
    if like.ndim == 2:
        data = data.reshape(like.shape) if data.ndim == 3 else data
    header.set_data_dtype(data.dtype)
    header.set_data_shape(data.shape)
    header.set_slope_inter(1, 0)
    header.set_intent("none")
    header["descrip"] = _MADE_BY
    header["cal_min"] = header["cal_max"] = 0
    with atomic(path) as temporary:
        nib.save(type(like)(data, like.affine, header), temporary)


def is_made_here(path: Path) -> bool:
    """Whether a NIfTI file was written by `write_nifti`."""
    try:
        return bytes(open_nifti(path).header["descrip"]).startswith(b"medssm ")
    except UserError:
        return False


def strip_ending(path: Path) -> str:
    """The file's name without .nii or .nii.gz."""
    name = Path(path).name
    return next((name[: -len(ending)] for ending in NIFTI_ENDINGS if name.endswith(ending)), name)


def _voxels(path: Path, image: nib.Nifti1Image, dtype: type | None) -> np.ndarray:
    try:
        return np.asarray(image.dataobj, dtype=dtype)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: truncated or corrupt ({first_line(error)})") from error


def _odd_value(data: np.ndarray, rounded: np.ndarray) -> float:
    return float(data.flat[np.argmax(~np.isfinite(data) | (np.abs(data - rounded) > 1e-3))])
