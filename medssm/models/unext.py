"""UNeXt (Valanarasu and Patel, arXiv 2203.04967): convolutions above, shifted MLPs below; 2D, here 3D too.

What upstream's code does beside the paper: it takes three input channels and has one block per level, whatever its keywords say, and the hidden
width of its MLPs is the outer one. In 3D the first linear layer follows a shift along all axes but the last, the second one along the last, as in 2D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from medssm.models.facts import Facts
from medssm.models.options import preset
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn import Decoder, Encoder, UNet
from medssm.nn.blocks import BATCH_NORM, CONV, LINEAR, MAX_POOL, ChannelNorm, check_dims
from medssm.nn.shift import ShiftedBlock
from medssm.nn.vss import drop_paths

SIZES = {"base": (16, 32, 128, 160, 256), "small": (8, 16, 32, 64, 128)}


@register_model(
    "unext",
    facts=Facts("2203.04967", "jeya-maria-jose/UNeXt-pytorch", "MIT", small={"features": (4, 4, 8, 8, 12)}, sizes=tuple(SIZES), input=(3, 256, 256)),
)
def unext(
    *,
    spatial_dims: int = 2,
    in_channels: int = 3,
    out_channels: int = 1,
    size: str = "base",
    features: Sequence[int] | None = None,
    deep_supervision: bool = False,
    input_size: str = "any",
) -> UNet:
    """UNeXt for any input size; logits (b, out_channels, *spatial).

    Args:
        size: "base" (1.5 M parameters in 2D) or "small": presets of features, the channels at 1/2 to 1/32 of the resolution: three convolutional
            levels and two of shifted MLPs.
        deep_supervision: a list of logits, the highest resolution first. input_size: "any" pads and crops inside, "strict" raises.
    """
    return _build(spatial_dims, in_channels, out_channels, features or preset(SIZES, size), deep_supervision, input_size)


def _build(
    dims: int,
    in_channels: int,
    classes: int,
    features: Sequence[int],
    deep_supervision: bool = False,
    input_size: str = "any",
    *,
    drop_path: float = 0.0,
    dropout: float = 0.0,
) -> UNet:
    check_dims(dims)
    if len(features) != 5:
        raise ValueError(f"features: expected five numbers of channels, got {list(features)}")
    conv, norm, widths = CONV[dims], BATCH_NORM[dims], [in_channels, *features]
    rates = drop_paths([1, 1, 1], drop_path)
    stages: list[nn.Module] = [
        nn.Sequential(conv(widths[s], widths[s + 1], 3, padding=1), norm(widths[s + 1]), MAX_POOL[dims](2), nn.ReLU()) for s in range(3)
    ]
    for s in (3, 4):
        down = conv(widths[s], widths[s + 1], 3, 2, 1)
        stages.append(nn.Sequential(down, ChannelNorm(widths[s + 1]), *_mixed(widths[s + 1], dims, rates[s - 3][0], dropout)))
    ups, after, heads = [], [], []
    for s in range(4, -1, -1):
        out = features[max(s - 1, 0)]
        ups.append(nn.Sequential(conv(features[s], out, 3, padding=1), norm(out) if s else nn.Identity(), _Double(dims), nn.ReLU()))
        after.append(nn.Sequential(*_mixed(out, dims, rates[4 - s][0], dropout)) if s > 2 else nn.Identity())
        heads.append(conv(out, classes, 1) if deep_supervision or s == 0 else None)
    encoder = Encoder(nn.Identity(), stages, features, [(2,) * dims] * 5)
    return UNet(encoder, Decoder(ups, after, heads, ["sum"] * 4 + [False], deep_supervision), None, input_size)


def _mixed(channels: int, dims: int, drop_path: float, dropout: float) -> list[nn.Module]:
    return [ShiftedBlock(channels, dims, drop_path, dropout), ChannelNorm(channels)]


class _Double(nn.Upsample):
    def __init__(self, dims: int) -> None:
        super().__init__(scale_factor=2, mode=LINEAR[dims])


MAP = Map(
    rename=(
        (r"\.mlp\.dwconv\.dwconv\.", ".conv."),
        (r"\.mlp\.", "."),
        (r"^encoder(\d)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.0."),
        (r"^ebn(\d)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.1."),
        (r"^patch_embed(\d)\.(proj|norm)\.", lambda m: f"encoder.stages.{m[1]}.{ {'proj': 0, 'norm': 1}[m[2]] }."),
        (r"^block(\d)\.0\.", lambda m: f"encoder.stages.{int(m[1]) + 2}.2."),
        (r"^norm(\d)\.", r"encoder.stages.\1.3."),
        (r"^decoder(\d)\.(?=weight|bias)", lambda m: f"decoder.upsample_layers.{int(m[1]) - 1}.0."),
        (r"^dbn(\d)\.", lambda m: f"decoder.upsample_layers.{int(m[1]) - 1}.1."),
        (r"^dblock(\d)\.0\.", lambda m: f"decoder.stages.{int(m[1]) - 1}.0."),
        (r"^dnorm(\d)\.", lambda m: f"decoder.stages.{int(m[1]) - 3}.1."),
        (r"^final\.", "decoder.seg_layers.4."),
    )
)


@register_upstream("unext", map=MAP)
def upstream(
    *, num_classes: int, embed_dims: Sequence[int] = (128, 160, 256), drop_rate: float = 0.0, drop_path_rate: float = 0.0, **unused: Any
) -> UNet:
    """UNeXt from upstream's keywords, of which these alone change an output."""
    return _build(2, 3, num_classes, (16, 32, *embed_dims[:3]), drop_path=drop_path_rate, dropout=drop_rate)


@register_upstream("unext_s", map=MAP)
def upstream_small(
    *, num_classes: int, embed_dims: Sequence[int] = (32, 64, 128), drop_rate: float = 0.0, drop_path_rate: float = 0.0, **unused: Any
) -> UNet:
    """Upstream's small UNeXt."""
    return _build(2, 3, num_classes, (8, 16, *embed_dims[:3]), drop_path=drop_path_rate, dropout=drop_rate)
