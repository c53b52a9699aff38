"""medssm_unet: our own U-Net. Convolutions where maps are large and channels few, a linear-time mixer where a voxel is worth a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from medssm.models.encoders import encoder as encoder_of
from medssm.models.facts import Facts, Plan
from medssm.models.options import per_axis, per_stage, preset
from medssm.models.registry import register_model
from medssm.nn import Encoder, UNet
from medssm.nn.blocks import CONV, ChannelsLast, ConvBlock, Down, MixerBlock, check_dims, half
from medssm.nn.conv_decoder import conv_decoder, conv_stage, on_encoder
from medssm.nn.mixers import CONVOLUTIONS, MIXERS, make_mixer
from medssm.orders import Order, parse

_SCANS_FROM = 2  # the first stage whose blocks mix
_NONE = "none"  # in the place of a mixer's name


class Size(NamedTuple):
    """features, depths: channels and blocks per stage, from full resolution down; with 0 blocks there the skip is the image itself.
    decoder_depths: blocks per stage of the decoder, from coarse to fine. expand: inner channels over outer, of mixers that have them."""

    features: Sequence[int]
    depths: Sequence[int]
    decoder_depths: Sequence[int]
    expand: float


SIZES = {
    "tiny": Size((7, 16, 48, 96, 160), (0, 1, 1, 2, 1), (1, 1, 1, 0), 1),
    "small": Size((16, 32, 64, 128, 256), (1, 1, 2, 2, 2), (1, 1, 1, 1), 1),
    "base": Size((32, 64, 128, 256, 384, 384), (1, 1, 2, 2, 4, 2), (1, 1, 1, 1, 1), 2),
}


def _from_plan(plan: Plan, given: Mapping[str, Any]) -> dict[str, Any]:
    steps = {} if {"strides", "encoder"} & set(given) else {"strides": plan.strides, "kernels": plan.kernels}
    if {"size", "encoder"} & set(given):
        return steps
    n = len(given.get("features", plan.features))
    return steps | {"features": plan.features, "depths": [1, 1, *[2] * n][:n], "decoder_depths": [1] * (n - 1)}


@register_model(
    "medssm_unet",
    facts=Facts(source="this project", licence="Apache-2.0", small={"size": "tiny"}, sizes=tuple(SIZES), parity="its own", from_plan=_from_plan),
)
def medssm_unet(
    *,
    spatial_dims: int = 3,
    in_channels: int = 1,
    out_channels: int = 2,
    size: str = "small",
    mixer: str = "ss_nd",
    features: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    decoder_depths: Sequence[int] | None = None,
    strides: Sequence[int | Sequence[int]] | None = None,
    kernels: int | Sequence[int | Sequence[int]] = 3,
    scans_from: int | None = None,
    expand: float | None = None,
    d_state: int | None = None,
    orders: Sequence[str | Order] | None = None,
    deep_supervision: bool = False,
    input_size: str = "any",
    encoder: str | None = None,
    encoder_options: Mapping[str, Any] | None = None,
) -> UNet:
    """A U-Net with mixers in its coarser stages: global context in linear time, any input size, 2D and 3D.

    Args:
        size: "tiny" (0.9 M parameters in 3D), "small", "base": presets of what follows.
        mixer: of the coarser stages: "ss_nd" (selective scans along all axes, both ways), "linear_attention" (MLLA's), "gla" (gated linear
            attention), "delta" (gated DeltaNet), "kda", "gdn2", "rwkv7" (its kin), "mamba2", "mamba3" or "rwkv" (the spatial mix); docs/mixers.md
            says which to take when. To see what a mixer is worth: "conv" has in its place convolutions of as many multiply-adds as "ss_nd", "none"
            has nothing.
        features, depths: channels and blocks per stage, from full resolution down; decoder_depths: one entry fewer, from coarse to fine.
        strides: per stage, an int or one per axis (anisotropic spacing); default 1, then 2.
        kernels: of the convolutions, one odd number, or per stage an int or one per axis (1 along an axis of coarse spacing).
        scans_from: the first stage whose blocks have mixers, in the encoder; the stages above are convolutional, as is the decoder.
        expand, d_state: inner channels over outer, and the state, of mixers that have them (medssm.nn.mixers).
        orders: of mixers that scan, also as text ("hilbert()", "raster(axes=(1, 0), reverse=True)"); default every axis, both ways.
        deep_supervision: a list of logits, the highest resolution first.
        input_size: "any" pads and crops inside, "strict" raises where strides do not divide the input.
        encoder, encoder_options: the name of a network of create_model whose encoder is taken, or "pvt_v2_b0" to "pvt_v2_b5", and its options; the
            decoder alone is ours then, and the options of the stages are None; `size` gives its channels at full resolution.

    Returns logits (b, out_channels, *spatial). At inference no statistics cross space: the two finest stages have batch norms, the others
    normalise a voxel's channels.
    """
    check_dims(spatial_dims)
    chosen = preset(SIZES, size)
    if encoder is not None:
        its_own = {"features": features, "depths": depths, "decoder_depths": decoder_depths, "strides": strides, "scans_from": scans_from}
        for option, value in (its_own | {"expand": expand, "d_state": d_state, "orders": orders}).items():
            if value is not None:
                raise ValueError(f"{option}: expected None, as the encoder is {encoder}'s, got {value!r}")
        maps = encoder_of(encoder, spatial_dims, in_channels, encoder_options)
        return on_encoder(maps, in_channels, out_channels, spatial_dims, chosen.features[0], deep_supervision, input_size)
    kinds = MIXERS | CONVOLUTIONS
    if mixer not in kinds and mixer != _NONE:
        raise ValueError(f"mixer: expected one of {', '.join([*kinds, _NONE])}, got {mixer!r}")
    for option, value in (("expand", expand), ("d_state", d_state), ("orders", orders)):
        if mixer == _NONE and value is not None:
            raise ValueError(f"{option}: expected None, as there is no mixer, got {value!r}")
    widths = list(features or chosen.features)
    n = len(widths)
    depths = per_stage("depths", depths or chosen.depths, n)
    decoder_depths = per_stage("decoder_depths", decoder_depths or chosen.decoder_depths, n - 1)
    steps = per_axis("strides", strides or [1] + [2] * (n - 1), n, spatial_dims)
    sizes = per_axis("kernels", kernels, n, spatial_dims)
    if not all(length % 2 for one in sizes for length in one):
        raise ValueError(f"kernels: expected odd numbers, got {kernels}")
    first_scans = _SCANS_FROM if scans_from is None else scans_from
    walks = None if orders is None else [parse(order) if isinstance(order, str) else order for order in orders]
    if expand is None and mixer in kinds and "expand" in kinds[mixer].options:
        expand = chosen.expand

    def stage(s: int) -> list[nn.Module]:
        if s < first_scans:
            return conv_stage(s, widths[s], depths[s], spatial_dims, sizes[s])
        if mixer == _NONE:
            return [ConvBlock(widths[s], spatial_dims, sizes[s]) for _ in range(depths[s])]
        make = partial(make_mixer, mixer, widths[s], spatial_dims, expand=expand, d_state=d_state, orders=walks)
        return [MixerBlock(widths[s], spatial_dims, make(), sizes[s]) for _ in range(depths[s])]

    convolution = CONV[spatial_dims]
    bare = depths[0] == 0
    stem = [ChannelsLast(spatial_dims)] + ([] if bare else [convolution(in_channels, widths[0], sizes[0], padding=half(sizes[0]))])
    stages: list[nn.Module] = [nn.Sequential(*stage(0))]
    for s in range(1, n):
        down: nn.Module = Down(widths[s - 1], widths[s], spatial_dims, steps[s])
        if s == 1 and bare:
            down = convolution(in_channels, widths[1], sizes[1], steps[1], padding=half(sizes[1]))
        stages.append(nn.Sequential(down, *stage(s)))
    skips = [in_channels if bare else widths[0], *widths[1:]]
    decoder = conv_decoder(widths, skips, steps, sizes, decoder_depths, out_channels, spatial_dims, deep_supervision)
    return UNet(Encoder(nn.Sequential(*stem), stages, skips, steps), decoder, None, input_size)
