"""VMamba (Liu et al., arXiv 2401.10166): a pyramid of SS2D blocks for classification, here in 3D too; and the encoder of its kin.

What upstream's code has, by `forward_type`: v0 to v05, v2 and v3 compute the same and differ in kernels and types; "_noz" leaves the gate out,
"_nozact" its activation; v051d scans the rows four times, v052d twice each way. norm_layer "ln" and "ln2d" differ in memory layout alone.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import nn

from medssm import orders
from medssm.models.weights import Map
from medssm.nn import Classifier, Encoder, VSSBlock
from medssm.nn.blocks import CONV, ChannelNorm, check_dims
from medssm.nn.vss import PatchMerging, drop_paths, start_linears

_ACT = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "sigmoid": nn.Sigmoid}
_SIZES = {
    "tiny": {"features": (96, 192, 384, 768), "depths": (2, 2, 8, 2), "expand": 1.0, "drop_path": 0.2},
    "small": {"features": (96, 192, 384, 768), "depths": (2, 2, 15, 2), "expand": 2.0, "drop_path": 0.3},
    "base": {"features": (128, 256, 512, 1024), "depths": (2, 2, 15, 2), "expand": 2.0, "drop_path": 0.6},
}


def vmamba(
    *,
    spatial_dims: int = 2,
    in_channels: int = 3,
    out_channels: int = 1000,
    size: str = "tiny",
    features: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    expand: float | None = None,
    drop_path: float | None = None,
    d_state: int = 1,
    mlp_ratio: float = 4.0,
    gate: str | None = None,
) -> Classifier:
    """VMamba's released architecture (v05_noz); class logits (b, out_channels) from an image or a volume of any size.

    Args:
        size: "tiny" (30 M parameters in 2D), "small", "base": presets of features, depths, expand and drop_path.
        features, depths: channels and blocks per stage; stage s works at 1/2^(s+2) of the resolution.
        expand, d_state, gate: of the scans. mlp_ratio: hidden channels of the MLPs over outer. drop_path: stochastic depth at the last block.
    """
    check_dims(spatial_dims)
    if size not in _SIZES:
        raise ValueError(f"size: expected one of {', '.join(_SIZES)}, got {size!r}")
    given = {"features": features, "depths": depths, "expand": expand, "drop_path": drop_path}
    preset = _SIZES[size] | {k: v for k, v in given.items() if v is not None}
    options = {"d_state": d_state, "expand": preset["expand"], "mlp_ratio": mlp_ratio, "gate": gate, "conv_bias": False}
    encoder = vss_encoder(
        in_channels, preset["features"], preset["depths"], spatial_dims, preset["drop_path"], stem="double", down="convolution", **options
    )
    model = Classifier(encoder, out_channels)
    start_linears(model)
    return model


def vss_encoder(
    in_channels: int,
    features: Sequence[int],
    depths: Sequence[int],
    spatial_dims: int = 2,
    drop_path: float = 0.0,
    *,
    patch: int = 4,
    stem: str = "patch",
    down: str = "merge",
    block: Callable[[int, float], nn.Module] | None = None,
    **options,
) -> Encoder:
    """VMamba's encoder: stages of `down` and blocks, after a stem that divides the size by `patch`.

    stem: "patch" (one convolution) or "double" (two, with a norm and GELU between). down: "merge", "merge-pad" (of an odd axis), "convolution"
    or "convolution-2" (its kernel). block(channels, drop_path) makes a block, by default a VSSBlock with `options`.
    """
    check_dims(spatial_dims)
    block = block or (lambda channels, rate: VSSBlock(channels, spatial_dims, rate, **options))
    if len(depths) != len(features):
        raise ValueError(f"depths: expected one entry for each of {len(features)} stages, got {list(depths)}")
    stages = []
    for s, (channels, rates) in enumerate(zip(features, drop_paths(depths, drop_path), strict=True)):
        steps = [] if s == 0 else [("down", _down(down, features[s - 1], channels, spatial_dims))]
        blocks = nn.Sequential(*(block(channels, rate) for rate in rates))
        stages.append(nn.Sequential(OrderedDict([*steps, ("blocks", blocks)])))
    strides = [(patch,) * spatial_dims] + [(2,) * spatial_dims] * (len(features) - 1)
    return Encoder(_stem(stem, in_channels, features[0], patch, spatial_dims), stages, features, strides)


def upstream(
    *,
    patch_size=4,
    in_chans=3,
    num_classes=1000,
    depths=(2, 2, 9, 2),
    dims=(96, 192, 384, 768),
    ssm_d_state=16,
    ssm_ratio=2.0,
    ssm_dt_rank="auto",
    ssm_act_layer="silu",
    ssm_conv=3,
    ssm_conv_bias=True,
    ssm_drop_rate=0.0,
    ssm_init="v0",
    forward_type="v2",
    mlp_ratio=4.0,
    mlp_act_layer="gelu",
    mlp_drop_rate=0.0,
    gmlp=False,
    drop_path_rate=0.1,
    patch_norm=True,
    norm_layer="LN",
    downsample_version="v2",
    patchembed_version="v1",
    use_checkpoint=False,
    posembed=False,
    imgsize=224,
) -> Classifier:
    """VMamba from the keywords of upstream's VSSM. ssm_init, use_checkpoint and imgsize change no output."""
    downs = {"v1": "merge-pad", "v2": "convolution-2", "v3": "convolution"}
    for name, value, known in (
        ("ssm_act_layer", ssm_act_layer.lower(), ("silu",)),
        ("gmlp", gmlp, (False,)),
        ("posembed", posembed, (False,)),
        ("patch_norm", patch_norm, (True,)),
        ("norm_layer", norm_layer.lower(), ("ln", "ln2d")),
        ("mlp_act_layer", mlp_act_layer.lower(), tuple(_ACT)),
        ("downsample_version", downsample_version, tuple(downs)),
        ("patchembed_version", patchembed_version, ("v1", "v2")),
    ):
        if value not in known:
            raise ValueError(f"{name}: expected {' or '.join(map(repr, known))}, got {value!r}")
    features = [dims * 2**s for s in range(len(depths))] if isinstance(dims, int) else dims
    scan = _forward_type(forward_type) | {"d_state": ssm_d_state, "expand": ssm_ratio, "dt_rank": ssm_dt_rank, "dropout": ssm_drop_rate}
    if forward_type not in ("v0", "v0seq"):  # those have their convolution whatever the caller says
        scan |= {"d_conv": ssm_conv, "conv_bias": ssm_conv_bias}
    encoder = vss_encoder(
        in_chans,
        features,
        depths,
        2,
        drop_path_rate,
        patch=patch_size,
        stem={"v1": "patch", "v2": "double"}[patchembed_version],
        down=downs[downsample_version],
        mlp_ratio=mlp_ratio,
        mlp_dropout=mlp_drop_rate,
        act=_ACT[mlp_act_layer.lower()],
        **scan,
    )
    return Classifier(encoder, num_classes)


