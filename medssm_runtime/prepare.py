"""What a classifier sees of an image: turned to RAS, resampled, scaled, brought to one shape, as medssm.classify.images does it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medssm_runtime.errors import UserError
from medssm_runtime.geometry import at_spacing, resampled, to_ras
from medssm_runtime.intensity import scaling
from medssm_runtime.settings import ClassSettings


def prepared(data: np.ndarray, affine: np.ndarray, how: ClassSettings) -> np.ndarray:
    """An image (c, x, y, z) as the network takes it, (c, *shape) float32.

    Raises UserError for other channels, and for a plane in place of a volume or the reverse.
    """
    count = len(how.channels)
    if len(data) == 1 and count == 3:  # a grey picture among those in colour
        data = np.repeat(data, 3, axis=0)
    if len(data) != count:
        raise UserError(f"expected {count} channel(s), got {len(data)}")
    if (min(data.shape[1:]) == 1) != (len(how.shape) == 2):
        kind = "planes" if len(how.shape) == 2 else "volumes"
        raise UserError(f"{' x '.join(map(str, data.shape[1:]))} voxels, where the network takes {kind}")
    image, grid = to_ras(np.asarray(data, np.float32), np.asarray(affine, float))
    if how.spacing is not None:  # across a plane its own
        wanted = [0.0 if size == 1 else edge for size, edge in zip(grid.shape, how.spacing, strict=True)]
        image = resampled(image, grid, at_spacing(grid, wanted))
    image = scaling(image, how.channels)(image)
    if len(how.shape) == 2:
        image = image.squeeze(1 + max(axis for axis, size in enumerate(image.shape[1:]) if size == 1))
    return np.ascontiguousarray(resized(image, how.shape) if how.sizes == "resize" else padded(image, how.shape), np.float32)


def resized(image: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """An image (c, *spatial) as (c, *shape): linear along one axis after the other, each weighed over as much as a smaller shape leaves out."""
    for axis, size in enumerate(shape, 1):
        if image.shape[axis] != size:
            image = np.moveaxis(np.moveaxis(image, axis, -1) @ _weights(image.shape[axis], size).T, -1, axis)
    return image


def padded(image: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """An image (c, *spatial) padded on both sides with each channel's minimum, and cropped about its middle, to (c, *shape)."""
    pairs = list(zip(image.shape[1:], shape, strict=True))
    before = [max(0, wanted - size) // 2 for size, wanted in pairs]
    grown = np.empty((len(image), *(max(pair) for pair in pairs)), np.float32)
    grown[:] = image.reshape(len(image), -1).min(1).reshape(-1, *[1] * len(shape))
    grown[(slice(None), *(slice(start, start + size) for start, (size, _) in zip(before, pairs, strict=True)))] = image
    first = [n // 2 - wanted // 2 for n, wanted in zip(grown.shape[1:], shape, strict=True)]
    found: np.ndarray = grown[(slice(None), *(slice(start, start + wanted) for start, wanted in zip(first, shape, strict=True)))]
    return found


def _weights(size: int, wanted: int) -> np.ndarray:
    """(wanted, size): how much each voxel counts in each new one: a triangle about the new one's middle, as wide as the larger of two voxels."""
    scale = size / wanted
    middle = (np.arange(wanted)[:, None] + 0.5) * scale - 0.5
    found = np.maximum(0.0, 1 - np.abs(np.arange(size) - middle) / max(scale, 1.0))
    result: np.ndarray = (found / found.sum(1, keepdims=True)).astype(np.float32)
    return result
