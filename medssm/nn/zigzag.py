"""Zig-RiR's spatial mixes (Chen et al., IEEE TMI 2025), whose passes walk in zigzag: snakes, whose steps all go to a neighbour."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medssm.nn.rerwkv import QShift, RecurrentSpatialMix, lines
from medssm.orders import snake


def zigzag_mix(channels: int, number: int, spatial_dims: int, mode: str) -> RecurrentSpatialMix:
    """Snakes along each axis in turn; in every other block of a stage from the last voxel."""
    orders = lines(spatial_dims, snake)
    return RecurrentSpatialMix(channels, QShift(), [o.reversed() for o in orders] if number % 2 else orders, mode)


class ScrambledMix(RecurrentSpatialMix):
    """What upstream computes: the second pass walks the first one's steps in zigzag, and no output goes back to its voxel."""

    def __init__(self, channels: int, number: int, spatial_dims: int, mode: str) -> None:
        super().__init__(channels, QShift(), lines(spatial_dims), mode)
        self.vertical = number % 2 == 1
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)  # upstream has its weight and no use for it

    def gated(self, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
        """What the passes make of keys and values (b, height, width, d_model), times r, neither at its own voxel."""
        height, width = k.shape[1:-1]
        first = _zigzag(height, width, self.vertical, k.device)
        second = first[_zigzag(width, height, True, k.device) if self.vertical else first]
        v = self.passes(k.flatten(1, 2), v.flatten(1, 2), [first, second])
        return (r.flatten(1, 2)[:, first] * v[:, second]).view_as(k)


def _zigzag(height: int, width: int, vertical: bool, device: torch.device) -> Tensor:
    """Positions in the order of upstream's walk: rows from the top, every other one turned round; or columns from the right, the odd ones turned."""
    grid = torch.arange(height * width, device=device).view(height, width)
    grid = grid.T.clone() if vertical else grid
    grid[1::2] = grid[1::2].flip(1)
    return (grid.flip(0) if vertical else grid).flatten()
