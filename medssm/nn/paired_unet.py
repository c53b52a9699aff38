"""Encoder and decoder of UNETR++ (Shaker et al., arXiv 2212.04497): stages of paired blocks, in 2D and 3D."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from medssm.nn.blocks import CONV, TRANSPOSED_CONV
from medssm.nn.epa import PairedBlock
from medssm.nn.unet import Encoder, Strides
from medssm.nn.unetr import ResidualBlock

Stage = Callable[[int, int, int], nn.Sequential]  # of (which one, its blocks, their heads)


def paired_stages(features: Sequence[int], grids: Sequence[Sequence[int]], projected: Sequence[int], **options: Any) -> Stage:
    """What makes a stage for features[s], made for maps of grids[s] voxels that are projected to projected[s] tokens. options: of a PairedBlock."""

    def stage(s: int, depth: int, heads: int) -> nn.Sequential:
        return nn.Sequential(*(PairedBlock(features[s], grids[s], heads, projected[s], **options) for _ in range(depth)))

    return stage


def paired_encoder(in_channels: int, features: Sequence[int], depths: Sequence[int], heads: int, strides: Strides, stage: Stage) -> Encoder:
    """Steps to a lower resolution, each a convolution of patches and a norm of as many groups as there were channels or the next divisor below; then
    the blocks."""
    conv, stages = CONV[len(strides[0])], []
    for s, (a, b) in enumerate(itertools.pairwise([in_channels, *features])):
        groups = next(count for count in range(a, 0, -1) if b % count == 0)
        down = nn.Sequential(conv(a, b, strides[s], strides[s], bias=False), nn.GroupNorm(groups, b))
        stages.append(nn.Sequential(OrderedDict(down=down, blocks=stage(s, depths[s], heads))))
    return Encoder(nn.Identity(), stages, features, strides)


def paired_decoder(
    features: Sequence[int], out_channels: int, depths: Sequence[int], heads: int, strides: Strides, stage: Stage, levels: int, norm: str
) -> dict[str, list[Any]]:
    """Decoder's arguments: a level for each stage, whose skip is added, the last at the image's resolution with half of features[0] channels.

    depths: paired blocks from coarse to fine, of all levels but the last, which has a convolutional block with that norm. levels: how many of the
    finest levels have logits.
    """
    dims, outs = len(strides[0]), [features[0] // 2, *features]
    order = range(len(features) - 1, -1, -1)
    stages: list[nn.Module] = [stage(s - 1, depth, heads) for s, depth in zip(order, depths, strict=False)]
    return {
        "upsample_layers": [TRANSPOSED_CONV[dims](outs[s + 1], outs[s], strides[s], strides[s], bias=False) for s in order],
        "stages": [*stages, ResidualBlock(outs[0], outs[0], dims, norm=norm)],
        "seg_layers": [CONV[dims](outs[s], out_channels, 1) if s < levels else None for s in order],
        "joins": ["sum" for _ in order],
    }
