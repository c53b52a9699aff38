"""DICOM: the series of slices in a folder, or a single file with one or several frames. `dicom_seg` has label maps.

Slices are sorted by their positions. What is no stack of parallel slices at equal steps is refused with what was found: missing slices, two at one
place, several series, sizes or orientations, a gantry tilt, colours.
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medssm.errors import UserError
from medssm.scratch import slabs
from medssm.segment.images import formats, itk
from medssm.segment.images.image import LPS, Image, Place, needed, reason
from medssm.segment.images.quiet import quiet_libraries

SEG = "1.2.840.10008.5.1.4.1.1.66.4"  # the class of DICOM-SEG
_NO_IMAGES = (SEG, "1.2.840.10008.5.1.4.1.1.66.7", "1.2.840.10008.5.1.4.1.1.481.2")  # label maps, and doses of radiotherapy
_SHOWN = 5  # series that a message names
_SAME_MM = 1e-3  # slices closer than that lie in one place
_TILT = 0.1  # degrees
_ROUNDED = 1e-3  # of the largest number: directions and pixel sizes that differ by less are one
_TAGS = (
    "SOPClassUID SeriesInstanceUID Modality Rows Columns NumberOfFrames SamplesPerPixel PhotometricInterpretation ImagePositionPatient "
    "ImageOrientationPatient PixelSpacing ImagerPixelSpacing SliceThickness SpacingBetweenSlices FrameOfReferenceUID "
    "SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence ImageType"
)


@dataclass(frozen=True)
class Frame:
    """One slice: its file, its number there, and where it lies (None where the file does not say)."""

    file: Path
    number: int
    rows: int
    columns: int
    position: tuple[float, ...] | None  # of the middle of the first pixel, LPS
    orientation: tuple[float, ...]  # directions along a row and along a column
    edges: tuple[float, ...] | None  # millimetres from row to row, from column to column

    def __str__(self) -> str:
        return self.file.name if self.number == 0 else f"{self.file.name}[{self.number}]"


@dataclass(frozen=True)
class Series:
    """What a label map in DICOM needs beside the grid: the slices in their order, and whether they have a place in the patient."""

    frames: tuple[Frame, ...]
    placed: bool


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by its first bytes, or by its name for an old one that lacks them. UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return formats.kind_of(file.read(400)) == formats.DICOM or path.suffix.lower() == ".dcm"
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def files_in(folder: Path) -> list[Path]:
    """The DICOM files of a folder by name, but the hidden ones and the directory of a disk. UserError if the folder cannot be read."""
    try:
        files = sorted(file for file in folder.iterdir() if not file.is_dir() and not file.name.startswith(".") and file.name != "DICOMDIR")
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error
    return [file for file in files if is_dicom(file)]


def open_folder(folder: Path) -> Image:
    """The one series of a folder. Raises UserError if there is none or several, or its slices are no volume."""
    files = files_in(folder)
    if not files:
        raise UserError(f"{folder}: expected an image file, got a folder without DICOM in it")
    empty = [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".") and not file.stat().st_size]
    if empty:
        raise UserError(f"{min(empty)}: an empty file beside the slices of a series, as of a copy that broke off")
    stamps = [file.stat() for file in files]
    return _opened(folder, tuple((file, stamp.st_size, stamp.st_mtime_ns) for file, stamp in zip(files, stamps, strict=True)))


@functools.lru_cache(maxsize=512)
def _opened(folder: Path, files: tuple[tuple[Path, int, int], ...]) -> Image:
    """The headers of a series are hundreds of files, which are read once as long as they stay as they are."""
    return _open(folder, [file for file, _, _ in files])


def open_file(path: Path) -> Image:
    """The image of a single file. Raises UserError if it is none, or its frames are no volume."""
    return _open(path, [path])


def series_of_slice(path: Path) -> str | None:
    """The identifier of the series that a file is one slice of; None for another file. Raises UserError if it cannot be read."""
    if path.is_dir() or not is_dicom(path) or value(path, "ImagePositionPatient") is None:
        return None
    return value(path, "SeriesInstanceUID")


def value(path: Path, tag: str) -> str | None:
    """A tag of a file as text, None where it has none. Raises UserError if it cannot be read."""
    try:
        with quiet_libraries():
            found = header(path, tag).get(tag)
            return None if found is None else str(found)
    except UserError:
        raise
    except Exception as error:  # a damaged value: pydicom reads it when it is asked for
        raise UserError(f"{path}: a damaged DICOM header ({reason(error)})") from error


def header(path: Path, tags: str) -> Any:
    """pydicom's data set of a file with these tags alone. Raises UserError if it cannot be read."""
    pydicom = needed("pydicom", path, "DICOM")
    try:
        with quiet_libraries():
            return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(tags.split()), force=True)
    except Exception as error:  # pydicom raises what its parser raises
        raise UserError(f"{path}: not a readable DICOM file ({reason(error)})") from error


