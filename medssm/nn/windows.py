"""A grid of voxels cut into windows, and back."""

from __future__ import annotations

import itertools

from torch import Tensor


def cut(x: Tensor, side: int) -> Tensor:
    """(b, *(spatial side), c) -> (b, *spatial, *sides, c): a grid cut into cubes."""
    dims = x.dim() - 2
    for axis in range(dims):
        x = x.unflatten(1 + 2 * axis, (-1, side))
    return x.permute(0, *range(1, 1 + 2 * dims, 2), *range(2, 2 + 2 * dims, 2), 1 + 2 * dims)


def joined(x: Tensor) -> Tensor:
    """(b, *spatial, *sides, c) -> (b, *(spatial sides), c), which undoes `cut`."""
    dims = (x.dim() - 2) // 2
    x = x.permute(0, *itertools.chain(*((1 + i, 1 + dims + i) for i in range(dims))), 1 + 2 * dims)
    for axis in range(dims):
        x = x.flatten(1 + axis, 2 + axis)
    return x
