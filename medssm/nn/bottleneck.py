"""Bottleneck: convolutions in the place of a mixer, for the comparison of the two at equal multiply-adds."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medssm.nn.blocks import CONV, image, tokens


class Bottleneck(nn.Module):
    """up(silu(conv(silu(down(x))))) on (b, *spatial, channels): a linear layer to `inner` channels, a full 3^n convolution, a linear layer back
    (the bottleneck of He et al., arXiv 1512.03385, without norms: the block around it has one).

    A voxel sees its neighbours alone. It takes 2 channels inner + 3^n inner^2 multiply-adds for each voxel.
    """

    def __init__(self, channels: int, inner: int, spatial_dims: int) -> None:
        super().__init__()
        self.down = nn.Linear(channels, inner)
        self.conv = CONV[spatial_dims](inner, inner, 3, padding=1)
        self.up = nn.Linear(inner, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, *spatial, channels) -> the same shape."""
        y = nn.functional.silu(self.down(x))
        y = nn.functional.silu(tokens(self.conv(image(y))))
        out: Tensor = self.up(y)
        return out


def as_costly_as(make: Callable[..., nn.Module], channels: int, spatial_dims: int, **options: Any) -> Bottleneck:
    """The Bottleneck whose multiply-adds are nearest to those of make(channels, spatial_dims, **options), by PyTorch's counter."""
    wanted = _multiply_adds(make, channels, spatial_dims, **options)
    voxels: int = 3**spatial_dims
    inner = (math.sqrt(channels**2 + voxels * wanted) - channels) / voxels  # of 2 channels inner + voxels inner^2 = wanted
    return Bottleneck(channels, max(1, round(inner)), spatial_dims)


@cache
def _multiply_adds(make: Callable[..., nn.Module], channels: int, spatial_dims: int, **options: Any) -> float:
    """For each voxel; nothing is computed."""
    side = 8
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad(), counter:
        make(channels, spatial_dims, **options)(torch.empty(1, *(side,) * spatial_dims, channels))
    return float(counter.get_total_flops() / 2 / side**spatial_dims)
