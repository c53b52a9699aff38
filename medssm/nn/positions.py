"""Learned positions of a grid of patches."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def resize_positions(
    learned: Tensor,  # (1, *grid, c)
    grid: Sequence[int],
    mode: str,
) -> Tensor:
    """The positions (1, *grid, c) of another grid than they were learned for, by nn.functional.interpolate with that mode."""
    if tuple(learned.shape[1:-1]) == tuple(grid):
        return learned
    return nn.functional.interpolate(learned.movedim(-1, 1), list(grid), mode=mode, align_corners=False).movedim(1, -1)
