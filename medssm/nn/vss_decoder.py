"""The decoder that mirrors VMamba's encoder (Swin-UMamba-D, Mamba-UNet): patch expansion, skips through a linear layer, SS-ND blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from medssm.nn.blocks import CONV, ChannelLinear, ChannelNorm
from medssm.nn.unet import Encoder
from medssm.nn.vss import PatchExpand, VSSBlock


def vss_decoder(
    features: Sequence[int],
    rates: Sequence[Sequence[float]],
    out_channels: int,
    spatial_dims: int,
    heads: int,
    *,
    norm: bool = False,
    head_bias: bool = True,
    **options: Any,
) -> dict[str, list[Any]]:
    """Decoder's arguments for features from fine to coarse, the finest at a quarter of the resolution; its last level is the image's, without a skip.

    rates: from coarse to fine, the stochastic depths of each level's VSSBlocks, which take `options`. heads: the number of finest levels that have
    logits, of 1 x 1 convolutions with a bias or, by head_bias, none. norm: before the step to the image.
    """
    ups: list[nn.Module] = []
    stages: list[nn.Module] = []
    for level, s in enumerate(range(len(features) - 2, -1, -1)):
        ups.append(PatchExpand(features[s + 1], features[s], spatial_dims))
        blocks = [VSSBlock(features[s], spatial_dims, rate, **options) for rate in rates[level]]
        stages.append(nn.Sequential(ChannelLinear(2 * features[s], features[s]), *blocks))
    last = PatchExpand(features[0], features[0], spatial_dims, 4)
    ups.append(nn.Sequential(ChannelNorm(features[0]), last) if norm else last)
    stages.append(nn.Identity())
    seg_layers = [
        CONV[spatial_dims](features[max(s, 0)], out_channels, 1, bias=head_bias) if s + 1 < heads else None for s in range(len(features) - 2, -2, -1)
    ]
    return {"upsample_layers": ups, "stages": stages, "seg_layers": seg_layers, "joins": [True] * (len(features) - 1) + [False]}


def entrances(encoder: Encoder, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """What the blocks of each stage of `vss_encoder`'s encoder take, the finest first, and what the last ones give."""
    x, taken = encoder.stem(x), []
    for stage in encoder.stages:
        for name, part in stage.named_children():
            if name == "blocks":
                taken.append(x)
            x = part(x)
    return taken, x


def repeated(x: Tensor, channels: int) -> Tensor:
    """(b, 1, *spatial) -> (b, channels, *spatial), the one channel for all of them; an input of more channels as it is."""
    return x.expand(-1, channels, *x.shape[2:]) if x.shape[1] == 1 else x