# The names of VMamba's first releases, and of the repositories that copied it then, become today's.
EARLY = (
    (r"(^|\.)patch_embed\.proj\.", r"\1patch_embed.0."),
    (r"(^|\.)patch_embed\.norm\.", r"\1patch_embed.2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
)
ENCODER = (
    (r"^patch_embed\.(\d)\.", lambda m: f"encoder.stem.{ {'0': 0, '2': 1, '5': 3, '7': 4}[m[1]] }."),
    (r"^layers\.(\d+)\.blocks\.", r"encoder.stages.\1.blocks."),
    (r"^layers\.(\d+)\.downsample\.", lambda m: f"encoder.stages.{int(m[1]) + 1}.down."),
    (r"\.down\.([13])\.", lambda m: f".down.{int(m[1]) // 2}."),
)
MAP = Map(rename=(*EARLY, (r"^norm\.", "classifier.norm."), (r"^head\.", "classifier.head."), *ENCODER, (r"^classifier\.", "")))


def _forward_type(text: str) -> dict:
    """SSND's options for an upstream forward_type."""
    kind, tags = re.fullmatch(r"(.*?)(_no\w+)?", text).groups("")
    walks = {"v051d": [orders.raster()] * 4, "v052d": [orders.raster()] * 2 + [orders.raster(reverse=True)] * 2}
    known = ("v0", "v0seq", "v01", "v02", "v03", "v04", "v05", "v2", "v3", *walks)
    gates = {"": "silu", "_no32": "silu", "_noz": None, "_nozact": "linear", "_noz_no32": None, "_nozact_no32": "linear"}
    if kind not in known or tags not in gates:
        raise ValueError(f"forward_type: expected one of {', '.join(known)} with _noz, _nozact or _no32, got {text!r}")
    return {"gate": gates[tags], "orders": walks.get(kind)}


def _stem(kind: str, channels_in: int, channels: int, patch: int, dims: int) -> nn.Sequential:
    if kind == "patch":
        return nn.Sequential(CONV[dims](channels_in, channels, patch, patch), ChannelNorm(channels))
    step = patch // 2
    return nn.Sequential(
        CONV[dims](channels_in, channels // 2, step + 1, step, 1),
        ChannelNorm(channels // 2),
        nn.GELU(),
        CONV[dims](channels // 2, channels, step + 1, step, 1),
        ChannelNorm(channels),
    )


def _down(kind: str, channels_in: int, channels: int, dims: int) -> nn.Module:
    if kind.startswith("merge"):
        return PatchMerging(channels_in, dims, channels, pad=kind == "merge-pad")
    kernel, padding = (2, 0) if kind == "convolution-2" else (3, 1)
    return nn.Sequential(CONV[dims](channels_in, channels, kernel, 2, padding), ChannelNorm(channels))
