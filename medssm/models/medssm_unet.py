"""medssm_unet: our own U-Net. Dense convolutions where maps are large and channels few, SS-ND scans where a voxel is worth a token."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from medssm.nn import SSND, Decoder, Encoder, UNet
from medssm.nn.blocks import ChannelsLast, ConvBlock, DenseBlock, Down, MixerBlock, Up

# Channels per stage, blocks per stage, and the first stage (0 is full resolution) whose blocks scan.
_SIZES = {
    "tiny": {"features": (8, 24, 48, 96, 160), "depths": (1, 1, 2, 2, 2), "decoder_depths": (1, 1, 1, 1), "scans_from": 2},
    "small": {"features": (16, 32, 64, 128, 256), "depths": (1, 1, 2, 2, 2), "decoder_depths": (1, 1, 1, 1), "scans_from": 2},
    "base": {"features": (32, 64, 128, 256, 384, 384), "depths": (1, 1, 2, 2, 4, 2), "decoder_depths": (1, 1, 1, 1, 1), "scans_from": 2},
}
_CONV = {2: nn.Conv2d, 3: nn.Conv3d}


def medssm_unet(*, spatial_dims: int = 3, in_channels: int = 1, out_channels: int = 2, size: str = "small", mixer: str = "ss_nd",
                features: Sequence[int] | None = None, depths: Sequence[int] | None = None, decoder_depths: Sequence[int] | None = None, strides=None,
                scans_from: int | None = None, d_state: int = 8, deep_supervision: bool = False, input_size: str = "any") -> UNet:
    """A U-Net whose coarser stages are SS-ND mixers: global context in linear time, any input size, 2D and 3D.

    Args:
        size: "tiny" (1.2 M parameters in 3D), "small", "base": presets of features, depths, decoder_depths and scans_from.
        mixer: of the scanning blocks; "ss_nd".
        features, depths: channels and blocks per stage, from full resolution down; decoder_depths: one entry fewer, from coarse to fine.
        strides: per stage, an int or one per axis (anisotropic spacing); default 1, then 2.
        scans_from: the first stage whose blocks scan, in the encoder; the stages above are convolutional, as is the decoder.
        d_state: of the scans. deep_supervision: a list of logits, the highest resolution first.
        input_size: "any" pads and crops inside, "strict" raises where strides do not divide the input.

    Normalisation is over the channels of a voxel alone. Returns logits (b, out_channels, *spatial).
    """
    if spatial_dims not in _CONV:
        raise ValueError(f"spatial_dims: expected 2 or 3, got {spatial_dims!r}")
    if size not in _SIZES:
        raise ValueError(f"size: expected one of {', '.join(_SIZES)}, got {size!r}")
    if mixer != "ss_nd":
        raise ValueError(f"mixer: expected 'ss_nd', got {mixer!r}")
    preset = _SIZES[size]
    features = list(features or preset["features"])
    n = len(features)
    depths = _list("depths", depths or preset["depths"], n)
    decoder_depths = _list("decoder_depths", decoder_depths or preset["decoder_depths"], n - 1)
    strides = [(s,) * spatial_dims if isinstance(s, int) else tuple(s) for s in _list("strides", strides or [1] + [2] * (n - 1), n)]
    scans_from = preset["scans_from"] if scans_from is None else scans_from

    def stage(s: int, count: int, scans: bool) -> list[nn.Module]:
        if scans:
            return [MixerBlock(features[s], spatial_dims, SSND(features[s], d_state=d_state, spatial_dims=spatial_dims)) for _ in range(count)]
        if s == 0:
            return [DenseBlock(features[0], features[0], spatial_dims) for _ in range(count)]
        return [ConvBlock(features[s], spatial_dims) for _ in range(count)]

    stem = nn.Sequential(ChannelsLast(spatial_dims), _CONV[spatial_dims](in_channels, features[0], 3, padding=1))
    stages = [nn.Sequential(*stage(0, depths[0], scans_from <= 0))]
    stages += [nn.Sequential(Down(features[s - 1], features[s], spatial_dims, strides[s]), *stage(s, depths[s], s >= scans_from)) for s in range(1, n)]
    ups, up_stages, heads = [], [], []
    for i, s in enumerate(range(n - 2, -1, -1)):
        ups.append(Up(features[s + 1], features[s], spatial_dims, strides[s + 1]))
        join = DenseBlock(2 * features[s], features[s], spatial_dims) if s == 0 else _CONV[spatial_dims](2 * features[s], features[s], 1)
        up_stages.append(nn.Sequential(join, *stage(s, decoder_depths[i] - (s == 0), False)))
        heads.append(_CONV[spatial_dims](features[s], out_channels, 1))
    return UNet(Encoder(stem, stages, features, strides), Decoder(ups, up_stages, heads, deep_supervision=deep_supervision), None, input_size)


def _list(name: str, value, length: int) -> list:
    value = list(value)
    if len(value) != length:
        raise ValueError(f"{name}: expected {length} entries, one per stage, got {len(value)}")
    return value
