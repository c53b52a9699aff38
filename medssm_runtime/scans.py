"""NIfTI files: which of them are a case, a scan read with one clear line for what is wrong with it, and a label map written whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from medssm_runtime import __version__
from medssm_runtime.errors import UserError, first_line
from medssm_runtime.files import whole

ENDINGS = (".nii.gz", ".nii")
_OTHER = {".nrrd", ".nhdr", ".mha", ".mhd", ".png", ".tif", ".tiff", ".dcm", ".hdr", ".img", ".mgz", ".npy", ".npz", ".gz", ".zst", ".zip", ".json"}
_MADE_BY = f"medssm {__version__}"  # in each file that is written, as medssm predict does
_MILLIMETRES = {1: 1000.0, 2: 1.0, 3: 0.001}  # of a header's units of length: metre, millimetre, micron
_CHANNEL = re.compile(r"(.+)_(\d{4})")  # nnU-Net's channel files end in _0000, _0001, ...


@dataclass(frozen=True)
class Case:
    """One scan: a file for each channel, or one file with all of them. Its name is the path of its label map below the folder of the output."""

    name: str
    files: tuple[Path, ...]


def cases_of(paths: Sequence[Path], channels: int, out: Path) -> list[Case]:
    """The cases of files and folders, with the folders below these; nothing in `out` is one.

    Raises UserError for what is not there, no scan, or two cases of one name.
    """
    found: dict[Case, None] = {}
    for path in paths:
        if path.is_dir():
            folders = [Path(folder) for folder, _, _ in os.walk(path)]
            for folder in sorted(folders):
                hidden = any(part.startswith(".") for part in folder.relative_to(path).parts)
                if not hidden and (folder == path or out.resolve() not in (folder.resolve(), *folder.resolve().parents)):
                    files = sorted(file for file in folder.iterdir() if _ending(file) and not file.name.startswith(".") and file.is_file())
                    found |= dict.fromkeys(_case(file, channels, folder.relative_to(path)) for file in files)
        elif not path.exists():
            raise UserError(f"{path}: no such file or folder")
        elif not _ending(path):
            raise UserError(f"{path}: expected a NIfTI file ({', '.join(ENDINGS)}); medssm predict reads other formats")
        else:
            found[_case(path, channels, Path())] = None
    if not found:
        raise UserError(f"{', '.join(map(str, paths))}: no NIfTI file in it ({', '.join(ENDINGS)})")
    named: dict[str, Case] = {}
    for case in found:
        other = named.setdefault(case.name, case)
        if other is not case:
            raise UserError(f"{case.files[0]} and {other.files[0]}: two files for the case {case.name}")
    return list(found)


def _case(file: Path, channels: int, folder: Path) -> Case:
    """CASE_0000, CASE_0001, … are the channels of CASE where the network takes several; a single channel may be called CASE_0000 too."""
    stem, ending = file.name.removesuffix(_ending(file)), _ending(file)
    match = _CHANNEL.fullmatch(stem)
    if not match or int(match[2]) >= channels or (channels > 1 and _has_all(file, channels)):
        return Case((folder / stem).as_posix(), (file,))
    return Case((folder / match[1]).as_posix(), tuple(file.with_name(f"{match[1]}_{i:04d}{ending}") for i in range(channels)))


def _has_all(file: Path, channels: int) -> bool:
    """Whether a file has the scan's several channels itself."""
    with contextlib.suppress(UserError):
        return math.prod(_open(file).shape[3:]) == channels
    return False


def read(case: Case, channels: int | None) -> tuple[np.ndarray, np.ndarray, Any]:
    """A case's channels (c, x, y, z) in float32, the affine in millimetres, and nibabel's image of the first file. A plane becomes (c, x, y, 1).

    channels: their number; None takes any.

    Raises UserError if a file cannot be read, has another number of channels, lies on another grid, or holds voxels that are not finite or all equal.
    """
    images = [_open(file) for file in case.files]
    first, affine = images[0], _affine(images[0])
    if abs(np.linalg.det(affine[:3, :3])) < 1e-12 or not np.isfinite(affine).all():
        raise UserError(f"{case.files[0]}: the affine cannot be inverted: {np.round(affine[:3, :3], 4).tolist()}")
    shape = (*first.shape, 1)[:3]
    parts = []
    for file, image in zip(case.files, images, strict=True):
        if (*image.shape, 1)[:3] != shape or not _same_place(_affine(image), affine, shape):
            raise UserError(f"{file}: not on the grid of {case.files[0]}")
        count = math.prod(image.shape[3:])
        if len(images) > 1 and count > 1:
            raise UserError(f"{file}: expected 1 channel beside the other channels' files, got {count}")
        try:
            data = np.asarray(image.dataobj, dtype=np.float32).reshape(*shape, count)
        except MemoryError as error:
            raise UserError(f"{file}: memory cannot hold its {' x '.join(map(str, image.shape))} voxels") from error
        except Exception as error:  # nibabel raises what its readers raise: OSError, EOFError, zlib.error, ...
            raise UserError(f"{file}: truncated or corrupt ({first_line(error)})") from error
        parts.append(np.moveaxis(data, -1, 0))
    found = np.concatenate(parts) if len(parts) > 1 else np.ascontiguousarray(parts[0])
    if channels is not None and len(found) != channels:
        raise UserError(f"{case.files[0]}: expected {channels} channel(s), got {len(found)}")
    check_values(found, case.files[0])
    return found, affine, first


