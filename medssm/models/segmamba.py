"""SegMamba (Xing et al., arXiv 2401.13560): a pyramid of tri-orientated Mamba layers under UNETR's convolutional decoder.

What upstream's code does beside the paper, kept for its weights:
- The third direction steps over 64, 32, 16 and 8 "slices" of the four stages, whatever the input: slices of depth only for 128 of them.
  `create_model` takes the first axis of the input instead (`slices=None`).
- A stage hands its features on as they are; only what goes to the decoder is normalised and sent through an MLP, without a residual.
- The first channel count must be 48, and there is no deep supervision: `create_model` has neither limit.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import relu

from medssm.models.facts import Facts, widths
from medssm.models.options import only, per_stage
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn import Decoder, Encoder, TriMamba, UNet
from medssm.nn.blocks import CONV, INSTANCE_NORM, check_dims, image, tokens
from medssm.nn.instance_norm import instance_norm
from medssm.nn.unetr import ResidualBlock, residual_decoder


@register_model(
    "segmamba",
    facts=Facts(
        "2401.13560",
        "ge-xing/SegMamba",
        "none given",
        small={"features": (4, 6, 8), "depths": (1, 1, 1), "hidden": 8},
        input=(4, 96, 96, 96),
        of_width=lambda width, patch: {"features": widths(width, (1, 2, 4, 8)), "hidden": widths(width, [16])[0]},
    ),
)
def segmamba(
    *,
    spatial_dims: int = 3,
    in_channels: int = 1,
    out_channels: int = 2,
    features: Sequence[int] = (48, 96, 192, 384),
    depths: Sequence[int] = (2, 2, 2, 2),
    hidden: int = 768,
    slices: Sequence[int] | None = None,
    residual: bool = True,
    deep_supervision: bool = False,
    input_size: str = "any",
) -> UNet:
    """SegMamba for any input size; logits (b, out_channels, *spatial).

    Args:
        features, depths: channels and Mamba layers per stage; stage s works at 1/2^(s+1) of the resolution. hidden: channels at the bottom.
        slices: of the third direction, one number per stage; None takes the first spatial axis of the stage's map.
        residual: in the convolutional blocks. deep_supervision: a list of logits, the highest resolution first.
        input_size: "any" pads and crops inside, "strict" raises where 2 to the number of stages does not divide the input.
    """
    check_dims(spatial_dims)
    features, n = list(features), len(features)
    depths, slices = per_stage("depths", depths, n), per_stage("slices", slices or [None] * n, n)
    encoder = _encoder(in_channels, features, depths, slices, spatial_dims)
    widths = [in_channels, *features, hidden]
    skips = [ResidualBlock(widths[i], widths[i + 1], spatial_dims, residual) for i in range(n + 1)]
    decoder = Decoder(
        **residual_decoder(widths[1:], out_channels, spatial_dims, n if deep_supervision else 1, residual), deep_supervision=deep_supervision
    )
    return UNet(encoder, decoder, size=input_size, skips=skips)


MAP = Map(
    rename=(
        (r"^vit\.downsample_layers\.(\d)\.", r"encoder.stages.\1.down."),
        (r"^vit\.gscs\.(\d)\.", r"encoder.stages.\1.gsc."),
        (r"^vit\.stages\.(\d)\.", r"encoder.stages.\1.layers."),
        (r"^vit\.mlps\.(\d)\.", r"encoder.outs.\1."),
        (r"\.(conv\d|transp_conv|conv)\.conv\.", r".\1."),
        (r"^encoder(\d)\.layer\.", lambda m: f"skips.{int(m[1]) - 1}."),
        (r"^decoder([2-9])\.transp_conv\.", lambda m: f"decoder.upsample_layers.{5 - int(m[1])}."),
        (r"^decoder([2-9])\.conv_block\.", lambda m: f"decoder.stages.{5 - int(m[1])}.0."),
        (r"^decoder1\.layer\.", "decoder.stages.3.1."),
        (r"^out\.conv\.", "decoder.seg_layers.3."),
    )
)


@register_upstream("segmamba", map=MAP)
def upstream(
    *,
    in_chans: int = 1,
    out_chans: int = 13,
    depths: Sequence[int] = (2, 2, 2, 2),
    feat_size: Sequence[int] = (48, 96, 192, 384),
    drop_path_rate: float = 0,
    layer_scale_init_value: float = 1e-6,
    hidden_size: int = 768,
    norm_name: str = "instance",
    conv_block: bool = True,
    res_block: bool = True,
    spatial_dims: int = 3,
) -> UNet:
    """SegMamba from upstream's keywords; drop_path_rate, layer_scale_init_value and conv_block have no effect there either."""
    only("norm_name", norm_name, "instance")
    return segmamba(
        spatial_dims=spatial_dims,
        in_channels=in_chans,
        out_channels=out_chans,
        features=feat_size,
        depths=depths,
        hidden=hidden_size,
        slices=[64 >> s for s in range(len(feat_size))],
        residual=res_block,
    )


class GatedSpatialConv(nn.Module):
    """x + f(g(g(x)) + p(x)): g a 3 x 3 (x 3) and p, f 1 x 1 convolutions, each with instance norm and ReLU (GSC of the paper)."""

    def __init__(self, channels: int, spatial_dims: int) -> None:
        super().__init__()
        conv = CONV[spatial_dims]
        self.proj, self.proj2 = conv(channels, channels, 3, padding=1), conv(channels, channels, 3, padding=1)
        self.proj3, self.proj4 = conv(channels, channels, 1), conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""

        def through(conv: nn.Module, y: Tensor) -> Tensor:
            return relu(instance_norm(conv(y)), inplace=True)

        return x + through(self.proj4, through(self.proj2, through(self.proj, x)) + through(self.proj3, x))


class MambaLayer(nn.Module):
    """x + mamba(norm(x)) on (b, c, *spatial)."""

    def __init__(self, channels: int, slices: int | None) -> None:
        super().__init__()
        self.norm, self.mamba = nn.LayerNorm(channels), TriMamba(channels, slices=slices)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        t = tokens(x)
        return image(t + self.mamba(self.norm(t))).contiguous()  # the convolutions around it work channel by channel


class Stage(nn.Module):
    """A step to half the resolution, the gated convolutions, the Mamba layers."""

    def __init__(self, down: nn.Sequential, gsc: GatedSpatialConv, layers: Sequence[MambaLayer]) -> None:
        super().__init__()
        self.down, self.gsc, self.layers = down, gsc, nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(self.gsc(self.down(x)))
        return y


class Out(nn.Module):
    """What of a stage's map goes to the decoder: a norm and an MLP."""

    def __init__(self, channels: int, spatial_dims: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = CONV[spatial_dims](channels, 2 * channels, 1), CONV[spatial_dims](2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(nn.functional.gelu(self.fc1(instance_norm(x))))
        return y


def _encoder(in_channels: int, features: Sequence[int], depths: Sequence[int], slices: Sequence[int | None], dims: int) -> Encoder:
    downs = [nn.Sequential(CONV[dims](in_channels, features[0], 7, 2, 3))]
    downs += [nn.Sequential(INSTANCE_NORM[dims](a), CONV[dims](a, b, 2, 2)) for a, b in itertools.pairwise(features)]
    stages = [
        Stage(down, GatedSpatialConv(c, dims), [MambaLayer(c, n) for _ in range(depth)])
        for down, c, depth, n in zip(downs, features, depths, slices, strict=True)
    ]
    return Encoder(nn.Identity(), stages, features, [(2,) * dims] * len(features), [Out(c, dims) for c in features])
