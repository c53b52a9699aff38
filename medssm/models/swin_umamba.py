"""Swin-UMamba and Swin-UMamba-D (Liu et al., arXiv 2402.03302): VMamba's encoder under a convolutional or an SS2D decoder; 2D, here 3D too.

What upstream's code does beside the paper: the heads of deep supervision are always made, and the encoder's stochastic depth is always 0.2.
`create_model` makes the heads that are asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from medssm.models.facts import Facts
from medssm.models.options import doubled, only, per_stage
from medssm.models.registry import register_model, register_upstream
from medssm.models.vmamba import EARLY, ENCODER
from medssm.models.weights import Map
from medssm.nn import Decoder, Encoder, UNet
from medssm.nn.blocks import CONV, INSTANCE_NORM, check_dims
from medssm.nn.unetr import ResidualBlock, residual_decoder
from medssm.nn.vss import start_linears, vss_encoder
from medssm.nn.vss_decoder import vss_decoder


@register_model(
    "swin_umamba",
    facts=Facts(
        "2402.03302",
        "JiarunLiu/Swin-UMamba",
        "Apache-2.0",
        small={"features": (4, 8, 16), "depths": (1, 1)},
        input=(1, 256, 256),
        parity="parameter and key counts",
    ),
)
def swin_umamba(
    *,
    spatial_dims: int = 2,
    in_channels: int = 1,
    out_channels: int = 2,
    features: Sequence[int] = (48, 96, 192, 384, 768),
    depths: Sequence[int] = (2, 2, 9, 2),
    hidden: int | None = None,
    drop_path: float = 0.2,
    residual: bool = True,
    deep_supervision: bool = False,
    heads: int | None = None,
    input_size: str = "any",
) -> UNet:
    """Swin-UMamba for any input size; logits (b, out_channels, *spatial).

    Args:
        features: channels of the stem, at 1/2 of the resolution, and of the encoder's stages, at 1/4, 1/8, …; depths: blocks per stage.
        hidden: channels into the decoder, those of the last stage. drop_path: stochastic depth at the last block. residual: in the decoder.
        deep_supervision: a list of logits at 1, 1/2, 1/4 and 1/8. heads: how many of them are made (default those in use).
        input_size: "any" pads and crops inside, "strict" raises.
    """
    check_dims(spatial_dims)
    per_stage("depths", depths, len(features) - 1)  # the stem has no blocks
    if hidden not in (None, features[-1]):
        raise ValueError(f"hidden: expected {features[-1]}, the channels of the last stage, got {hidden}")
    convolution, n = CONV[spatial_dims], len(depths)
    stem = nn.Sequential(convolution(in_channels, features[0], 7, 2, 3), INSTANCE_NORM[spatial_dims](features[0], affine=True))
    stages = vss_encoder(features[0], features[1:], depths, spatial_dims, drop_path, patch=2)
    levels = [stem, nn.Sequential(stages.stem, stages.stages[0]), *stages.stages[1:]]
    encoder = Encoder(nn.Identity(), levels, features, [(2,) * spatial_dims] * (n + 1))
    start_linears(encoder)
    widths = [in_channels, *features]
    skips = [ResidualBlock(a, b, spatial_dims, residual) for a, b in itertools.pairwise(widths)] + [nn.Identity()]
    heads = heads or (n if deep_supervision else 1)
    decoder = Decoder(**residual_decoder([*features, features[-1]], out_channels, spatial_dims, heads, residual), deep_supervision=deep_supervision)
    return UNet(encoder, decoder, size=input_size, skips=skips)


@register_model(
    "swin_umamba_d",
    facts=Facts("2402.03302", "JiarunLiu/Swin-UMamba", "Apache-2.0", small={"features": (8, 16), "depths": (1, 1)}, input=(1, 256, 256)),
)
def swin_umamba_d(
    *,
    spatial_dims: int = 2,
    in_channels: int = 1,
    out_channels: int = 2,
    features: Sequence[int] = (96, 192, 384, 768),
    depths: Sequence[int] = (2, 2, 9, 2),
    drop_path: float = 0.2,
    d_state: int = 16,
    deep_supervision: bool = False,
    heads: int | None = None,
    input_size: str = "any",
) -> UNet:
    """Swin-UMamba-D for any input size, its decoder of two SS2D blocks per level; logits (b, out_channels, *spatial).

    Args:
        features, depths: channels and blocks per encoder stage, at 1/4, 1/8, … of the resolution.
        drop_path: stochastic depth, at the coarse ends of encoder and decoder. d_state: of the decoder's scans.
        deep_supervision: a list of logits at 1, 1/4, 1/8 and 1/16. heads: how many of them are made (default those in use).
        input_size: "any" pads and crops inside, "strict" raises.
    """
    check_dims(spatial_dims)
    per_stage("depths", depths, len(features))
    n = len(features)
    encoder = vss_encoder(in_channels, features, depths, spatial_dims, drop_path)
    rates = torch.linspace(drop_path, 0, 2 * (n - 1), device="cpu").view(-1, 2).tolist()
    heads = heads or (n if deep_supervision else 1)
    decoder = Decoder(**vss_decoder(features, rates, out_channels, spatial_dims, heads, d_state=d_state), deep_supervision=deep_supervision)
    start_linears(encoder)
    start_linears(decoder)
    return UNet(encoder, decoder, size=input_size)


_VSSM = ((r"^vssm_encoder\.", ""), (r"^downsamples\.(\d)\.", r"layers.\1.downsample."))
MAP = Map(
    rename=(
        *_VSSM,
        *EARLY,
        *ENCODER,
        (r"^encoder\.stem\.", "encoder.stages.1.0."),
        (r"^encoder\.stages\.(\d)\.(blocks|down)\.", lambda m: f"encoder.stages.{int(m[1]) + 1}.{'1.' if m[1] == '0' else ''}{m[2]}."),
        (r"^stem\.", "encoder.stages.0."),
        (r"\.(conv\d|transp_conv|conv)\.conv\.", r".\1."),
        (r"^encoder(\d)\.layer\.", lambda m: f"skips.{int(m[1]) - 1}."),
        (r"^decoder([2-9])\.transp_conv\.", lambda m: f"decoder.upsample_layers.{6 - int(m[1])}."),
        (r"^decoder([2-9])\.conv_block\.", lambda m: f"decoder.stages.{6 - int(m[1])}.0."),
        (r"^decoder1\.layer\.", "decoder.stages.4.1."),
        (r"^out_layers\.(\d)\.conv\.", lambda m: f"decoder.seg_layers.{4 - int(m[1])}."),
    )
)


@register_upstream("swin_umamba", map=MAP)
def upstream(
    *,
    in_chans: int = 1,
    out_chans: int = 13,
    feat_size: Sequence[int] = (48, 96, 192, 384, 768),
    drop_path_rate: float = 0,
    layer_scale_init_value: float = 1e-6,
    hidden_size: int = 768,
    norm_name: str = "instance",
    res_block: bool = True,
    spatial_dims: int = 2,
    deep_supervision: bool = False,
) -> UNet:
    """Swin-UMamba from upstream's keywords; drop_path_rate and layer_scale_init_value have no effect there either."""
    only("norm_name", norm_name, "instance")
    return swin_umamba(
        spatial_dims=spatial_dims,
        in_channels=in_chans,
        out_channels=out_chans,
        features=feat_size,
        hidden=hidden_size,
        residual=res_block,
        deep_supervision=deep_supervision,
        heads=4,
    )


