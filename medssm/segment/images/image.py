"""One image, whatever file it came from: its grid in millimetres, and a way to read its voxels."""

from __future__ import annotations

import importlib
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import nibabel as nib
import numpy as np
from numpy.typing import DTypeLike

from medssm import __version__, machine
from medssm.errors import UserError, install_command
from medssm.segment.images.quiet import quiet_libraries

logger = logging.getLogger("medssm")

MADE_BY = f"medssm {__version__}"  # in each file that is written
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # the axes of DICOM and ITK, in RAS
NO_SIZE = 'the file does not say how large a pixel is: 1 x 1 mm (NAME.json beside it may say {"spacing": [z, y, x]})'
PICTURES = ("PNG", "JPEG", "TIFF")
_LARGE = 2**28  # bytes; for less than that nobody asks how much memory is free
_LONGEST = 200  # letters of a library's error
_APART = 50  # times: cases whose spacings differ by more were not measured in one unit
Place: TypeAlias = "tuple[slice, slice, slice, slice]"  # of a part of an image: channels, x, y, z


class Voxels(Protocol):
    """What is written: an array (x, y, z) or (x, y, z, c), or what stands for one and reads `data[:, :, z]` when it is asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __getitem__(self, key: tuple[slice | int, ...], /) -> np.ndarray: ...

    def __array__(self) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Image:
    """An image file (or the folder of a DICOM series) with its header checked and its voxels not yet read.

    format     as people call it: NIfTI, NRRD, MetaImage, DICOM, PNG, JPEG or TIFF
    shape      (x, y, z), the axes in the file's own order; z is 1 for a plane
    channels   numbers in a voxel
    affine     (4, 4), from voxels to millimetres in RAS
    load       reads the voxels (channels, x, y, z); its argument is the wanted type, None for the file's own
    indices    reads them as a label map where that is another thing than the image: the indices of a palette
    measured   False where the file does not say how large a pixel is, so that it counts as 1 mm
    notes      what was assumed or left out, for the user
    own        what the writer of this format needs beside the grid
    parts      reads the voxels in parts, (place, voxels there), each of at most so many voxels or one slice; None for a format that is read whole
    """

    path: Path
    format: str
    shape: tuple[int, int, int]
    affine: np.ndarray
    load: Callable[[DTypeLike | None], np.ndarray]
    channels: int = 1
    indices: Callable[[], np.ndarray] | None = None
    measured: bool = True
    notes: tuple[str, ...] = ()
    own: Any = None
    parts: Callable[[int], Iterator[tuple[Place, np.ndarray]]] | None = None

    def __post_init__(self) -> None:
        if min(self.shape) < 1 or self.channels < 1:
            raise UserError(f"{self.path}: expected voxels along every axis, got the shape {self.shape} with {self.channels} channel(s)")
        if not np.isfinite(self.affine).all() or abs(np.linalg.det(self.affine[:3, :3])) < 1e-12:
            raise UserError(f"{self.path}: the affine cannot be inverted: {np.round(self.affine[:3, :3], 4).tolist()}")

    @property
    def spacing(self) -> np.ndarray:
        """A voxel's edges in millimetres, (3,), along the file's axes."""
        edges: np.ndarray = np.linalg.norm(self.affine[:3, :3], axis=0)
        return edges

    def voxels(self, dtype: DTypeLike | None = None, *, labels: bool = False) -> np.ndarray:
        """The voxels (channels, x, y, z) as `dtype`, by default in the type of the file.

        Raises UserError if the file is damaged, or memory cannot hold what its header says.
        """
        self._check_room(self.bytes)
        with self._reading():
            data = self.indices() if labels and self.indices else self.load(dtype)
        return self._numbers(data, dtype)

    def pieces(self, voxels: int) -> Iterator[tuple[Place, np.ndarray]]:
        """The voxels as float32 piece after piece, (place, voxels there), each of at most so many `voxels`, or one slice where that is more.

        A format that is read whole gives one piece. Raises UserError as `voxels`.
        """
        if self.parts is None:
            x, y, z = self.shape
            yield (slice(0, self.channels), slice(0, x), slice(0, y), slice(0, z)), self.voxels(np.float32)
            return
        self._check_room(4.0 * self.shape[0] * self.shape[1])
        parts = self.parts(voxels)
        while True:
            with self._reading():
                part = next(parts, None)
            if part is None:
                return
            yield part[0], self._numbers(part[1], np.float32)

    @property
    def bytes(self) -> float:
        """Of the voxels as float32."""
        return 4.0 * self.channels * math.prod(self.shape)

    def _check_room(self, size: float) -> None:
        if size > _LARGE and size > machine.free_memory():
            raise UserError(self._too_large())

    def _numbers(self, data: np.ndarray, dtype: DTypeLike | None) -> np.ndarray:
        if data.dtype.kind not in "iufb":
            raise UserError(f"{self.path}: expected numbers, got voxels of the type {data.dtype}")
        return data if dtype is None else data.astype(dtype, copy=False)

    def _too_large(self) -> str:
        shape = " x ".join(map(str, self.shape))
        return f"{self.path}: {shape} voxels, {self.channels} channel(s), need {self.bytes / 2**30:.1f} GiB of memory, more than is free"

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Each error of a library is a UserError that names the file."""
        try:
            with quiet_libraries():
                yield
        except UserError:
            raise
        except MemoryError as error:
            raise UserError(self._too_large()) from error
        except Exception as error:  # each library raises what its readers raise: OSError, zlib.error, RuntimeError, struct.error, ...
            raise UserError(f"{self.path}: truncated or corrupt ({reason(error)})") from error


