"""Convolutional blocks with batch norms: two convolutions, with and without a way around them."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from medssm.nn.blocks import ConvNorm

RELU = partial(nn.ReLU, inplace=True)  # of a fresh map: its pages cost as much as the arithmetic


def double_conv(channels_in: int, channels: int, spatial_dims: int, stride: int = 1) -> nn.Sequential:
    """relu(norm(conv(.))) twice, 3 x 3 (x 3): (b, channels_in, *spatial) -> (b, channels, *(spatial / stride))."""
    first, second = ((channels_in, channels, 3, stride), (channels, channels, 3, 1))
    return nn.Sequential(*(ConvNorm(*sizes, spatial_dims=spatial_dims, bias=True, act=RELU) for sizes in (first, second)))


class BasicBlock(nn.Module):
    """relu(conv2(relu(conv1(x))) + down(x)), batch norms behind the convolutions (ResNet, He et al., arXiv 1512.03385).

    down is a 1 x 1 convolution of every stride-th voxel, or with channels_in None, which stands for `channels`, the identity.
    """

    def __init__(self, channels_in: int | None, channels: int, spatial_dims: int, stride: int = 1) -> None:
        super().__init__()
        self.every: tuple[Any, ...] = (..., *[slice(None, None, stride)] * spatial_dims)
        self.conv1 = ConvNorm(channels_in or channels, channels, 3, stride, spatial_dims=spatial_dims, act=RELU)
        self.conv2 = ConvNorm(channels, channels, 3, spatial_dims=spatial_dims)
        self.down = ConvNorm(channels_in, channels, 1, spatial_dims=spatial_dims) if channels_in else None

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        """(b, channels_in, *spatial) -> (b, channels, *(spatial / stride)); more: another summand before the last ReLU."""
        y = self.conv2(self.conv1(x))
        if more is not None:
            y = y + more
        y = y + (x if self.down is None else self.down(x[self.every]))
        out: Tensor = nn.functional.relu(y, inplace=True)
        return out
