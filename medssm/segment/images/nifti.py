"""NIfTI files, plain or compressed: read with one clear line for whatever is wrong with them, and written."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import DTypeLike

from medssm.errors import UserError
from medssm.files import atomic, write_bytes
from medssm.segment.images import formats
from medssm.segment.images.image import MADE_BY, Image, needed, quiet_libraries, reason

logger = logging.getLogger("medssm")

ENDINGS = (".nii.gz", ".nii.zst", ".nii")
_MILLIMETRES = {1: 1000.0, 2: 1.0, 3: 0.001}  # of a header's units of length: metre, millimetre, micron
_COLOURS = {("R", "G", "B"), ("R", "G", "B", "A")}  # names of the fields of NIfTI's RGB24 and RGBA32


def open_file(path: Path) -> Image:
    """The NIfTI file at `path`, with its header checked and its voxels not yet read.

    Raises UserError if it is no NIfTI file, or has another number of axes, other voxels or another affine than an image has.
    """
    try:
        with quiet_libraries():
            file = _unpacked(path) if path.name.lower().endswith(".zst") else nib.load(path)
    except UserError:
        raise
    except Exception as error:  # nibabel raises what its readers raise: ImageFileError, EOFError, zlib.error, HeaderDataError
        file = _misnamed(path, error)
    if not isinstance(file, (nib.Nifti1Image, nib.Nifti2Image)):
        raise UserError(f"{path}: expected a NIfTI file, got {type(file).__name__}")
    return record(file, path)


def record(file: nib.Nifti1Image, path: Path | None = None) -> Image:
    """nibabel's image as ours. Raises UserError if it has another number of axes, other voxels or another affine than an image has."""
    path = path or Path(file.get_filename() or "image")
    dtype = file.get_data_dtype()
    colours = dtype.names if dtype.names in _COLOURS else None
    if file.ndim not in (2, 3, 4, 5) or min(file.shape) < 1 or (file.ndim == 5 and (file.shape[3] != 1 or colours)) or (file.ndim == 4 and colours):
        raise UserError(f"{path}: expected 2 or 3 axes, or 4 with the channels last (5 with one time), got the shape {file.shape}")
    if dtype.kind not in "iufb" and not colours:
        raise UserError(f"{path}: expected numbers, got voxels of the type {dtype}")
    x, y, z = (*file.shape, 1)[:3]
    channels = 3 if colours else math.prod(file.shape[3:])

    def load(wanted: DTypeLike | None) -> np.ndarray:
        if colours:
            data = np.asarray(file.dataobj)
            return np.stack([data[name].reshape(x, y, z) for name in "RGB"])
        data = np.asarray(file.dataobj, dtype=wanted).reshape(x, y, z, channels)
        return np.ascontiguousarray(np.moveaxis(data, -1, 0))

    notes = ("the alpha channel is left out",) if colours and "A" in colours else ()
    return Image(path, "NIfTI", (x, y, z), _affine_mm(file), load, channels, notes=notes, own=file)


def write(path: Path, data: np.ndarray, like: Image, classes: Mapping[str, int] | None = None) -> None:
    """Write `data` (x, y, z) or (x, y, z, c) on the grid of `like`; of a NIfTI also with its codes and units. If that is a plane, a plane is written.

    No description and no extension of `like` is copied. Raises UserError if the file cannot be written; nothing half written is left.
    """
    file = like.own if like.format == "NIfTI" else None
    if file is None:
        image = nib.Nifti1Image(data, like.affine, dtype=data.dtype)
        image.header.set_xyzt_units("mm")
        image.header["descrip"] = MADE_BY.encode()
    else:
        header = file.header.copy()
        if file.ndim == 2:
            data = data.reshape(file.shape) if data.ndim == 3 else data
        header.set_data_dtype(data.dtype)
        header.set_data_shape(data.shape)
        header.set_slope_inter(1, 0)
        header.set_intent("none")
        header["descrip"] = MADE_BY.encode()
        header["aux_file"] = header["intent_name"] = b""
        header["cal_min"] = header["cal_max"] = 0
        header.extensions.clear()
        image = type(file)(data, file.affine, header)
    if path.name.lower().endswith(".zst"):
        write_bytes(path, needed("zstandard", path, "zstandard").compress(image.to_bytes()))
    else:
        with atomic(path) as temporary:
            nib.save(image, temporary)


def beside(path: Path) -> list[Path]:
    """A NIfTI file is read alone."""
    return []


def check_output(path: Path, like: Image) -> None:
    """NIfTI has a place for every grid."""


def made_here(path: Path) -> bool:
    """Whether a file was written by `write`."""
    return bytes(open_file(path).own.header["descrip"]).startswith(b"medssm ")


def _affine_mm(file: nib.Nifti1Image) -> np.ndarray:
    """The affine in millimetres. A header that names no unit of length, or one that NIfTI does not have, means millimetres."""
    affine = np.array(file.affine, float)
    affine[:3] *= _MILLIMETRES.get(int(file.header["xyzt_units"]) & 7, 1.0)
    return affine


def _unpacked(path: Path) -> nib.Nifti1Image:
    """A NIfTI file that may be compressed, once or several times, by gzip or zstandard."""
    data = formats.unpacked(path)
    kind = nib.Nifti2Image if data[4:8] == b"n+2\0" else nib.Nifti1Image
    return kind.from_bytes(data)


def _misnamed(path: Path, error: Exception) -> nib.Nifti1Image:
    """A NIfTI file whose name does not fit its compression: .nii of a compressed one, .nii.gz of a plain one or one that was compressed twice.

    Raises UserError that says what the file is.
    """
    found: list[str | None] = []
    try:
        found = formats.layers(path)
        if found[-1] == formats.NIFTI:
            logger.warning("%s: read as %s, which its name does not say", path, " in ".join(reversed([name or "unknown" for name in found])))
            return _unpacked(path)
    except UserError:
        raise
    except Exception as other:  # as above
        error, found = other, []
    what = f": its content is {found[-1]}" if found and found[-1] not in (None, formats.NIFTI, *formats.PACKED) else ""
    raise UserError(f"{path}: not a readable NIfTI file{what} ({reason(error)})") from error