def ras_grid(image: Image) -> tuple[np.ndarray, np.ndarray]:
    """An image's spacing in millimetres and its shape along the RAS axes."""
    orientation = nib.io_orientation(image.affine)  # entry i: which RAS axis the file's axis i runs along
    order = np.argsort(orientation[:, 0])
    return image.spacing[order], np.array(image.shape)[order]


def lengths(edges: np.ndarray) -> str:
    """Lengths for a message: "1 x 1 x 2.5"."""
    return " x ".join(f"{edge:.3g}" for edge in edges)


def far_apart(edges: np.ndarray, others: np.ndarray) -> bool:
    """Whether two spacings differ, along every axis, by more than two images of one kind do: they were not measured in one unit of length."""
    return bool((edges > _APART * others).all() or (others > _APART * edges).all())


def different_grid(image: Image, other: Image) -> str | None:
    """Why two images do not lie on the same grid, or None if they do: the same shape, and each corner within a tenth of a voxel.

    Of pictures that do not say how large a pixel is, only the shapes are compared.
    """
    if image.shape != other.shape:
        return f"shape {image.shape}, expected {other.shape}"
    if image.format in PICTURES and other.format in PICTURES and not (image.measured and other.measured):
        return None
    corners = np.array([[*(np.array(corner) * (np.array(image.shape) - 1)), 1] for corner in np.ndindex(2, 2, 2)], float)
    apart = np.linalg.norm((corners @ (image.affine - other.affine).T)[:, :3], axis=1).max()
    smallest = other.spacing.min()
    if apart > 0.1 * smallest:
        return f"the affine puts a corner {apart:.3g} mm away (at most {0.1 * smallest:.3g} mm)"
    return None


def aligned(image: Image, other: Image) -> Image:
    """`image` with the axes of `other`, and the size of its pixels where `image` does not say it.

    The voxels of both lie in the same places; only the order and the direction of the axes may differ.

    Raises UserError if they lie elsewhere.
    """
    difference = different_grid(image, other)
    if difference is None:
        if image.measured or not other.measured:
            return image
        return replace(image, affine=other.affine, measured=True, notes=tuple(note for note in image.notes if note != NO_SIZE))
    turned = _turned(image, other)
    if turned is None or different_grid(turned, other):
        raise UserError(f"{image.path}: not on the grid of {other.path}: {difference}")
    return turned


def _turned(image: Image, other: Image) -> Image | None:
    """`image` with its axes exchanged and flipped to those of `other`; None where they are not the same axes."""
    steps = np.rint(np.linalg.solve(other.affine, image.affine)[:3, :3])  # column i: where axis i of `image` goes, in voxels of `other`
    if not ((abs(steps).sum(0) == 1).all() and (abs(steps).sum(1) == 1).all()):
        return None
    axes = abs(steps).argmax(0)
    turn = np.stack([axes, steps[axes, range(3)]], 1)
    order = np.argsort(axes)
    x, y, z = (image.shape[axis] for axis in order)
    indices, parts = image.indices, image.parts

    def turned_parts(voxels: int) -> Iterator[tuple[Place, np.ndarray]]:
        assert parts is not None
        return ((turned_place(place, turn, image.shape), turned(values, turn)) for place, values in parts(voxels))

    return replace(
        image,
        shape=(x, y, z),
        affine=image.affine @ nib.orientations.inv_ornt_aff(turn, image.shape),
        load=lambda dtype: turned(image.load(dtype), turn),
        parts=parts and turned_parts,
        indices=None if indices is None else lambda: turned(indices(), turn),
        notes=(*image.notes, "its axes are turned to those of its image"),
    )


def turned(values: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Voxels (channels, x, y, z) with their axes exchanged and flipped, a view; `turn` is nibabel's orientation, (3, 2): for each axis where it
    goes and its direction there.
    """
    return np.asarray(nib.apply_orientation(values, np.vstack([[0, 1], np.add(turn, [1, 0])])))


def turned_place(place: Place, turn: np.ndarray, shape: Sequence[int]) -> Place:
    """Where `turned` puts a part of a volume of this shape."""
    channels, *axes = place
    moved = [slice(0)] * 3
    for part, size, (axis, direction) in zip(axes, shape, turn, strict=True):
        moved[int(axis)] = part if direction > 0 else slice(size - part.stop, size - part.start)
    x, y, z = moved
    return channels, x, y, z


def say(images: Iterable[Image]) -> None:
    """Log what was assumed or left out, one line for each note, with the first file that it is about."""
    about: dict[str, list[Path]] = {}
    for image in images:
        for note in image.notes:
            about.setdefault(note, []).append(image.path)
    for note, (first, *others) in about.items():
        logger.warning("%s%s: %s", first, f" and {len(others)} other(s)" if others else "", note)


def needed(package: str, path: Path, what: str) -> Any:
    """A package of the extra `io`. Raises UserError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: {what} needs the package {package.partition('.')[0]}: {install_command('io')}") from error


def reason(error: BaseException) -> str:
    """One line from a library's error, without bytes of the file, which may hold a name. SimpleITK's begins with a place in its source."""
    text = str(error)
    if text.startswith("Exception thrown in SimpleITK"):
        text = " ".join(text.split("\n", 1)[-1].split()).rpartition("ERROR: ")[2]
    return re.sub(r"\bb(['\"]).*?\1", "…", text.split("\n", 1)[0])[:_LONGEST].strip() or type(error).__name__
