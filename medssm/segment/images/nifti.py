"""NIfTI files, plain or compressed: read with one clear line for whatever is wrong with them, and written."""

from __future__ import annotations

import contextlib
import gzip
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel as nib
import numpy as np
from numpy.typing import DTypeLike

from medssm.errors import UserError
from medssm.files import atomic
from medssm.scratch import slabs
from medssm.segment.images import formats
from medssm.segment.images.image import MADE_BY, Image, Place, Voxels, needed, reason
from medssm.segment.images.quiet import quiet_libraries

logger = logging.getLogger("medssm")

ENDINGS = (".nii.gz", ".nii.zst", ".nii")
_MILLIMETRES = {1: 1000.0, 2: 1.0, 3: 0.001}  # of a header's units of length: metre, millimetre, micron
_PART = 2**21  # voxels that are written together
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

    def parts(voxels: int) -> Iterator[tuple[Place, np.ndarray]]:
        if channels * x * y * z <= voxels:
            yield (slice(0, channels), slice(0, x), slice(0, y), slice(0, z)), load(None)
            return
        name = file.get_filename()
        opened: Any = nib.load(name, keep_file_open=True) if name else file  # kept open, so that a compressed file is unpacked once, in order
        for channel in range(1 if colours else channels):
            behind = {4: (channel,), 5: (0, channel)}.get(file.ndim, ())
            for part in slabs(z, x * y, voxels):
                data = np.asarray(opened.dataobj[(slice(None), slice(None), part, *behind)[: file.ndim]])
                found = [data[colour] for colour in "RGB"] if colours else [data]
                place = slice(channel, channel + len(found)), slice(0, x), slice(0, y), part
                yield place, np.stack([values.reshape(x, y, -1) for values in found])

    notes = ("the alpha channel is left out",) if colours and "A" in colours else ()
    return Image(path, "NIfTI", (x, y, z), _affine_mm(file), load, channels, notes=notes, own=file, parts=parts)


def write(path: Path, data: Voxels, like: Image, classes: Mapping[str, int] | None = None) -> None:
    """Write `data` (x, y, z) or (x, y, z, c) on the grid of `like`; of a NIfTI also with its codes and units. If that is a plane, a plane is written.

    No description and no extension of `like` is copied. Raises UserError if the file cannot be written; nothing half written is left.
    """
    file = like.own if like.format == "NIfTI" else None
    plane = file is not None and file.ndim == 2 and len(data.shape) == 3
    nothing = np.broadcast_to(np.zeros((), data.dtype), data.shape[:2] if plane else data.shape)  # nibabel makes the header, the data follow
    if file is None:
        image = nib.Nifti1Image(nothing, like.affine, dtype=data.dtype)
        image.header.set_xyzt_units("mm")
    else:
        header = file.header.copy()
        header.set_data_dtype(data.dtype)
        header.set_data_shape(nothing.shape)
        header.set_intent("none")
        header["aux_file"] = header["intent_name"] = b""
        header["cal_min"] = header["cal_max"] = 0
        header.extensions.clear()
        image = type(file)(nothing, file.affine, header)
    image.header.set_slope_inter(1, 0)
    image.header["descrip"] = MADE_BY.encode()
    size = image.header.single_vox_offset + data.dtype.itemsize * math.prod(data.shape)
    with atomic(path) as temporary, _packed(temporary, size) as out:
        image.header.write_to(out)
        for channel in range(data.shape[3]) if len(data.shape) == 4 else [None]:
            for part in slabs(data.shape[2], data.shape[0] * data.shape[1], _PART):
                values = data[:, :, part] if channel is None else data[:, :, part, channel]
                out.write(values.astype(image.header.get_data_dtype(), copy=False).tobytes("F"))


@contextlib.contextmanager
def _packed(path: Path, size: int) -> Iterator[BinaryIO]:
    """A new file, compressed as its name says, of so many bytes before that."""
    with open(path, "wb") as file:
        if path.name.lower().endswith(".gz"):
            with gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as packed:
                yield cast(BinaryIO, packed)
        elif path.name.lower().endswith(".zst"):
            with needed("zstandard", path, "zstandard").ZstdCompressor().stream_writer(file, size, closefd=False) as packed:
                yield packed
        else:
            yield file


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
