"""NRRD and MetaImage files, by SimpleITK; and pixels that no other library here decodes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from medssm.errors import UserError
from medssm.files import atomic
from medssm.segment.images.image import LPS, MADE_BY, Image, needed, reason

ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")
_NAMES = {".nrrd": "NRRD", ".nhdr": "NRRD", ".mha": "MetaImage", ".mhd": "MetaImage"}
_READERS = {"NRRD": "NrrdImageIO", "MetaImage": "MetaImageIO"}
_ALONE = {".nhdr": ".nrrd", ".mhd": ".mha"}  # a header beside its data, and the same in one file
_MILLIMETRES = {"m": 1000.0, "cm": 10.0, "mm": 1.0, "um": 0.001, "µm": 0.001, "micron": 0.001, "microns": 0.001}
_UNITS = (re.compile(rb'^space units:\s*"([^"]*)"', re.M), re.compile(rb"^DistanceUnits\s*=\s*(\S+)", re.M))
_MARK = re.compile(rb"^MadeBy\s*:?=\s*medssm ", re.M)
_DATA = re.compile(rb"^(?:ElementDataFile\s*=|data ?file:)\s*([^\r\n\0]+)", re.M)
_HEADER = 65536  # bytes that a header's text is looked for in


def open_file(path: Path) -> Image:
    """The NRRD or MetaImage file at `path`. Raises UserError if it is none, or has other axes or voxels than an image has."""
    name = _NAMES[path.suffix.lower()]
    for line in re.findall(rb"NDims[^\r\n]*", _header(path)):
        if not re.fullmatch(rb"NDims\s*=\s*[234]\s*", line):  # ITK ends the process on numbers that are no dimension
            raise UserError(f"{path}: not a readable {name} file (expected NDims = 2, 3 or 4, got {line[:40].decode(errors='replace')})")
    sitk = needed("SimpleITK", path, name)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(_READERS[name])
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise UserError(f"{path}: not a readable {name} file ({reason(error)})") from error
    size, axes = reader.GetSize(), reader.GetDimension()
    if axes not in (2, 3, 4) or (axes == 4 and reader.GetNumberOfComponents() > 1):
        raise UserError(f"{path}: expected 2 or 3 axes, or 4 with the channels last, got the shape {size}")
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if "complex" in kind or "label" in kind:
        raise UserError(f"{path}: expected numbers, got voxels of the type {kind}")
    x, y, z = (*size, 1)[:3]
    channels = size[3] if axes == 4 else reader.GetNumberOfComponents()
    places = min(axes, 3)
    grid = np.eye(4)
    grid[:places, :places] = np.reshape(reader.GetDirection(), (axes, axes))[:places, :places] * reader.GetSpacing()[:places]
    grid[:places, 3] = reader.GetOrigin()[:places]
    grid[:3] *= _unit(path)

    def load(dtype: DTypeLike | None) -> np.ndarray:
        return _array(sitk, reader.Execute(), (x, y, z), channels)

    return Image(path, name, (x, y, z), LPS @ grid, load, channels, own=axes)


def write(path: Path, data: np.ndarray, like: Image, classes: Mapping[str, int]) -> None:
    """Write `data` (x, y, z), compressed, on the grid of `like`; a plane of ITK's stays one. No entry of its header is copied.

    Raises UserError if the file cannot be written; nothing half written is left.
    """
    sitk = needed("SimpleITK", path, _NAMES[path.suffix.lower()])
    plane = like.format in _READERS and like.own == 2
    axes = 2 if plane else 3
    grid = LPS @ like.affine
    image = sitk.GetImageFromArray(data[..., 0].T if plane else data.T)
    edges = like.spacing
    image.SetSpacing(edges[:axes].tolist())
    image.SetOrigin(grid[:axes, 3].tolist())
    image.SetDirection((grid[:axes, :axes] / edges[:axes]).ravel().tolist())
    image.SetMetaData("MadeBy", MADE_BY)
    with atomic(path) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), useCompression=True)
        except RuntimeError as error:
            raise UserError(f"{path}: cannot be written ({reason(error)})") from error


def beside(path: Path) -> list[Path]:
    """The file of the data, where the header stands in another one."""
    match = path.suffix.lower() in _ALONE and path.is_file() and _DATA.search(_header(path, whole=True))
    file = path.parent / match[1].decode(errors="replace").strip() if match else path
    return [file] if file != path and file.is_file() else []


def check_output(path: Path, like: Image) -> None:
    """UserError for a format of two files, and for axes that are not perpendicular: ITK has no place for those."""
    ending = path.suffix.lower()
    if ending in _ALONE:
        raise UserError(f"{path}: two files at once cannot be written whole or not at all: name it {path.stem}{_ALONE[ending]}")
    directions = like.affine[:3, :3] / like.spacing
    if abs(directions.T @ directions - np.eye(3)).max() > 1e-3:
        raise UserError(f"{path}: the axes of {like.path} are not perpendicular, which {_NAMES[ending]} cannot say: name a file that ends in .nii.gz")


def made_here(path: Path) -> bool:
    """Whether a file was written by `write`."""
    return bool(_MARK.search(_header(path)))


def decode(path: Path, shape: tuple[int, int, int], channels: int) -> np.ndarray:
    """The pixels (channels, x, y, z) of a file of any format that ITK knows: for compressions that other libraries here lack."""
    sitk = needed("SimpleITK", path, "its compression")
    return _array(sitk, sitk.ReadImage(str(path)), shape, channels)


def _array(sitk: Any, image: Any, shape: tuple[int, int, int], channels: int) -> np.ndarray:
    """(channels, x, y, z) of an image whose channels are components of its voxels, or its last axis."""
    data = sitk.GetArrayFromImage(image)  # the axes the other way round: (z, y, x, components) or (channels, z, y, x)
    if data.size != channels * math.prod(shape):
        raise ValueError(f"expected the shape {shape} with {channels} channel(s), got {image.GetSize()} with {image.GetNumberOfComponentsPerPixel()}")
    if channels > 1 and image.GetNumberOfComponentsPerPixel() == channels:
        data = np.moveaxis(data, -1, 0)
    return np.ascontiguousarray(data.reshape(channels, *shape[::-1]).transpose(0, 3, 2, 1))


def _header(path: Path, whole: bool = False) -> bytes:
    """The text at the beginning of a file: NRRD's ends with an empty line, MetaImage's with the place of the data, which is part of the `whole`."""
    try:
        with open(path, "rb") as file:
            begin = file.read(_HEADER)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return begin if whole else re.split(rb"\r?\n\r?\n|^ElementDataFile", begin, maxsplit=1, flags=re.M)[0]


def _unit(path: Path) -> float:
    """Millimetres of the header's unit of length, which ITK passes over."""
    header = _header(path)
    for pattern in _UNITS:
        if match := pattern.search(header):
            unit = match[1].decode(errors="replace").strip().lower()
            if unit not in _MILLIMETRES:
                raise UserError(f"{path}: lengths in an unknown unit, {unit!r}: expected one of {', '.join(_MILLIMETRES)}")
            return _MILLIMETRES[unit]
    return 1.0
