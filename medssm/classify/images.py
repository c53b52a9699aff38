"""What a classifier sees of a file: turned to RAS, its intensities scaled, brought to one shape; and what of that was fitted to the data."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import CenterSpatialCrop
from torch import Tensor

from medssm import machine
from medssm.classify.table import Sample
from medssm.errors import UserError
from medssm.files import read_json, write_json
from medssm.segment.fit import fit_mirror
from medssm.segment.images import PICTURES, Image, lengths, open_image, ras_grid, read_image, say
from medssm.segment.images.image import NO_SIZE
from medssm.segment.intensity import Intensities, scaling
from medssm.segment.preprocess import geometry, pad
from medssm.tasks import CLASSIFY, is_fitted

Sizes = Literal["resize", "pad"]
_VOXELS = {("cpu", 2): 128**2, ("cpu", 3): 64**3, ("gpu", 2): 256**2, ("gpu", 3): 112**3}  # of an image, by default
_MULTIPLE, _SHORTEST = 16, 32
_LOOKED_AT = 500  # images that intensities are fitted to, drawn at random
_PIXELS = 10_000_000  # that are kept of them
_SHOWN = 20
Show = Callable[[float, str], None]


@dataclass(frozen=True)
class Fitted:
    """What was fitted to the training images or chosen for them.

    channels   their names
    classes    their names, in the order of the network's outputs
    shape      voxels that every image is brought to, an entry for each of the network's axes
    sizes      how: "resize", or "pad" (padded and cropped about the middle, at the image's own scale)
    spacing    millimetres along the RAS axes that an image is resampled to before; None leaves its own
    intensity  for each channel, as `segment.preprocess.Fitted` has it
    axes       the RAS axes of an image: 0 left-right, 1 front-back, 2 up-down
    mirror     those that training mirrored
    """

    channels: tuple[str, ...]
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    sizes: str
    spacing: tuple[float, ...] | None
    intensity: tuple[dict[str, Any], ...]
    axes: tuple[int, ...]
    mirror: tuple[int, ...]
    task: str = CLASSIFY

    def save(self, path: Path) -> None:
        """Write it as JSON. Raises UserError if the file cannot be written."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> Fitted:
        """Read what `save` wrote. Raises UserError if the file cannot be read, or was written by another version or for another task."""
        table = read_json(path)
        if not is_fitted(path):
            raise UserError(f"{path}: of a network that segments, where a classifier is expected")
        try:
            values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
            return cls(**values)
        except TypeError as error:
            raise UserError(f"{path}: not written by this version of medssm train ({error})") from error


def fit(
    samples: Sequence[Sample],
    classes: tuple[str, ...],
    *,
    spatial_dims: int | None,
    shape: Sequence[int] | None,
    sizes: Sizes,
    spacing: Sequence[float] | None,
    mirror: str | Sequence[int],
    modality: Sequence[str] | None,
    nan: float | None,
    gpu: bool,
    seed: int,
    show: Show,
) -> Fitted:
    """Look at the training images' headers, and at the intensities of 500 of them at most, and fit what the caller leaves open.

    Raises UserError with a line for each file that cannot be read, or where planes and volumes or different channels are mixed.
    """
    files = _opened(samples, show)
    channels = _channels(files)
    flat = [min(ras_grid(file)[1]) == 1 for file in files]
    dims = spatial_dims or (2 if all(flat) else 3)
    for file, plane in zip(files, flat, strict=True):
        if plane != (dims == 2):
            hint = f"{sum(flat)} of {len(flat)} are planes" if spatial_dims is None else f"pass --spatial-dims {5 - dims}"
            raise UserError(
                f"{file.path}: a {'plane' if plane else 'volume'}, where the network takes {'planes' if dims == 2 else 'volumes'} ({hint})"
            )
    pictures = all(file.format in PICTURES for file in files)
    random = np.random.default_rng(seed)
    looked_at = sorted(random.permutation(len(samples))[:_LOOKED_AT].tolist())
    intensities = Intensities(channels, modality or (["picture"] if pictures else None), seed, max(100, _PIXELS // len(looked_at) // len(channels)))
    for done, i in enumerate(looked_at):
        image = torch.from_numpy(_with_channels(read_image([samples[i].path], None, nan)[0], samples[i].path, len(channels)))
        intensities.add(str(samples[i].path), image, torch.ones(image.shape[1:]))
        show(done / len(looked_at), f"intensities of {samples[i].name}")
    axes = _axes(files[0], dims)
    wanted = fit_shape([_lengths(file, dims, spacing) for file in files], _VOXELS["gpu" if gpu else "cpu", dims]) if shape is None else tuple(shape)
    if mirror == "swap":
        raise UserError("mirror: expected auto, none or axes, got swap, which exchanges classes of voxels")
    mirrored, _ = fit_mirror(mirror, ["", *classes], axes, oriented=not pictures)
    fitted = tuple(float(edge) for edge in spacing) if spacing else None
    return Fitted(channels, classes, wanted, sizes, fitted, intensities.fit(), axes, mirrored)


def fit_shape(shapes: Sequence[Sequence[int]], voxels: int) -> tuple[int, ...]:
    """The median of the shapes, made smaller in proportion to `voxels` at most, as multiples of 16 and at least 32."""
    median = np.median(np.array(shapes), axis=0)
    scale = min(1.0, (voxels / math.prod(median)) ** (1 / len(median)))
    return tuple(max(_SHORTEST, round(size * scale / _MULTIPLE) * _MULTIPLE) for size in median)


def prepared(path: Path, fitted: Fitted, nan: float | None = None) -> Tensor:
    """An image as the network takes it, (c, *shape) float32.

    Raises UserError for what `read_image` refuses, other channels, a plane in place of a volume or the reverse, or an image of one value.
    """
    data, file = read_image([path], None, nan)
    data = _with_channels(data, path, len(fitted.channels))
    if data.max() == data.min():
        raise UserError(f"{path}: every voxel of the image is {data.flat[0]:g}")
    if (min(file.shape) == 1) != (len(fitted.shape) == 2):
        raise UserError(
            f"{path}: {lengths(np.array(file.shape))} voxels, where the network takes {'planes' if len(fitted.shape) == 2 else 'volumes'}"
        )
    if fitted.spacing is None:
        turned = nib.apply_orientation(np.moveaxis(data, 0, -1), nib.io_orientation(file.affine))
        image = torch.from_numpy(np.ascontiguousarray(np.moveaxis(turned, -1, 0)))
    else:
        image = geometry(_resampled_to(file, fitted.spacing))(MetaTensor(torch.from_numpy(data), affine=torch.from_numpy(file.affine))).as_tensor()
    if len(fitted.shape) == 2:
        image = image.squeeze(1 + _across(image.shape[1:]))
    image = scaling(image, fitted.intensity)(image)
    if tuple(image.shape[1:]) != fitted.shape and fitted.sizes == "resize":
        image = resized(image, fitted.shape)
    elif tuple(image.shape[1:]) != fitted.shape:
        image = torch.as_tensor(CenterSpatialCrop(fitted.shape)(pad(image, fitted.shape)[0])).as_subclass(Tensor)
    return image.contiguous()


def resized(image: Tensor, shape: Sequence[int]) -> Tensor:
    """An image (c, *spatial) as (c, *shape): linear along one axis after the other, each weighed over as much as a smaller shape leaves out."""
    for axis, size in enumerate(shape, 1):
        lines = image.movedim(axis, 1)
        flat = lines.reshape(len(image), 1, lines.shape[1], -1)
        found = F.interpolate(flat, (size, flat.shape[-1]), mode="bilinear", antialias=True)
        image = found.reshape(len(image), size, *lines.shape[2:]).movedim(1, axis)
    return image


class Images:
    """images[i] is the i-th image as the network takes it: read once where half of the free memory holds all, else each time.

    Args:
        samples: whose files are read
        fitted: what was fitted to the training images
        nan: see `prepared`
        show: is told the part that is read, and a text

    Raises:
        UserError: with a line for each file that is refused; where memory does not hold all, when that one is read.
    """

    def __init__(self, samples: Sequence[Sample], fitted: Fitted, nan: float | None = None, show: Show = lambda fraction, text: None):
        self.samples, self.fitted, self.nan = samples, fitted, nan
        size = 4 * len(fitted.channels) * math.prod(fitted.shape) * len(samples)
        self.kept: list[Tensor] | None = None
        if size <= machine.free_memory() / 2:
            self.kept = _each(samples, lambda sample: prepared(sample.path, fitted, nan), show)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor:
        return prepared(self.samples[index].path, self.fitted, self.nan) if self.kept is None else self.kept[index]


def _opened(samples: Sequence[Sample], show: Show) -> list[Image]:
    files = _each(samples, lambda sample: open_image(sample.path), show)
    # how large a pixel of a picture is matters to nothing here
    say(dataclasses.replace(file, notes=tuple(note for note in file.notes if note != NO_SIZE)) for file in files)
    return files


def _each(samples: Sequence[Sample], read: Callable[[Sample], Any], show: Show) -> list[Any]:
    """`read` of every sample; UserError with the first 20 lines where some are refused."""
    found, lines = [], []
    for i, sample in enumerate(samples):
        try:
            found.append(read(sample))
        except UserError as error:
            lines.append(str(error))
            if len(lines) == _SHOWN:
                break
        show((i + 1) / len(samples), sample.name)
    if lines:
        raise UserError("\n".join(lines))
    return found


def _channels(files: Sequence[Image]) -> tuple[str, ...]:
    """Names for the channels: all images have as many; a grey picture among those in colour counts as coloured."""
    counts = Counter(file.channels for file in files)
    most = max(counts)
    for file in files:
        if file.channels != most and not (file.channels == 1 and file.format in PICTURES):
            raise UserError(f"{file.path}: expected {most} channel(s), as {counts[most]} other image(s) have, got {file.channels}")
    if all(file.format in PICTURES for file in files) and most in (1, 3):
        return ("grey",) if most == 1 else ("red", "green", "blue")
    return tuple(f"channel_{i}" for i in range(most))


def _with_channels(data: np.ndarray, path: Path, channels: int) -> np.ndarray:
    """Data (c, x, y, z) with that many channels: a grey picture becomes one in colour."""
    if len(data) == channels:
        return data
    if len(data) == 1 and channels == 3:
        return np.repeat(data, channels, axis=0)
    raise UserError(f"{path}: expected {channels} channel(s), got {len(data)}")


def _across(shape: Iterable[int]) -> int:
    """The axis across a plane: the last one of one voxel."""
    return max(axis for axis, size in enumerate(shape) if size == 1)


def _axes(file: Image, dims: int) -> tuple[int, ...]:
    return tuple(axis for axis in range(3) if dims == 3 or axis != _across(ras_grid(file)[1]))


def _lengths(file: Image, dims: int, spacing: Sequence[float] | None) -> list[int]:
    """An image's shape along its axes, at `spacing` where that is given."""
    edges, shape = ras_grid(file)
    wanted = edges if spacing is None else np.array(spacing)
    return [max(1, round(shape[axis] * edges[axis] / wanted[axis])) for axis in _axes(file, dims)]


def _resampled_to(file: Image, spacing: Sequence[float]) -> list[float]:
    """The spacing, with 0 (its own) across a plane."""
    shape = ras_grid(file)[1]
    return [0.0 if size == 1 else edge for size, edge in zip(shape, spacing, strict=True)]
