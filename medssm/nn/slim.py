"""Slim UNETR's block of depthwise convolutions and sparse attention (Pang et al., IEEE TMI 2023), in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from medssm.nn import positions
from medssm.nn.blocks import BATCH_NORM, CONV, LINEAR, TRANSPOSED_CONV, depthwise, enlarge, image, tokens
from medssm.nn.leaf import Leaf


class SparseAttention(Leaf):
    """softmax(q k^T) v among every `step`-th voxel along each axis of (b, c, *spatial), without a scale."""

    def __init__(self, channels: int, heads: int, step: int, spatial_dims: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"heads: expected a number that divides {channels} channels, got {heads}")
        self.heads, self.step = heads, step
        self.qkv = CONV[spatial_dims](channels, 3 * channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> (b, channels, *(spatial / step)), rounded up."""
        every = (slice(None), *[slice(None, None, self.step)] * (x.dim() - 2))
        t = tokens(self.qkv(image(tokens(x)[every].contiguous())))
        q, k, v = t.flatten(1, -2).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)  # (b, heads, n, d) each
        y = functional.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).flatten(-2)
        return image(y.unflatten(1, t.shape[1:-1]))


class SlimBlock(nn.Module):
    """Six residual steps on (b, c, *spatial): a depthwise convolution, two pointwise ones around a depthwise one, an MLP; a depthwise convolution,
    sparse attention spread over the voxels again, an MLP."""

    def __init__(self, channels: int, heads: int, step: int, spatial_dims: int) -> None:
        super().__init__()
        conv, norm = CONV[spatial_dims], BATCH_NORM[spatial_dims]

        def around() -> nn.Module:
            return conv(channels, channels, 3, padding=1, groups=channels, bias=False)

        def mlp() -> nn.Sequential:
            return nn.Sequential(conv(channels, 4 * channels, 1, bias=False), nn.GELU(), conv(4 * channels, channels, 1, bias=False))

        self.place1, self.place2, self.mlp1, self.mlp2 = around(), around(), mlp(), mlp()
        self.before = nn.Sequential(norm(channels), conv(channels, channels, 1, bias=False))
        self.around = around()
        self.behind = nn.Sequential(norm(channels), conv(channels, channels, 1, bias=False))
        self.attention = SparseAttention(channels, heads, step, spatial_dims)
        self.spread = TRANSPOSED_CONV[spatial_dims](channels, channels, step, step, groups=channels)
        self.mix = nn.Sequential(nn.GroupNorm(1, channels), conv(channels, channels, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        x = x + _around(self.place1, x)
        x = x + self.behind(_around(self.around, self.before(x)))
        x = x + self.mlp1(x)
        x = x + _around(self.place2, x)
        x = x + self.mix(enlarge(self.spread, self.attention(x)))
        y: Tensor = x + self.mlp2(x)
        return y


def _around(conv: nn.Module, x: Tensor) -> Tensor:
    return image(depthwise(conv, tokens(x)))


class Middle(nn.Module):
    """Learned positions (1, n, c), dropout and the decoder's first blocks, on (b, c, *spatial). scrambled: the blocks read (voxels, channels) as
    (channels, voxels)."""

    def __init__(self, channels: int, grid: Sequence[int], dropout: float, blocks: nn.Sequential, scrambled: bool) -> None:
        super().__init__()
        self.scrambled = scrambled
        self.grid, self.interpolation = tuple(grid), LINEAR.get(len(grid), "")
        self.pos_embed = nn.Parameter(torch.zeros(1, torch.Size(grid).numel(), channels))
        self.dropout, self.blocks = nn.Dropout(dropout), blocks

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        t = tokens(x)
        t = self.dropout(t + positions.resize_positions(self.pos_embed.unflatten(1, self.grid), t, self.interpolation))
        y: Tensor = self.blocks(t.reshape(x.shape) if self.scrambled else image(t))
        return y
