"""Learned positions of a grid of patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medssm.ops import modes


@torch.fx.wrap
def resize_positions(
    learned: Tensor,  # (1, *grid, c), or (1, n, c)
    tokens: Tensor,  # (b, *spatial, c)
    mode: str,
) -> Tensor:
    """The positions (1, *spatial, c) of the tokens' grid, interpolated (nn.functional.interpolate's `mode`) where it is another than was learned.

    Of n positions without a grid, which fit every grid of n tokens, none is made for another number: ValueError.
    """
    if learned.dim() == 3 and tokens.dim() > 3:
        if not modes.traced() and learned.shape[1] != tokens.shape[1:-1].numel():
            raise ValueError(f"x: expected a map of {learned.shape[1]} voxels, which the weights are made for, got {tuple(tokens.shape[1:-1])}")
        placed: Tensor = learned.unflatten(1, tokens.shape[1:-1])
        return placed
    if not modes.traced() and learned.shape[1:-1] == tokens.shape[1:-1]:
        return learned  # while tracing the same program serves every size
    return nn.functional.interpolate(learned.movedim(-1, 1), tokens.shape[1:-1], mode=mode, align_corners=False).movedim(1, -1)
