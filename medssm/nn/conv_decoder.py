"""medssm_unet's decoder, which any encoder may have: steps up, skips beside, full kernels where maps are large, depthwise ones where they are not."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from medssm.nn.blocks import CONV, ChannelsLast, ConvBlock, DenseBlock, Up, half
from medssm.nn.unet import Decoder, Encoder, UNet

_DENSE = 2  # the levels, from full resolution down, whose blocks have full kernels


def conv_stage(level: int, width: int, count: int, spatial_dims: int, kernel: Sequence[int]) -> list[nn.Module]:
    """`count` blocks of a level: dense ones at the finest levels, depthwise ones below."""
    if level < _DENSE:
        return [DenseBlock(width, width, spatial_dims, kernel) for _ in range(count)]
    return [ConvBlock(width, spatial_dims, kernel) for _ in range(count)]


def conv_decoder(
    widths: Sequence[int],
    skips: Sequence[int],
    strides: Sequence[Sequence[int]],
    kernels: Sequence[Sequence[int]],
    depths: Sequence[int],
    out_channels: int,
    spatial_dims: int,
    deep_supervision: bool = False,
) -> Decoder:
    """A decoder of full resolution.

    Args:
        widths, skips, strides, kernels: per level, from full resolution down: channels of the decoder, the coarsest entry the map's that it starts
            from; channels of the skips; steps from the level above; odd sides of the convolutions.
        depths: blocks per level, from coarse to fine, one fewer; without any, the finest level is what is joined there.
        deep_supervision: logits at every level.
    """
    convolution = CONV[spatial_dims]
    ups, stages = [], []
    heads: list[nn.Module | None] = []
    for depth, s in zip(depths, range(len(widths) - 2, -1, -1), strict=True):
        ups.append(Up(widths[s + 1], widths[s], spatial_dims, strides[s + 1]))
        joined, width = widths[s] + skips[s], widths[s]
        blocks: list[nn.Module]
        if s < _DENSE and depth:
            blocks = [DenseBlock(joined, width, spatial_dims, kernels[s]), *conv_stage(s, width, depth - 1, spatial_dims, kernels[s])]
        elif s == 0:
            blocks, width = [], joined
        else:
            blocks = [convolution(joined, width, 1), *conv_stage(s, width, depth, spatial_dims, kernels[s])]
        stages.append(nn.Sequential(*blocks))
        # Full kernels in the heads too: of many inputs, logits learn fast.
        head = convolution(width, out_channels, kernels[s], padding=half(kernels[s]))
        heads.append(head if deep_supervision or s == 0 else None)
    return Decoder(ups, stages, heads, deep_supervision=deep_supervision)


def on_encoder(
    encoder: Encoder, in_channels: int, out_channels: int, spatial_dims: int, width: int, deep_supervision: bool = False, size: str = "any"
) -> UNet:
    """The decoder on any encoder, with a block per level. Where the encoder's first map is not of full resolution, the image itself is the skip
    there, and the decoder has `width` channels."""
    widths, steps = list(encoder.output_channels), list(encoder.strides)
    skips, joints = list(widths), None
    if max(steps[0]) > 1:
        widths, skips, steps = [width, *widths], [in_channels, *skips], [(1,) * spatial_dims, *steps]
        joints = [ChannelsLast(spatial_dims), *(nn.Identity() for _ in encoder.output_channels)]
    kernels, depths = [(3,) * spatial_dims] * len(widths), [1] * (len(widths) - 1)
    return UNet(encoder, conv_decoder(widths, skips, steps, kernels, depths, out_channels, spatial_dims, deep_supervision), None, size, joints)