def _open(path: Path, files: Sequence[Path]) -> Image:
    headers = [(file, header(file, _TAGS)) for file in files]
    try:
        with quiet_libraries():
            return _image(path, headers)
    except UserError:
        raise
    except Exception as error:  # a value that is no number, an item that is missing: pydicom reads them when they are asked for
        raise UserError(f"{path}: a damaged DICOM header ({reason(error)})") from error


def _image(path: Path, headers: Sequence[tuple[Path, Any]]) -> Image:
    images = [(file, table) for file, table in headers if "Rows" in table and "Columns" in table and table.get("SOPClassUID") not in _NO_IMAGES]
    if not images:
        raise UserError(f"{path}: no DICOM image in it")
    _one_series(path, images)
    tiled = [file for file, table in images if "MOSAIC" in (table.get("ImageType") or ())]
    if tiled:
        raise UserError(f"{path}: {len(tiled)} mosaic(s) of slices in one picture, as {tiled[0].name}: convert them to NIfTI first")
    colours = collections.Counter(str(table.get("PhotometricInterpretation")) for _, table in images)
    if colours.keys() - {"MONOCHROME1", "MONOCHROME2"}:
        raise UserError(f"{path}: expected grey values, got {_counted(colours)}")
    if len(colours) > 1:
        raise UserError(f"{path}: MONOCHROME1 and MONOCHROME2 in one series, {_counted(colours)}: in one of them small values are bright")
    frames = [frame for file, table in images for frame in _frames(file, table)]
    _one_of_each(path, "size", collections.Counter(f"{frame.columns} x {frame.rows}" for frame in frames))
    _alike(path, "orientation", [frame.orientation for frame in frames], " ")
    _alike(path, "pixel size", [frame.edges for frame in frames], " x ")
    frames, affine, notes = _stack(path, frames, images[0][1])
    if "MONOCHROME1" in colours:
        notes.append("MONOCHROME1: small values are bright; they are kept")
    if len(images) < len(headers):
        notes.append(f"{len(headers) - len(images)} DICOM file(s) beside the series hold no image")
    table = images[0][1]
    placed = frames[0].position is not None and "FrameOfReferenceUID" in table
    shape = (frames[0].columns, frames[0].rows, len(frames))
    parts = functools.partial(_parts, frames) if len(images) == len(frames) else None  # a file of several frames is decoded whole
    return Image(path, "DICOM", shape, affine, lambda dtype: _pixels(frames), parts=parts, notes=tuple(notes), own=Series(tuple(frames), placed))


def _one_series(path: Path, images: Sequence[tuple[Path, Any]]) -> None:
    series: dict[str, list[tuple[Path, Any]]] = {}
    for file, table in images:
        series.setdefault(str(table.get("SeriesInstanceUID")), []).append((file, table))
    if len(series) > 1:
        named = [f"{uid} ({found[0][1].get('Modality')}, {len(found)} file(s), as {found[0][0].name})" for uid, found in series.items()]
        more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
        raise UserError(f"{path}: {len(series)} series in one folder: {', '.join(named[:_SHOWN])}{more}: give each a folder of its own")


