"""MLLA (Han et al., arXiv 2405.16605): a pyramid of linear-attention blocks for classification, here in 3D too and at any input size.

Upstream keeps rotations for one square input size in its weights; here they are made for the size at hand, and those in a file are dropped.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from medssm.models.facts import Facts
from medssm.models.options import doubled, only, preset
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn import Classifier, Encoder, MLLABlock
from medssm.nn.blocks import ChannelsLast, ConvNorm, check_dims, image, tokens
from medssm.nn.mlla_steps import Shrink
from medssm.nn.vss import drop_paths

SIZES = {
    "tiny": ((64, 128, 256, 512), (2, 4, 8, 4), (2, 4, 8, 16), 0.2),
    "small": ((64, 128, 256, 512), (3, 6, 21, 6), (2, 4, 8, 16), 0.3),
    "base": ((96, 192, 384, 768), (3, 6, 21, 6), (3, 6, 12, 24), 0.5),
}


@register_model(
    "mlla",
    facts=Facts(
        "2405.16605",
        "LeapLabTHU/MLLA",
        "MIT",
        "classify",
        small={"features": (8, 16), "depths": (1, 1), "heads": (2, 2)},
        sizes=tuple(SIZES),
        input=(3, 224, 224),
        classes=1000,
    ),
)
def mlla(
    *,
    spatial_dims: int = 2,
    in_channels: int = 3,
    out_channels: int = 1000,
    size: str = "tiny",
    features: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    mlp_ratio: float = 4.0,
    drop_path: float | None = None,
) -> Classifier:
    """MLLA; class logits (b, out_channels) from an image or a volume of any size.

    Args:
        size: "tiny" (24 M parameters in 2D), "small", "base": presets of features (channels), depths (blocks) and heads per stage, and of
            drop_path (stochastic depth at the last block); stage s works at 1/2^(s+2) of the resolution.
        mlp_ratio: hidden channels of the MLPs over outer.
    """
    preset_features, preset_depths, preset_heads, preset_drop_path = preset(SIZES, size)
    encoder = mlla_encoder(
        spatial_dims,
        in_channels,
        features or preset_features,
        depths or preset_depths,
        heads or preset_heads,
        preset_drop_path if drop_path is None else drop_path,
        mlp_ratio=mlp_ratio,
    )
    return Classifier(encoder, out_channels)


def mlla_encoder(
    dims: int, in_channels: int, features: Sequence[int], depths: Sequence[int], heads: Sequence[int], drop_path: float, **options: Any
) -> Encoder:
    """MLLA's encoder: after the stem, stages of a step to half the resolution, but for the first, and of blocks, which take `options`."""
    check_dims(dims)
    if not len(features) == len(depths) == len(heads):
        raise ValueError(f"depths, heads: expected one entry for each of {len(features)} stages, got {list(depths)} and {list(heads)}")
    stages = []
    for s, rates in enumerate(drop_paths(depths, drop_path)):
        steps = {} if s == 0 else {"down": Shrink(features[s - 1], features[s], dims)}
        blocks = nn.Sequential(*(OnImages(features[s], heads[s], dims, drop_path=rate, **options) for rate in rates))
        stages.append(nn.Sequential(OrderedDict(**steps, blocks=blocks)))
    strides = [(4,) * dims] + [(2,) * dims] * (len(features) - 1)
    return Encoder(Stem(in_channels, features[0], dims), stages, features, strides)


class OnImages(MLLABlock):
    """An MLLABlock on (b, c, *spatial)."""

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        return image(super().forward(tokens(x)))


class Stem(nn.Module):
    """(b, c, *spatial) to a quarter of the resolution: a strided convolution, two more around which the map goes, a strided one, a mix."""

    def __init__(self, channels_in: int, channels: int, dims: int) -> None:
        super().__init__()
        half, layer = channels // 2, partial(ConvNorm, spatial_dims=dims)
        self.memory = ChannelsLast(dims)
        self.conv1 = layer(channels_in, half, stride=2, act=nn.ReLU)
        self.conv2 = nn.Sequential(layer(half, half, act=nn.ReLU), layer(half, half))
        self.conv3 = nn.Sequential(layer(half, 4 * channels, stride=2, act=nn.ReLU), layer(4 * channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels_in, *spatial) -> (b, channels, *(spatial / 4))."""
        x = self.conv1(self.memory(x))
        y: Tensor = self.conv3(self.conv2(x) + x)
        return y


class SequenceBlock(MLLABlock):
    """An MLLABlock on (b, l, c) tokens of an image of `resolution`."""

    def __init__(self, resolution: Sequence[int], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.resolution = tuple(resolution)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, channels) -> the same shape."""
        return super().forward(x.unflatten(1, self.resolution)).flatten(1, -2)


ROTATIONS = (r"attn\.rope\.rotations$",)
ENCODER = (
    (r"\.blocks\.(\d+)\.(in_proj|act_proj|dwc|attn|out_proj)\.", r".blocks.\1.mixer.\2."),
    (r"^layers\.(\d+)\.downsample\.", lambda found: f"encoder.stages.{int(found[1]) + 1}.down."),
    (r"^layers\.", "encoder.stages."),
    (r"^patch_embed\.", "encoder.stem."),
)
MAP = Map(ROTATIONS, ENCODER)


@register_upstream("mlla", map=MAP)
def upstream(
    *,
    img_size: int = 224,
    patch_size: int = 4,
    in_chans: int = 3,
    num_classes: int = 1000,
    embed_dim: int = 96,
    depths: Sequence[int] = (2, 2, 6, 2),
    num_heads: Sequence[int] = (3, 6, 12, 24),
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.1,
    ape: bool = False,
    use_checkpoint: bool = False,
) -> Classifier:
    """MLLA from the keywords of upstream's class; img_size and use_checkpoint change no output."""
    only("patch_size", patch_size, 4)
    only("ape", ape, False)
    features, options = doubled(embed_dim, len(depths)), {"mlp_ratio": mlp_ratio, "bias": qkv_bias, "dropout": drop_rate}
    return Classifier(mlla_encoder(2, in_chans, features, depths, num_heads, drop_path_rate, **options), num_classes)


BLOCK_MAP = Map(drop=ROTATIONS, rename=((r"^(in_proj|act_proj|dwc|attn|out_proj)\.", r"mixer.\1."),))


@register_upstream("mlla_block", map=BLOCK_MAP)
def upstream_block(
    dim: int,
    input_resolution: Sequence[int],
    num_heads: int,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    drop: float = 0.0,
    drop_path: float = 0.0,
) -> SequenceBlock:
    """Upstream's MLLABlock: (b, l, dim) tokens of an image of input_resolution."""
    return SequenceBlock(input_resolution, dim, num_heads, 2, mlp_ratio, qkv_bias, drop, drop_path)
