"""Learned positions of a grid of patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medssm.ops import modes


@torch.fx.wrap
def resize_positions(
    learned: Tensor,  # (1, *grid, c)
    tokens: Tensor,  # (b, *spatial, c)
    mode: str,
) -> Tensor:
    """The positions (1, *spatial, c) of the tokens' grid, interpolated (nn.functional.interpolate's `mode`) where it is another than was learned."""
    if not modes.traced() and learned.shape[1:-1] == tokens.shape[1:-1]:
        return learned  # while tracing the same program serves every size
    return nn.functional.interpolate(learned.movedim(-1, 1), tokens.shape[1:-1], mode=mode, align_corners=False).movedim(1, -1)