def check_values(found: np.ndarray, file: Path) -> None:
    """UserError where voxels are not finite, or all equal."""
    low, high = found.min(), found.max()
    if not np.isfinite([low, high]).all():
        raise UserError(f"{file}: {int((~np.isfinite(found)).sum())} voxel(s) are not finite (NaN or infinite)")
    if low == high:
        raise UserError(f"{file}: every voxel of the image is {low:g}")


def _open(path: Path) -> Any:
    """A NIfTI file with its header checked and its voxels not yet read."""
    try:
        with _quiet_nibabel():
            image = nib.load(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except Exception as error:  # nibabel raises what its readers raise: ImageFileError, EOFError, zlib.error, HeaderDataError
        raise UserError(f"{path}: not a readable NIfTI file ({first_line(error)})") from error
    if not isinstance(image, (nib.Nifti1Image, nib.Nifti2Image)):
        raise UserError(f"{path}: expected a NIfTI file, got {type(image).__name__}")
    if image.ndim not in (2, 3, 4, 5) or min(image.shape) < 1 or (image.ndim == 5 and image.shape[3] != 1):
        raise UserError(f"{path}: expected 2 or 3 axes, or 4 with the channels last (5 with one time), got the shape {image.shape}")
    if image.get_data_dtype().kind not in "iufb":
        raise UserError(f"{path}: expected numbers, got voxels of the type {image.get_data_dtype()}")
    return image


@contextlib.contextmanager
def _quiet_nibabel() -> Iterator[None]:
    """Without nibabel's lines about a header: what matters is in our own. Each reader has a filter of its own, so several may read at once."""
    log = logging.getLogger("nibabel.global")
    nothing = logging.Filter("nothing but this name")
    log.addFilter(nothing)
    try:
        yield
    finally:
        log.removeFilter(nothing)


def _affine(image: Any) -> np.ndarray:
    """The affine in millimetres; a header that names no unit of length means millimetres."""
    affine = np.array(image.affine, float)
    affine[:3] *= _MILLIMETRES.get(int(image.header["xyzt_units"]) & 7, 1.0)
    return affine


def _same_place(affine: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> bool:
    """Whether each corner lies within a tenth of a voxel."""
    corners = np.array([[*(np.array(corner) * (np.array(shape) - 1)), 1] for corner in np.ndindex(2, 2, 2)], float)
    apart = np.linalg.norm((corners @ (affine - other).T)[:, :3], axis=1).max()
    return bool(apart <= 0.1 * np.linalg.norm(other[:3, :3], axis=0).min())


def targets(cases: Sequence[Case], out: Path, overwrite: bool) -> dict[str, Path]:
    """{name of a case: file of its label map}.

    Raises UserError where `out` is one file for several cases, or a file would be lost: one that is read, or one of other origin without `overwrite`.
    """
    if out.suffix.lower() == ".csv":
        raise UserError(f"out: a CSV is what a classifier writes, and the network segments: expected {' or '.join(ENDINGS)} or a folder, got {out}")
    if _ending(out) and not out.is_dir():
        if len(cases) != 1:
            raise UserError(f"out: expected a folder for {len(cases)} case(s), got the file {out}")
        found = {cases[0].name: out}
    elif out.is_file() or (out.suffix.lower() in _OTHER and not out.is_dir()):  # as the name of a folder a mistake
        raise UserError(f"out: expected a file that ends in {' or '.join(ENDINGS)}, or a folder, got {out}")
    else:
        found = {case.name: out / f"{case.name}.nii.gz" for case in cases}
    for path in found.values():
        _protect(path, [file for case in cases for file in case.files], overwrite)
    return found


def _protect(path: Path, reads: Iterable[Path], overwrite: bool) -> None:
    if not path.exists():
        return
    if any(file.exists() and path.samefile(file) for file in reads):
        raise UserError(f"out: {path} is a file that is read; name another one")
    if not overwrite and not _made_here(path):
        raise UserError(f"out: {path} is there already, and medssm did not write it: name another one, or pass --overwrite")


def _made_here(path: Path) -> bool:
    with contextlib.suppress(UserError):
        return bytes(_open(path).header["descrip"]).startswith(b"medssm ")
    return False


def write(path: Path, labels: np.ndarray, like: Any) -> None:
    """Write a label map (x, y, z) on the grid of a scan, with its codes and units, without its texts; whole or, with UserError, not at all."""
    header = like.header.copy()
    labels = labels.reshape(like.shape) if like.ndim == 2 else labels
    header.set_data_dtype(labels.dtype)
    header.set_data_shape(labels.shape)
    header.set_slope_inter(1, 0)
    header.set_intent("none")
    header["descrip"] = _MADE_BY.encode()
    header["aux_file"] = header["intent_name"] = b""
    header["cal_min"] = header["cal_max"] = 0
    header.extensions.clear()
    with whole(path) as temporary:
        nib.save(type(like)(labels, like.affine, header), temporary)


def _ending(path: Path) -> str:
    """.nii.gz or .nii as it stands in the name; empty for other files."""
    return next((path.name[-len(ending) :] for ending in ENDINGS if path.name.lower().endswith(ending)), "")
