"""Parts of EGE-UNet (Ruan et al., arXiv 2307.08473): learned maps that multiply groups of channels, gates on the skips and the decoder of these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate

from medssm.nn.blocks import CONV, LINEAR, ChannelNorm
from medssm.nn.leaf import Leaf
from medssm.nn.light import doubling
from medssm.nn.unet import Decoder

_EPS = 1e-6
_DILATIONS = (1, 2, 5, 7)
_START = 8  # voxels along each axis of a learned map, which is interpolated to the size at hand


class GatedDecoder(Decoder):
    """Each level: a stage, to twice the resolution but for the first, GELU, plus what the level's gate makes of its skip, the gated skip below and
    the level's coarse prediction. The last head's output is brought to twice the resolution."""

    def __init__(
        self, gates: Sequence[nn.Module], stages: Sequence[nn.Module], heads: Sequence[nn.Module | None], supervised: bool, spatial_dims: int
    ) -> None:
        super().__init__([], [*stages, nn.Identity()], heads, deep_supervision=supervised)
        self.gates, self.upsample, self.levels = nn.ModuleList(gates), doubling(spatial_dims), len(heads)

    def supervise(self, levels: int) -> None:
        """As Decoder's, but every head stays, and learns: its output gates a skip."""
        self.levels = levels

    def forward(self, skips: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Six maps, the finest first, the last two of one resolution -> logits, or their list, the finest first."""
        x = below = skips[-1]
        outputs: list[Tensor] = []
        for level, (gate, skip) in enumerate(zip(self.gates, reversed(skips[:-1]), strict=True)):
            x, head = self.stages[level](x), self.seg_layers[level]
            x = gelu(self.upsample(x) if level else x)
            coarse = gate.predict(x) if head is None else head(x)
            below = gate(below, skip, coarse)
            x = x + below
            outputs.insert(0, coarse)
        finest: Tensor = self.upsample(self.seg_layers[-1](x))
        return [finest, *outputs][: self.levels] if self.deep_supervision else finest


class Gate(Leaf):
    """Group aggregation bridge: quarters of the level below and of the skip, with the coarse prediction, each normed and convolved with its own
    dilation; a norm and a 1 x 1 convolution of all.

    supervised: channels of the coarse prediction. predicts: whether `predict`, a 1 x 1 convolution to one channel, makes it.
    """

    def __init__(self, channels_below: int, channels: int, supervised: int, spatial_dims: int, predicts: bool) -> None:
        super().__init__()
        conv, quarter = CONV[spatial_dims], channels // 2 + supervised
        self.below = conv(channels_below, channels, 1)
        self.groups = nn.ModuleList(
            nn.Sequential(ChannelNorm(quarter, _EPS), conv(quarter, quarter, 3, padding=d, dilation=d, groups=quarter)) for d in _DILATIONS
        )
        self.tail = nn.Sequential(ChannelNorm(4 * quarter, _EPS), conv(4 * quarter, channels, 1))
        self.predict = conv(channels, 1, 1) if predicts else None

    def forward(self, below: Tensor, skip: Tensor, coarse: Tensor) -> Tensor:
        """Maps (b, channels_below, *coarser), (b, channels, *spatial), (b, supervised, *spatial) -> (b, channels, *spatial)."""
        below = interpolate(self.below(below), skip.shape[2:], mode=LINEAR[skip.dim() - 2], align_corners=True)
        parts = zip(self.groups, below.chunk(4, 1), skip.chunk(4, 1), strict=True)
        y: Tensor = self.tail(torch.cat([group(torch.cat((a, b, coarse), 1)) for group, a, b in parts], 1))
        return y


class MultiAxisProduct(Leaf):
    """Grouped multi-axis Hadamard product: groups of channels are multiplied by learned maps over all spatial axes, or over the channels and one
    axis; the last group is convolved. Norms over channels before and behind, then a depthwise and a 1 x 1 convolution.

    maps: for all axes together (1, c, *start), then one (1, 1, c, start) per axis; each is interpolated to the size at hand, then convolved.
    """

    def __init__(self, channels_in: int, channels: int, spatial_dims: int) -> None:
        super().__init__()
        conv, groups = CONV[spatial_dims], spatial_dims + 2
        if channels_in < groups:
            raise ValueError(f"features: expected at least {groups} channels at an eighth of the resolution and below, got {channels_in}")
        self.sizes = [channels_in * (i + 1) // groups - channels_in * i // groups for i in range(groups)]
        whole, *axes, rest = self.sizes
        self.maps = nn.ParameterList([torch.ones(1, whole, *[_START] * spatial_dims), *(torch.ones(1, 1, c, _START) for c in axes)])
        self.convs = nn.ModuleList([_depthwise_first(conv, whole, whole), *(_depthwise_first(nn.Conv1d, c, c) for c in axes)])
        self.rest = nn.Sequential(conv(rest, rest, 1), nn.GELU(), conv(rest, rest, 3, padding=1, groups=rest))
        self.norm1, self.norm2 = ChannelNorm(channels_in, _EPS), ChannelNorm(channels_in, _EPS)
        self.out = _depthwise_first(conv, channels_in, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels_in, *spatial) -> (b, channels, *spatial)."""
        first, *axes, last = self.norm1(x).split(self.sizes, 1)
        size = x.shape[2:]
        parts = [first * self.convs[0](interpolate(self.maps[0], size, mode=LINEAR[len(size)], align_corners=True))]
        for axis, part in enumerate(axes):
            scale = self.convs[1 + axis](interpolate(self.maps[1 + axis][0], size[axis], mode="linear", align_corners=True))
            parts.append(part * scale[(..., *(slice(None) if i == axis else None for i in range(len(size))))])
        y: Tensor = self.out(self.norm2(torch.cat([*parts, self.rest(last)], 1)))
        return y


def _depthwise_first(conv: Any, channels_in: int, channels: int) -> nn.Sequential:
    return nn.Sequential(conv(channels_in, channels_in, 3, padding=1, groups=channels_in), nn.GELU(), conv(channels_in, channels, 1))
