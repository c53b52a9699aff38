"""VMamba (Liu et al., arXiv 2401.10166): a pyramid of SS2D blocks for classification, here in 3D too.

What upstream's code has, by `forward_type`: v0 to v05, v2 and v3 compute the same and differ in kernels and types; "_noz" leaves the gate out,
"_nozact" its activation; v051d scans the rows four times, v052d twice each way. norm_layer "ln" and "ln2d" differ in memory layout alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from medssm.models.facts import Facts
from medssm.models.options import doubled, only, preset
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn import Classifier
from medssm.nn.vss import start_linears, vss_encoder
from medssm.orders import raster

_ACT = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "sigmoid": nn.Sigmoid}


class Size(NamedTuple):
    """features, depths: channels and blocks per stage. expand: of the scans. drop_path: stochastic depth at the last block."""

    features: Sequence[int]
    depths: Sequence[int]
    expand: float
    drop_path: float


SIZES = {
    "tiny": Size((96, 192, 384, 768), (2, 2, 8, 2), 1.0, 0.2),
    "small": Size((96, 192, 384, 768), (2, 2, 15, 2), 2.0, 0.3),
    "base": Size((128, 256, 512, 1024), (2, 2, 15, 2), 2.0, 0.6),
}


@register_model(
    "vmamba",
    facts=Facts(
        "2401.10166",
        "MzeroMiko/VMamba",
        "MIT",
        "classify",
        small={"features": (8, 16), "depths": (1, 1)},
        sizes=tuple(SIZES),
        input=(3, 224, 224),
        classes=1000,
    ),
)
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
    chosen = preset(SIZES, size, features=features, depths=depths, expand=expand, drop_path=drop_path)
    encoder = vss_encoder(
        in_channels,
        chosen.features,
        chosen.depths,
        spatial_dims,
        chosen.drop_path,
        stem="double",
        down="convolution",
        d_state=d_state,
        expand=chosen.expand,
        mlp_ratio=mlp_ratio,
        gate=gate,
        conv_bias=False,
    )
    model = Classifier(encoder, out_channels)
    start_linears(model)
    return model


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


@register_upstream("vmamba", map=MAP)
def upstream(
    *,
    patch_size: int = 4,
    in_chans: int = 3,
    num_classes: int = 1000,
    depths: Sequence[int] = (2, 2, 9, 2),
    dims: int | Sequence[int] = (96, 192, 384, 768),
    ssm_d_state: int = 16,
    ssm_ratio: float = 2.0,
    ssm_dt_rank: int | str = "auto",
    ssm_act_layer: str = "silu",
    ssm_conv: int = 3,
    ssm_conv_bias: bool = True,
    ssm_drop_rate: float = 0.0,
    ssm_init: str = "v0",
    forward_type: str = "v2",
    mlp_ratio: float = 4.0,
    mlp_act_layer: str = "gelu",
    mlp_drop_rate: float = 0.0,
    gmlp: bool = False,
    drop_path_rate: float = 0.1,
    patch_norm: bool = True,
    norm_layer: str = "LN",
    downsample_version: str = "v2",
    patchembed_version: str = "v1",
    use_checkpoint: bool = False,
    posembed: bool = False,
    imgsize: int = 224,
) -> Classifier:
    """VMamba from the keywords of upstream's VSSM. ssm_init, use_checkpoint and imgsize change no output."""
    downs = {"v1": "merge-pad", "v2": "convolution-2", "v3": "convolution"}
    only("ssm_act_layer", ssm_act_layer.lower(), "silu")
    only("gmlp", gmlp, False)
    only("posembed", posembed, False)
    only("patch_norm", patch_norm, True)
    only("norm_layer", norm_layer.lower(), "ln", "ln2d")
    only("mlp_act_layer", mlp_act_layer.lower(), *_ACT)
    only("downsample_version", downsample_version, *downs)
    only("patchembed_version", patchembed_version, "v1", "v2")
    scan = _forward_type(forward_type) | {"d_state": ssm_d_state, "expand": ssm_ratio, "dt_rank": ssm_dt_rank, "dropout": ssm_drop_rate}
    if forward_type not in ("v0", "v0seq"):  # those have their convolution whatever the caller says
        scan |= {"d_conv": ssm_conv, "conv_bias": ssm_conv_bias}
    encoder = vss_encoder(
        in_chans,
        doubled(dims, len(depths)),
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


def _forward_type(text: str) -> dict[str, Any]:
    """SSND's options for an upstream forward_type."""
    kind, mark, tags = text.partition("_no")
    walks = {"v051d": [raster()] * 4, "v052d": [raster()] * 2 + [raster(reverse=True)] * 2}
    known = ("v0", "v0seq", "v01", "v02", "v03", "v04", "v05", "v2", "v3", *walks)
    gates = {"": "silu", "_no32": "silu", "_noz": None, "_nozact": "linear", "_noz_no32": None, "_nozact_no32": "linear"}
    if kind not in known or mark + tags not in gates:
        raise ValueError(f"forward_type: expected one of {', '.join(known)} with _noz, _nozact or _no32, got {text!r}")
    return {"gate": gates[mark + tags], "orders": walks.get(kind)}
