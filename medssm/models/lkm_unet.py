"""LKM-UNet (Wang et al., arXiv 2403.07332): nnU-Net's residual U-Net with bidirectional Mamba over large windows behind every encoder stage.

What upstream's code does beside the paper, kept for its weights:
- A window is a grid of voxels a fixed step apart: of n stages, stage s has p = 2^((n - s + 1) // 2 - 1), its steps are 5p in 2D and 5p, 7p, 6p in
  3D. Where they do not divide the map, the window is the whole map. `create_model` takes at most half of an axis as its step, at any size.
- Patches of p voxels a side become single voxels where p does not divide the map; `create_model` has smaller last patches.
- The heads of deep supervision are always made; `create_model` makes those that are asked for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

from medssm.models.facts import Facts
from medssm.models.nnunet import Keywords, from_plan, layers_of, of_width, stages_of
from medssm.models.options import only
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn import Decoder, Encoder, UNet
from medssm.nn.blocks import TRANSPOSED_CONV
from medssm.nn.large_kernel import PatchMamba, PixelMamba
from medssm.nn.residual import ConvDropoutNorm, Layers, Stages, basic_stage

_STEPS = {2: (5, 5), 3: (5, 7, 6)}


@register_model(
    "lkm_unet",
    facts=Facts(
        "2403.07332", "wjh892521292/LKM-UNet", "none given", small={"features": (4, 8, 16), "blocks": 1}, from_plan=from_plan, of_width=of_width
    ),
)
def lkm_unet(
    *,
    spatial_dims: int = 3,
    in_channels: int = 1,
    out_channels: int = 2,
    features: Sequence[int] = (32, 64, 128, 256, 320, 320),
    strides: Sequence[int | Sequence[int]] | None = None,
    kernels: int | Sequence[int | Sequence[int]] = 3,
    blocks: int | Sequence[int] = 2,
    decoder_blocks: int | Sequence[int] = 2,
    deep_supervision: bool = False,
    input_size: str = "any",
) -> UNet:
    """LKM-UNet for any input size; logits (b, out_channels, *spatial).

    Args:
        features: channels per stage. strides, kernels: per stage an int or one per axis; strides default to 1, then 2.
        blocks, decoder_blocks: residual blocks per stage, in the decoder one entry fewer, from coarse to fine; an int serves all.
        deep_supervision: a list of logits, the highest resolution first. input_size: "any" pads and crops inside, "strict" raises.
    """
    shape = stages_of(spatial_dims, features, strides, kernels, blocks, decoder_blocks)
    return _network(layers_of(spatial_dims), shape, in_channels, out_channels, deep_supervision, deep_supervision, input_size)


def _network(
    layers: Layers,
    shape: Stages,
    in_channels: int,
    out_channels: int,
    deep_supervision: bool,
    all_heads: bool,
    size: str = "any",
    stem_channels: int | None = None,
    exact: bool = False,
) -> UNet:
    """exact: upstream's windows and patches."""
    n, features, dims = len(shape.features), shape.features, len(shape.strides[0])
    widths = [stem_channels or features[0], *features]
    stem = ConvDropoutNorm(layers, widths[0], shape.kernels[0], act=True, channels_in=in_channels)
    stages = []
    for s, channels in enumerate(features):
        patch = 2 ** ((n - s + 1) // 2 - 1)
        blocks = basic_stage(layers, widths[s], channels, shape.kernels[s], shape.strides[s], shape.blocks[s])
        pixels = PixelMamba(channels, [patch * step for step in _STEPS[dims]], "divide" if exact else "half")
        stages.append(nn.Sequential(OrderedDict(blocks=blocks, pixels=pixels, patches=PatchMamba(channels, patch, exact))))
    ups, up_stages, heads = [], [], []
    for s, count in zip(range(n - 2, -1, -1), shape.decoder_blocks, strict=True):
        stride = shape.strides[s + 1]
        ups.append(TRANSPOSED_CONV[dims](features[s + 1], features[s], stride, stride, bias=layers.conv_bias))
        up_stages.append(basic_stage(layers, 2 * features[s], features[s], shape.kernels[s], 1, count))
        heads.append(layers.conv(features[s], out_channels, 1) if all_heads or s == 0 else None)
    return UNet(Encoder(stem, stages, features, shape.strides), Decoder(ups, up_stages, heads, None, deep_supervision), size=size)


MAP = Map(
    drop=(r"^decoder\.encoder\.", r"\.all_modules\."),
    rename=(
        (r"^encoder\.stem\.convs\.0\.", "encoder.stem."),
        (r"^encoder\.mamba_layers\.(\d+)\.", r"encoder.stages.\1.pixels."),
        (r"^encoder\.w_mamba_layers\.(\d+)\.", r"encoder.stages.\1.patches."),
        (r"^decoder\.stages\.(\d+)\.blocks\.", r"decoder.stages.\1."),
        (r"^decoder\.transpconvs\.", "decoder.upsample_layers."),
    ),
)


@register_upstream("lkm_unet", map=MAP)
def upstream(*, bottleneck_channels: None = None, **keywords: Any) -> UNet:
    """LKM-UNet from upstream's keywords, those of nnU-Net's `Keywords`."""
    only("bottleneck_channels", bottleneck_channels, None)
    given = Keywords(**keywords)
    options: dict[str, Any] = {"stem_channels": given.stem_channels, "exact": True}
    return _network(given.layers(), given.stages(), given.input_channels, given.num_classes, given.deep_supervision, True, **options)
