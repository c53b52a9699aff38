"""MambaVision (Hatamizadeh and Kautz, arXiv 2407.08083): convolutions on fine maps, scans and attention in windows of coarse ones; for
classification, in 3D too.

What upstream's code does beside the paper, kept for its weights: the bias of a step is added twice (nn.mambavision); a map that windows do not
divide is padded with zeros, which the scans and the attention see.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from medssm.models.facts import Facts
from medssm.models.options import only, per_stage, preset
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn import Classifier, Encoder
from medssm.nn.blocks import BATCH_NORM, CONV, ChannelsLast, check_dims
from medssm.nn.mambavision import MambaVisionMixer, MixerLayer, WindowAttention, Windows
from medssm.nn.vss import DropPath, drop_paths, start_linears

# Layers and heads of each stage, channels of the first stage and of the stem, stochastic depth, layer scale.
SIZES = {
    "tiny": ((1, 3, 8, 4), (2, 4, 8, 16), 80, 32, 0.2, None),
    "tiny2": ((1, 3, 11, 4), (2, 4, 8, 16), 80, 32, 0.2, None),
    "small": ((3, 3, 7, 5), (2, 4, 8, 16), 96, 64, 0.2, None),
    "base": ((3, 3, 10, 5), (2, 4, 8, 16), 128, 64, 0.3, 1e-5),
}


@register_model(
    "mambavision",
    facts=Facts(
        "2407.08083",
        "NVlabs/MambaVision",
        "NVIDIA Source Code License-NC",
        "classify",
        small={"features": 4, "stem": 4, "depths": (1, 1, 2), "heads": (1, 1, 2), "windows": (1, 1, 2)},
        sizes=tuple(SIZES),
        input=(3, 224, 224),
        classes=1000,
        parity="parameter and key counts; outputs of upstream's class around ops.selective_scan",
    ),
)
def mambavision(
    *,
    spatial_dims: int = 2,
    in_channels: int = 3,
    out_channels: int = 1000,
    size: str = "tiny",
    features: int | None = None,
    stem: int | None = None,
    depths: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    windows: Sequence[int] | None = None,
    mlp_ratio: float = 4.0,
    drop_path: float | None = None,
) -> Classifier:
    """MambaVision; class logits (b, out_channels) from an image or a volume of any size.

    Args:
        size: "tiny" (32 M parameters in 2D), "tiny2", "small", "base": presets of what follows.
        features: channels of the first stage, doubled from stage to stage; stem: of the first convolution. depths: layers per stage, which works
            at 1/2^(s+2) of the resolution. The two finest stages have convolutions; of the others' layers the first half, rounded up, scan, and
            the rest attend.
        heads: of the attention per stage. windows: side of the windows per stage; default (8, 8, 14, 7) in 2D, (8, 8, 7, 4) in 3D. The two finest
            stages have neither.
        mlp_ratio: hidden channels of the MLPs over outer. drop_path: stochastic depth at the last layer.
    """
    preset_depths, preset_heads, width, first, rate, scale = preset(SIZES, size)
    return _build(
        spatial_dims,
        in_channels,
        out_channels,
        features or width,
        stem or first,
        depths or preset_depths,
        heads or preset_heads,
        windows or ((8, 8, 14, 7) if spatial_dims == 2 else (8, 8, 7, 4)),
        mlp_ratio,
        rate if drop_path is None else drop_path,
        scale,
    )


def _build(
    dims: int,
    in_channels: int,
    classes: int,
    features: int,
    stem: int,
    depths: Sequence[int],
    heads: Sequence[int],
    windows: Sequence[int],
    mlp_ratio: float,
    drop_path: float,
    scale: float | None = None,
) -> Classifier:
    check_dims(dims)
    n, conv, norm = len(depths), CONV[dims], BATCH_NORM[dims]
    heads, windows = per_stage("heads", heads, n), per_stage("windows", windows, n)
    widths = [features * 2**s for s in range(n)]
    stages = []
    for s, (c, rates) in enumerate(zip(widths, drop_paths(depths, drop_path), strict=True)):
        down = {"down": conv(c // 2, c, 3, 2, 1, bias=False)} if s else {}
        if s < 2:
            blocks: nn.Module = nn.Sequential(*(ConvLayer(c, dims, rate) for rate in rates))
        else:
            scans = -(-len(rates) // 2)
            mixers = [MambaVisionMixer(c, 8, 3, 1) if i < scans else WindowAttention(c, heads[s]) for i in range(len(rates))]
            layers = [MixerLayer(c, mixer, mlp_ratio, rate, scale) for mixer, rate in zip(mixers, rates, strict=True)]
            blocks = Windows(layers, windows[s])
        stages.append(nn.Sequential(OrderedDict(**down, blocks=blocks)))
    steps = [(conv(a, b, 3, 2, 1, bias=False), norm(b, eps=1e-4), nn.ReLU()) for a, b in ((in_channels, stem), (stem, features))]
    encoder = Encoder(nn.Sequential(ChannelsLast(dims), *steps[0], *steps[1]), stages, widths, [(4,) * dims] + [(2,) * dims] * (n - 1))
    model = Classifier(encoder, classes, norm(widths[-1]))
    start_linears(model)
    return model


class ConvLayer(nn.Module):
    """x + norm2(conv2(gelu(norm1(conv1(x))))) on (b, c, *spatial)."""

    def __init__(self, channels: int, spatial_dims: int, drop_path: float) -> None:
        super().__init__()
        conv, norm = CONV[spatial_dims], BATCH_NORM[spatial_dims]
        self.conv1, self.conv2 = conv(channels, channels, 3, padding=1), conv(channels, channels, 3, padding=1)
        self.norm1, self.norm2 = norm(channels), norm(channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        y = self.norm2(self.conv2(nn.functional.gelu(self.norm1(self.conv1(x)), approximate="tanh")))
        out: Tensor = x + self.drop_path(y)
        return out


MAP = Map(
    rename=(
        (r"^patch_embed\.conv_down\.(\d)\.", lambda m: f"encoder.stem.{int(m[1]) + 1}."),
        (r"^levels\.(\d)\.downsample\.reduction\.0\.", lambda m: f"encoder.stages.{int(m[1]) + 1}.down."),
        (r"^levels\.([01])\.", r"encoder.stages.\1."),
        (r"^levels\.(\d)\.blocks\.", r"encoder.stages.\1.blocks.layers."),
    )
)


@register_upstream("mambavision", map=MAP)
def upstream(
    *,
    dim: int,
    in_dim: int,
    depths: Sequence[int],
    window_size: Sequence[int],
    mlp_ratio: float,
    num_heads: Sequence[int],
    drop_path_rate: float = 0.2,
    in_chans: int = 3,
    num_classes: int = 1000,
    qkv_bias: bool = True,
    layer_scale: float | None = None,
    layer_scale_conv: float | None = None,
    resolution: int = 224,
) -> Classifier:
    """MambaVision from upstream's keywords; resolution changes no output."""
    only("qkv_bias", qkv_bias, True)
    only("layer_scale_conv", layer_scale_conv, None)
    return _build(2, in_chans, num_classes, dim, in_dim, depths, num_heads, window_size, mlp_ratio, drop_path_rate, layer_scale)


register_upstream("mambavision_mixer", builder=MambaVisionMixer)
