"""The decoder that mirrors an encoder such as VMamba's (Swin-UMamba-D, Mamba-UNet, MLLA-UNet): steps up, skips through a linear layer, blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from medssm.nn.blocks import CONV, ChannelLinear, ChannelNorm
from medssm.nn.unet import Encoder, UNet
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
    up: Callable[[int, int], nn.Module] | None = None,
    block: Callable[[int, float], nn.Module] | None = None,
    **options: Any,
) -> dict[str, list[Any]]:
    """Decoder's arguments for features from fine to coarse, the finest at a quarter of the resolution; its last level is the image's, without a skip.

    rates: from coarse to fine, the stochastic depths of each level's blocks: block(s, rate) for features[s], by default a VSSBlock with `options`.
    up(channels_in, channels): the steps to twice the resolution, by default a PatchExpand. norm: before the step to the image. heads: the number of
    finest levels that have logits, of 1 x 1 convolutions with a bias or, by head_bias, none.
    """
    up = up or (lambda a, b: PatchExpand(a, b, spatial_dims))
    block = block or (lambda s, rate: VSSBlock(features[s], spatial_dims, rate, **options))
    ups: list[nn.Module] = []
    stages: list[nn.Module] = []
    for level, s in enumerate(range(len(features) - 2, -1, -1)):
        ups.append(up(features[s + 1], features[s]))
        blocks = [block(s, rate) for rate in rates[level]]
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


class MirrorUNet(UNet):
    """A U-Net with `vss_decoder`'s decoder; its skips are what the blocks of the encoder's stages take. `bottleneck`: on what the last ones give."""

    def whole(self, x: Tensor) -> Tensor | list[Tensor]:
        """(b, in_channels, *spatial) -> (b, out_channels, *spatial), or a list of coarser ones too."""
        logits: Tensor | list[Tensor] = self.decoder(self.maps(x))
        return logits

    def maps(self, x: Tensor) -> list[Tensor]:
        """(b, in_channels, *spatial) -> what the decoder takes, the finest first."""
        assert self.bottleneck is not None
        skips, x = entrances(self.encoder, x)
        return [*skips[:-1], self.bottleneck(x)]