MAP_D = Map(
    rename=(
        *_VSSM,
        *EARLY,
        *ENCODER,
        (r"^decoder\.expand_layers\.", "decoder.upsample_layers."),
        (r"^decoder\.concat_back_dim\.(\d)\.", r"decoder.stages.\1.0."),
        (r"^decoder\.stages\.(\d)\.blocks\.(\d)\.", lambda m: f"decoder.stages.{m[1]}.{int(m[2]) + 1}."),
    )
)


@register_upstream("swin_umamba_d", map=MAP_D)
def upstream_d(vss_args: Mapping[str, Any], decoder_args: Mapping[str, Any]) -> UNet:
    """Swin-UMamba-D from upstream's two dictionaries."""
    vss: dict[str, Any] = {
        "patch_size": 4,
        "in_chans": 3,
        "depths": (2, 2, 9, 2),
        "dims": (96, 192, 384, 768),
        "d_state": 16,
        "drop_path_rate": 0.2,
    } | dict(vss_args)
    decoder: dict[str, Any] = {"drop_path_rate": 0.2, "d_state": 16} | dict(decoder_args)
    only("vss_args: patch_size", vss["patch_size"], 4)
    only("vss_args: d_state", vss["d_state"], 16)
    features = doubled(vss["dims"], len(vss["depths"]))
    if list(decoder["features_per_stage"]) != features:
        raise ValueError(f"decoder_args: features_per_stage: expected {features}, the encoder's, got {decoder['features_per_stage']}")
    return swin_umamba_d(
        in_channels=vss["in_chans"],
        out_channels=decoder["num_classes"],
        features=features,
        depths=vss["depths"],
        drop_path=vss["drop_path_rate"],
        d_state=decoder["d_state"],
        heads=len(features),
        deep_supervision=decoder["deep_supervision"],
    )