def _one_of_each(path: Path, what: str, found: collections.Counter[str]) -> None:
    if len(found) > 1:
        raise UserError(f"{path}: slices of more than one {what}: {_counted(found)}")


def _alike(path: Path, what: str, values: Sequence[tuple[float, ...] | None], between: str) -> None:
    """UserError unless all slices have the same numbers, up to what their rounding to decimals does."""
    first = values[0]
    if not all(value is first or (first and value and np.allclose(value, first, rtol=0, atol=_ROUNDED * max(map(abs, first)))) for value in values):
        _one_of_each(path, what, collections.Counter("none" if value is None else between.join(f"{one:.5g}" for one in value) for value in values))


def _counted(found: collections.Counter[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in found.most_common(_SHOWN))


def _frames(file: Path, table: Any) -> list[Frame]:
    """The slices of a file, with their places from its own header or, for several frames, from the functional groups."""
    count = int(table.get("NumberOfFrames") or 1)
    shared = (table.get("SharedFunctionalGroupsSequence") or [None])[0]
    groups = table.get("PerFrameFunctionalGroupsSequence")
    each = groups or [None] * count
    if count > 1 and len(each) != count:
        raise UserError(f"{file}: {count} frames, and {len(each)} places for them")

    def found(group: str, name: str, own: Any) -> tuple[float, ...] | None:
        for place in (own, shared):
            if place is not None and group in place and name in place[group].value[0]:
                return _floats(place[group].value[0].get(name))
        return _floats(table.get(name))

    return [
        Frame(
            file,
            number,
            int(table.Rows),
            int(table.Columns),
            found("PlanePositionSequence", "ImagePositionPatient", own) if groups or count == 1 else None,
            found("PlaneOrientationSequence", "ImageOrientationPatient", own) or (1, 0, 0, 0, 1, 0),
            found("PixelMeasuresSequence", "PixelSpacing", own) or _floats(table.get("ImagerPixelSpacing")),
        )
        for number, own in enumerate(each)
    ]


def _floats(value: Any) -> tuple[float, ...] | None:
    return None if value is None else tuple(float(one) for one in value)


def _stack(path: Path, frames: list[Frame], table: Any) -> tuple[list[Frame], np.ndarray, list[str]]:
    """The slices by their positions, the affine, and what was assumed."""
    notes = []
    edges = frames[0].edges
    if edges is None:
        notes.append("no pixel size in the file: 1 x 1 mm")
    rows, columns = edges or (1.0, 1.0)
    across, down = np.reshape(frames[0].orientation, (2, 3))
    normal = np.cross(across, down)
    if len(frames) == 1:
        thickness = table.get("SpacingBetweenSlices") or table.get("SliceThickness")
        places = np.array([frames[0].position or (0.0, 0.0, 0.0)])
        step = normal * (float(thickness) if thickness else 1.0)
    else:
        without = [frame for frame in frames if frame.position is None]
        if without:
            raise UserError(f"{path}: {len(without)} of {len(frames)} slices have no position, as {without[0]}: no volume can be made of them")
        frames = sorted(frames, key=lambda frame: float(np.dot(np.array(frame.position), normal)))
        places = np.array([frame.position for frame in frames])
        step = _step(path, frames, places, normal, min(rows, columns))
    affine = np.eye(4)
    affine[:3] = np.stack([across * columns, down * rows, step, places[0]], 1)
    return frames, LPS @ affine, notes


def _step(path: Path, frames: Sequence[Frame], places: np.ndarray, normal: np.ndarray, pixel: float) -> np.ndarray:
    """From slice to slice, (3,). Raises UserError unless all slices lie at equal steps along `normal`."""
    along = places @ normal
    steps = np.diff(along)
    double = np.flatnonzero(steps < _SAME_MM)
    if len(double):
        first, second = frames[double[0]], frames[double[0] + 1]
        raise UserError(
            f"{path}: {len(double)} of {len(frames)} slices lie where another one lies, as {first} and {second} at {along[double[0]]:.2f} mm: "
            "several times, echoes or b-values"
        )
    usual = float(np.median(steps))
    gaps = np.flatnonzero(steps > 1.5 * usual)
    if len(gaps):
        i, missing = gaps[0], int((np.rint(steps[gaps] / usual) - 1).sum())
        raise UserError(
            f"{path}: some {missing} slice(s) missing, {len(frames)} there: {steps[i]:.2f} mm from {frames[i]} to {frames[i + 1]}, "
            f"where slices are {usual:.2f} mm apart"
        )
    whole = places[-1] - places[0]
    aside = float(np.linalg.norm(whole - normal * (whole @ normal)))
    tilt = math.degrees(math.atan2(aside, abs(float(whole @ normal))))
    if tilt > _TILT and aside > 0.1 * pixel:
        raise UserError(f"{path}: slices shifted against each other by a gantry tilt of {tilt:.1f} degrees: straighten the series first")
    step: np.ndarray = whole / (len(frames) - 1)
    off = np.linalg.norm(places - places[0] - np.arange(len(frames))[:, None] * step, axis=1)
    if off.max() > 0.1 * min(pixel, usual):
        raise UserError(f"{path}: slices at uneven steps, from {steps.min():.3f} to {steps.max():.3f} mm, as at {frames[int(off.argmax())]}")
    return step


def _pixels(frames: Sequence[Frame]) -> np.ndarray:
    """(1, x, y, z) as float32, each slice with its slope and intercept."""
    data = np.empty((1, frames[0].columns, frames[0].rows, len(frames)), np.float32)
    by_file: dict[Path, list[tuple[int, Frame]]] = {}
    for z, frame in enumerate(frames):
        by_file.setdefault(frame.file, []).append((z, frame))
    for file, found in by_file.items():
        try:
            values = _values(file, found[0][1], len(found))
        except Exception as error:  # pydicom and its decoders raise what they like
            raise UserError(f"{file}: truncated or corrupt ({reason(error)})") from error
        for z, frame in found:
            data[0, :, :, z] = values[frame.number].T
    return data


def _parts(frames: Sequence[Frame], voxels: int) -> Iterator[tuple[Place, np.ndarray]]:
    """The slices, some at a time."""
    columns, rows = frames[0].columns, frames[0].rows
    for z in slabs(len(frames), rows * columns, voxels):
        yield (slice(0, 1), slice(0, columns), slice(0, rows), z), _pixels(frames[z])


def _values(file: Path, frame: Frame, count: int) -> np.ndarray:
    """A file's slices (frames, rows, columns) in the units that its rescaling says, such as Hounsfield's."""
    pydicom = needed("pydicom", file, "DICOM")
    rescaled = needed("pydicom.pixels", file, "DICOM").apply_modality_lut
    table = pydicom.dcmread(file, force=True)
    shape = (count, frame.rows, frame.columns)
    try:
        values = np.reshape(table.pixel_array, shape)
    except (RuntimeError, NotImplementedError):  # a compression that pydicom has no decoder for, as lossless JPEG
        if count > 1:
            raise
        return itk.decode(file, (frame.columns, frame.rows, 1), 1)[0].transpose(2, 1, 0)
    groups = table.get("PerFrameFunctionalGroupsSequence")
    shared = (table.get("SharedFunctionalGroupsSequence") or [None])[0]
    if groups is None:
        return np.asarray(rescaled(values, table))
    result = np.empty(shape, np.float32)
    for i, own in enumerate(groups):
        place = next((place for place in (own, shared) if place is not None and "PixelValueTransformationSequence" in place), None)
        result[i] = values[i] if place is None else rescaled(values[i], place.PixelValueTransformationSequence[0])
    return result
