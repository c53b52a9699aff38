"""EMCAD's decoder (Rahman et al., arXiv 2405.06880) for any encoder, in 2D and 3D: attention, multi-scale depthwise blocks, gated skips."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from medssm.nn.attention import ChannelAttention, SpatialAttention
from medssm.nn.blocks import BATCH_NORM, CONV, depthwise, image, tokens
from medssm.nn.enlarged import EnlargedDecoder
from medssm.nn.unet import Encoder

Act = Callable[[], nn.Module]
_REDUCTION = 16  # of the channel attention


class EMCADDecoder(EnlargedDecoder):
    """Every level: to twice the resolution plus the gated skip, but for the coarsest; channel attention, spatial attention (one kernel for all
    levels), a multi-scale block; logits. All logits are brought up by the step that the encoder's first map has from the image.

    Args:
        encoder: any, of whose maps there is a level each. expand: hidden channels of the blocks over outer. kernels: their depthwise kernels, odd.
        parallel: whether each kernel sees the block's input, else each sees it plus what those before it gave. add: whether what they give is summed,
            else it lies side by side. gate_kernel: of the gates. act: the activation of the blocks; elsewhere it is ReLU.
    """

    def __init__(
        self,
        encoder: Encoder,
        out_channels: int,
        spatial_dims: int,
        deep_supervision: bool = False,
        *,
        expand: float = 2,
        kernels: Sequence[int] = (1, 3, 5),
        parallel: bool = True,
        add: bool = True,
        gate_kernel: int = 3,
        act: Act = nn.ReLU,
    ) -> None:
        widths, steps = encoder.output_channels[::-1], encoder.strides[::-1]
        levels, conv = len(widths), CONV[spatial_dims]
        block = partial(MultiScaleBlock, spatial_dims=spatial_dims, expand=expand, kernels=kernels, parallel=parallel, add=add, act=act)
        ups: list[nn.Module] = [nn.Identity(), *(_up(a, b, step, spatial_dims) for a, b, step in zip(widths, widths[1:], steps, strict=False))]
        heads = [conv(width, out_channels, 1) if deep_supervision or level == levels - 1 else None for level, width in enumerate(widths)]
        joins = [False] + ["sum"] * (levels - 1)
        super().__init__(ups, [block(width) for width in widths], heads, joins, deep_supervision, steps=encoder.strides[0])
        pointwise = partial(conv, kernel_size=1, bias=False)
        self.channels = nn.ModuleList(ChannelAttention(w, max(1, w // _REDUCTION), pointwise, peaks=True) for w in widths)
        self.spatial = SpatialAttention(spatial_dims)
        self.gates = nn.ModuleList(Gate(width, spatial_dims, gate_kernel) for width in widths[1:])

    def coarse(self, skips: Sequence[Tensor], all_heads: bool) -> list[Tensor]:
        """The logits at the resolutions of the maps, the finest first."""
        x = skips[-1]
        outputs: list[Tensor] = []  # torch.compile cannot call list[Tensor]
        levels = zip(self.upsample_layers, self.channels, self.stages, self.seg_layers, reversed(skips), strict=True)
        for level, (up, channel, block, head, skip) in enumerate(levels):
            if level:
                x = up(x)
                x = x + self.gates[level - 1](x, skip)
            x = block(self.spatial(channel(x)))
            if head is not None and (all_heads or level == len(skips) - 1):
                outputs.insert(0, head(x))
        return outputs


class MultiScaleBlock(nn.Module):
    """x + down(shuffle(scales(up(x)))): a 1 x 1 convolution to `expand` times the channels, depthwise ones of several sizes, a 1 x 1 one back."""

    def __init__(self, channels: int, *, spatial_dims: int, expand: float, kernels: Sequence[int], parallel: bool, add: bool, act: Act) -> None:
        super().__init__()
        conv, norm, hidden = CONV[spatial_dims], BATCH_NORM[spatial_dims], int(channels * expand)
        self.up = nn.Sequential(conv(channels, hidden, 1, bias=False), norm(hidden), act())
        self.scales = nn.ModuleList(_depthwise(hidden, kernel, spatial_dims, act) for kernel in kernels)
        joined = hidden if add else hidden * len(kernels)
        self.down = nn.Sequential(conv(joined, channels, 1, bias=False), norm(channels))
        self.parallel, self.add, self.groups = parallel, add, math.gcd(joined, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        taken, given = self.up(x), []
        for scale in self.scales:
            given.append(_apply(scale, taken))
            taken = taken if self.parallel else taken + given[-1]
        y = sum(given[1:], given[0]) if self.add else torch.cat(given, 1)
        y = y.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)  # the channels of the groups take turns
        out: Tensor = x + self.down(y)
        return out


class Gate(nn.Module):
    """skip sigmoid(norm(psi(relu(a(x) + b(skip))))), a and b grouped convolutions with a batch norm, psi to one channel (large-kernel grouped
    attention gate)."""

    def __init__(self, channels: int, spatial_dims: int, kernel: int) -> None:
        super().__init__()
        conv, norm, inner = CONV[spatial_dims], BATCH_NORM[spatial_dims], max(1, channels // 2)
        groups = 1 if kernel == 1 else math.gcd(channels, inner)
        self.x, self.skip = (nn.Sequential(conv(channels, inner, kernel, padding=kernel // 2, groups=groups), norm(inner)) for _ in range(2))
        self.psi = nn.Sequential(conv(inner, 1, 1), norm(1))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Two maps (b, channels, *spatial) -> the second one, gated."""
        return skip * torch.sigmoid(self.psi(torch.relu(self.x(x) + self.skip(skip))))


def _depthwise(channels: int, kernel: int, dims: int, act: Act) -> nn.Sequential:
    conv = CONV[dims](channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
    return nn.Sequential(conv, BATCH_NORM[dims](channels), act())


def _apply(layers: Any, x: Tensor) -> Tensor:
    """A `_depthwise` on (b, c, *spatial)."""
    y: Tensor = layers[2](layers[1](image(depthwise(layers[0], tokens(x)))))
    return y


def _up(channels_in: int, channels: int, stride: Sequence[int], dims: int) -> nn.Sequential:
    """Nearest neighbours, a depthwise and a 1 x 1 convolution."""
    up: Any = nn.Upsample(scale_factor=tuple(float(step) for step in stride))
    return nn.Sequential(up, *_depthwise(channels_in, 3, dims, nn.ReLU), CONV[dims](channels_in, channels, 1))
