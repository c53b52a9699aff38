"""MambaVision (Hatamizadeh and Kautz, arXiv 2407.08083): convolutions on fine maps, scans and attention in windows of coarse ones; for
classification, in 3D too.

What upstream's code does beside the paper, kept for its weights: the bias of a step is added twice (nn.mambavision); a map that windows do not
divide is padded with zeros, which the scans and the attention see.
"""

from __future__ import annotations

from collections.abc import Sequence

from medssm.models.facts import Facts
from medssm.models.options import only, per_stage, preset
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn import Classifier
from medssm.nn.blocks import BATCH_NORM
from medssm.nn.mambavision import MambaVisionMixer
from medssm.nn.mambavision_encoder import Size, mambavision_encoder
from medssm.nn.vss import start_linears

SIZES = {
    "tiny": Size((1, 3, 8, 4), (2, 4, 8, 16), 80, 32, 0.2),
    "tiny2": Size((1, 3, 11, 4), (2, 4, 8, 16), 80, 32, 0.2),
    "small": Size((3, 3, 7, 5), (2, 4, 8, 16), 96, 64, 0.2),
    "base": Size((3, 3, 10, 5), (2, 4, 8, 16), 128, 64, 0.3, 1e-5),
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
    layer_scale: float | None = None,
) -> Classifier:
    """MambaVision; class logits (b, out_channels) from an image or a volume of any size.

    Args:
        size: "tiny" (32 M parameters in 2D), "tiny2", "small", "base": presets of what follows.
        features: channels of the first stage, doubled from stage to stage; stem: of the first convolution. depths: layers per stage, which works
            at 1/2^(s+2) of the resolution. The two finest stages have convolutions; of the others' layers the first half, rounded up, scan, and
            the rest attend.
        heads: of the attention per stage. windows: side of the windows per stage; default (8, 8, 14, 7) in 2D, (8, 8, 7, 4) in 3D. The two finest
            stages have neither.
        mlp_ratio: hidden channels of the MLPs over outer. drop_path: stochastic depth at the last layer. layer_scale: what a weight for each channel
            of the layers' outputs starts from; without it there is none.
    """
    chosen = preset(SIZES, size, depths=depths, heads=heads, features=features, stem=stem, drop_path=drop_path, layer_scale=layer_scale)
    n = len(chosen.depths)
    chosen = chosen._replace(heads=per_stage("heads", chosen.heads, n))
    windows = per_stage("windows", windows or ((8, 8, 14, 7) if spatial_dims == 2 else (8, 8, 7, 4)), n)
    encoder = mambavision_encoder(in_channels, spatial_dims, chosen, windows, mlp_ratio)
    model = Classifier(encoder, out_channels, BATCH_NORM[spatial_dims](encoder.output_channels[-1]))
    start_linears(model)
    return model


MAP = Map(
    rename=(
        (r"^patch_embed\.conv_down\.([03])\.", lambda m: f"encoder.stem.{int(m[1]) // 3 + 1}.conv."),
        (r"^patch_embed\.conv_down\.([14])\.", lambda m: f"encoder.stem.{int(m[1]) // 3 + 1}.norm."),
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
    return mambavision(
        in_channels=in_chans,
        out_channels=num_classes,
        features=dim,
        stem=in_dim,
        depths=depths,
        heads=num_heads,
        windows=window_size,
        mlp_ratio=mlp_ratio,
        drop_path=drop_path_rate,
        layer_scale=layer_scale,
    )


register_upstream("mambavision_mixer", builder=MambaVisionMixer)
