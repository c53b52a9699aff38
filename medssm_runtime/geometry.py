"""Where voxels lie: a scan's axes turned to RAS and back, and a volume on another grid, as MONAI's Orientation and Spacing compute it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import nibabel as nib
import numpy as np

_TOLERANCE = 1e-3  # millimetres, or voxels, that count as none


class Grid(NamedTuple):
    """affine (4, 4) from voxels to millimetres, and shape (x, y, z)."""

    affine: np.ndarray
    shape: tuple[int, ...]


def to_ras(values: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, Grid]:
    """Values (c, x, y, z) with their axes turned to RAS, a view, and their grid."""
    turn, shape = nib.io_orientation(affine), values.shape[1:]
    turned = nib.apply_orientation(values, np.vstack([[0, 1], np.add(turn, [1, 0])]))
    return turned, Grid(affine @ nib.orientations.inv_ornt_aff(turn, shape), turned.shape[1:])


def from_ras(values: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Values (x, y, z) along RAS axes turned to the axes that `affine` has, a view."""
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.io_orientation(affine))
    return np.asarray(nib.apply_orientation(values, turn))


def edges_of(affine: np.ndarray) -> np.ndarray:
    """A voxel's edges in millimetres, (3,)."""
    edges: np.ndarray = np.linalg.norm(affine[:3, :3], axis=0)
    return edges


def at_spacing(grid: Grid, spacing: Sequence[float]) -> Grid:
    """The grid at `spacing` millimetres (0 keeps an axis) of a volume along RAS axes. A spacing that differs by less than a micron is its own.

    The new axes are those of the volume without shear, orthogonal and from the same corner. A sheared volume may have no first corner; its new grid
    then has the same centre.
    """
    affine, shape = grid.affine, np.array(grid.shape)
    own, wanted = edges_of(affine), np.array(spacing, float)
    edges = np.where((wanted > 0) & (np.abs(own - wanted) > _TOLERANCE), wanted, own)
    axes = affine[:3, :3]
    upper = np.linalg.cholesky(axes.T @ axes).T
    new = np.eye(4)
    new[:3, :3] = axes @ np.linalg.inv(upper) @ np.diag(edges)
    corners = np.array([(*corner, 1.0) for corner in itertools.product(*((0.0, size - 1.0) for size in shape))]).T
    seen = (np.linalg.solve(new, affine) @ corners)[:3]
    count = np.round(np.ptp(seen, axis=1) + 1.0).astype(int)
    first = next((corner for corner, place in zip(corners.T, seen.T, strict=True) if np.allclose(place, seen.min(1))), None)
    if first is None:
        new[:3, 3] = axes @ (shape / 2) + affine[:3, 3] - new[:3, :3] @ (count / 2)
    else:
        new[:3, 3] = (affine @ first)[:3]
    return Grid(new, tuple(int(size) for size in count))


def resampled(values: np.ndarray, grid: Grid, onto: Grid) -> np.ndarray:
    """Values (c, x, y, z) on another grid: trilinear, and beyond the border the border's values. On the same grid they are the values themselves."""
    if grid.shape == onto.shape and np.allclose(grid.affine, onto.affine):
        return values
    across = np.linalg.solve(grid.affine, onto.affine)  # from a voxel of `onto` to one of `grid`
    matrix, shift = across[:3, :3], across[:3, 3]
    if np.abs(matrix - np.diag(np.diag(matrix))).max() * max(onto.shape) > _TOLERANCE:
        return _sheared(values, matrix, shift, onto.shape)
    for axis in sorted(range(3), key=lambda axis: onto.shape[axis] / grid.shape[axis]):  # axes that shrink come first
        values = _along(values, axis + 1, matrix[axis, axis] * np.arange(onto.shape[axis]) + shift[axis])
    return values


def _along(values: np.ndarray, axis: int, places: np.ndarray) -> np.ndarray:
    """Linear between the voxels of one axis."""
    last = values.shape[axis] - 1
    places = places.clip(0, last)
    low = places.astype(int)
    weight = (places - low).astype(np.float32).reshape(-1, *[1] * (values.ndim - 1 - axis))
    found: np.ndarray = values.take(low, axis) * (1 - weight)
    found += values.take(np.minimum(low + 1, last), axis) * weight
    return found


def _sheared(values: np.ndarray, matrix: np.ndarray, shift: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """`resampled` where the axes of both grids are not the same, one plane after the other."""
    found = np.zeros((len(values), *shape), np.float32)
    last = np.array(values.shape[1:]).reshape(3, 1, 1) - 1
    plane = np.stack(np.meshgrid(*map(np.arange, shape[1:]), indexing="ij"))
    inside = np.tensordot(matrix[:, 1:], plane, 1) + shift.reshape(3, 1, 1)
    for x in range(shape[0]):
        places = (inside + (matrix[:, 0] * x).reshape(3, 1, 1)).clip(0, last)
        low = places.astype(int)
        high, weight = np.minimum(low + 1, last), (places - low).astype(np.float32)
        for corner in itertools.product((False, True), repeat=3):
            i, j, k = (high[axis] if up else low[axis] for axis, up in enumerate(corner))
            share = np.prod([weight[axis] if up else 1 - weight[axis] for axis, up in enumerate(corner)], axis=0)
            found[:, x] += values[:, i, j, k] * share
    return found
