"""A volume on another grid, a few rows at a time, so that only these rows are in memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.networks.layers import AffineTransform
from torch import Tensor

from medssm.scratch import Scratch, Store
from medssm.segment.preprocess import geometry

_MARGIN = 2  # rows around those that are asked for: neighbours of an interpolated voxel, and rounding


class Grid(NamedTuple):
    """Where the voxels of a volume lie: affine (4, 4), and shape (x, y, z)."""

    affine: np.ndarray
    shape: tuple[int, ...]


def resampled(read: Callable[[slice], Tensor], grid: Grid, onto: Grid, rows: slice) -> Tensor:
    """The rows of `onto`, (c, rows, y, z), of a volume on `grid`: trilinear, and beyond the border the border's values, as `preprocess.geometry`.

    read: gives rows (c, rows, y, z) of the volume
    """
    if _same(grid, onto):
        return read(rows)
    across = np.linalg.solve(grid.affine, onto.affine)  # from a voxel of `onto` to one of `grid`
    corners = itertools.product((rows.start, rows.stop - 1), *((0, n - 1) for n in onto.shape[1:]))
    seen = across[0] @ np.array([[*corner, 1.0] for corner in corners]).T
    last = grid.shape[0] - 1
    first = min(max(0, math.floor(seen.min()) - _MARGIN), last)
    end = min(max(first, math.ceil(seen.max()) + _MARGIN), last) + 1
    part = read(slice(first, end))
    theta = torch.from_numpy(_shifted(-first) @ across @ _shifted(rows.start)).to(part)
    interpolate = AffineTransform(normalized=False, mode="bilinear", padding_mode="border", align_corners=False, reverse_indexing=True)
    found: Tensor = interpolate(part[None], theta, (rows.stop - rows.start, *onto.shape[1:]))
    return found[0]


def on_spacing(image: Store, grid: Grid, spacing: Sequence[float], scratch: Scratch) -> tuple[Grid, Store]:
    """An image (x, c, y, z) on a grid along RAS axes at `spacing`; itself, where it has that."""
    onto = at_spacing(grid.affine, grid.shape, spacing)
    if _same(grid, onto):
        return onto, image
    x, y, z = onto.shape
    store = scratch.store(x, image.shape[1], y, z)
    for rows in store.slabs():
        store[rows] = resampled(lambda part: image[part].movedim(1, 0), grid, onto, rows).movedim(1, 0)
    return onto, store


def at_spacing(affine: np.ndarray, shape: tuple[int, ...], spacing: Sequence[float]) -> Grid:
    """The grid that a volume has along RAS axes at `spacing`."""
    pending = MetaTensor(torch.zeros(1).expand(1, *shape), affine=torch.from_numpy(affine))
    for step in geometry(spacing).transforms:
        pending = step(pending, lazy=True)
    return Grid(pending.peek_pending_affine().numpy(), tuple(int(n) for n in pending.peek_pending_shape()))


def _same(grid: Grid, other: Grid) -> bool:
    return grid.shape == other.shape and np.allclose(grid.affine, other.affine)


def ras(affine: np.ndarray, shape: tuple[int, ...]) -> Grid:
    """The grid of a volume whose axes are turned to RAS, as `preprocess.geometry` turns them."""
    orientation = nib.io_orientation(affine)
    turned = tuple(shape[axis] for axis in np.argsort(orientation[:, 0]))
    return Grid(affine @ nib.orientations.inv_ornt_aff(orientation, shape), turned)


def _shifted(row: int) -> np.ndarray:
    """The matrix that adds `row` to a voxel's first index."""
    matrix = np.eye(4)
    matrix[0, 3] = row
    return matrix
