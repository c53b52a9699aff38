"""MLLA (Han et al., arXiv 2405.16605): a pyramid of linear-attention blocks for classification, here in 3D too and at any input size.

Upstream keeps rotations for one square input size in its weights; here they are made for the size at hand, and those in a file are dropped.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from medssm.models.weights import Map
from medssm.nn import Classifier, Encoder, MLLABlock
from medssm.nn.blocks import BATCH_NORM, CONV, ChannelsLast, check_dims, image, tokens
from medssm.nn.vss import drop_paths

_SIZES = {
    "tiny": ((64, 128, 256, 512), (2, 4, 8, 4), (2, 4, 8, 16), 0.2),
    "small": ((64, 128, 256, 512), (3, 6, 21, 6), (2, 4, 8, 16), 0.3),
    "base": ((96, 192, 384, 768), (3, 6, 21, 6), (3, 6, 12, 24), 0.5),
}


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
    if size not in _SIZES:
        raise ValueError(f"size: expected one of {', '.join(_SIZES)}, got {size!r}")
    preset = _SIZES[size]
    return _build(
        spatial_dims,
        in_channels,
        out_channels,
        features or preset[0],
        depths or preset[1],
        heads or preset[2],
        mlp_ratio,
        preset[3] if drop_path is None else drop_path,
    )


def _build(dims, in_channels, classes, features, depths, heads, mlp_ratio, drop_path, bias=True, dropout=0.0) -> Classifier:
    check_dims(dims)
    if not len(features) == len(depths) == len(heads):
        raise ValueError(f"depths, heads: expected one entry for each of {len(features)} stages, got {list(depths)} and {list(heads)}")
    stages = []
    for s, rates in enumerate(drop_paths(depths, drop_path)):
        steps = [] if s == 0 else [("down", Shrink(features[s - 1], features[s], dims))]
        blocks = [OnImages(features[s], heads[s], dims, mlp_ratio, bias, dropout, rate) for rate in rates]
        stages.append(nn.Sequential(OrderedDict([*steps, ("blocks", nn.Sequential(*blocks))])))
    strides = [(4,) * dims] + [(2,) * dims] * (len(features) - 1)
    return Classifier(Encoder(Stem(in_channels, features[0], dims), stages, features, strides), classes)


class OnImages(MLLABlock):
    """An MLLABlock on (b, c, *spatial)."""

    def forward(self, x: Tensor) -> Tensor:
        return image(super().forward(tokens(x)))


class ConvLayer(nn.Module):
    """act(norm(conv(x))), with a batch norm or none, ReLU or none."""

    def __init__(
        self,
        channels_in: int,
        channels: int,
        dims: int,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm: bool = True,
        act: bool = True,
    ):
        super().__init__()
        self.conv = CONV[dims](channels_in, channels, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = BATCH_NORM[dims](channels) if norm else None
        self.act = nn.ReLU() if act else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x if self.norm is None else self.norm(x)
        return x if self.act is None else self.act(x)


class Stem(nn.Module):
    """(b, c, *spatial) to a quarter of the resolution: a strided convolution, two more around which the map goes, a strided one, a mix."""

    def __init__(self, channels_in: int, channels: int, dims: int):
        super().__init__()
        half = channels // 2
        self.memory = ChannelsLast(dims)
        self.conv1 = ConvLayer(channels_in, half, dims, stride=2)
        self.conv2 = nn.Sequential(ConvLayer(half, half, dims), ConvLayer(half, half, dims, act=False))
        self.conv3 = nn.Sequential(ConvLayer(half, 4 * channels, dims, stride=2), ConvLayer(4 * channels, channels, dims, 1, act=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.memory(x))
        return self.conv3(self.conv2(x) + x)


class Shrink(nn.Module):
    """Half the resolution: four times the new channels, a strided depthwise convolution, and back."""

    def __init__(self, channels_in: int, channels: int, dims: int, ratio: int = 4):
        super().__init__()
        wide = ratio * channels
        self.conv = nn.Sequential(
            ConvLayer(channels_in, wide, dims, 1, bias=True, norm=False),
            ConvLayer(wide, wide, dims, 3, 2, groups=wide, bias=True, norm=False),
            ConvLayer(wide, channels, dims, 1, bias=True, act=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class SequenceBlock(MLLABlock):
    """An MLLABlock on (b, l, c) tokens of an image of `resolution`."""

    def __init__(self, resolution: Sequence[int], *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.resolution = tuple(resolution)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unflatten(1, self.resolution)).flatten(1, -2)


def upstream(
    *,
    img_size=224,
    patch_size=4,
    in_chans=3,
    num_classes=1000,
    embed_dim=96,
    depths=(2, 2, 6, 2),
    num_heads=(3, 6, 12, 24),
    mlp_ratio=4.0,
    qkv_bias=True,
    drop_rate=0.0,
    drop_path_rate=0.1,
    ape=False,
    use_checkpoint=False,
) -> Classifier:
    """MLLA from the keywords of upstream's class; img_size and use_checkpoint change no output."""
    for name, value, known in (("patch_size", patch_size, 4), ("ape", ape, False)):
        if value != known:
            raise ValueError(f"{name}: expected {known!r}, got {value!r}")
    features = [embed_dim * 2**s for s in range(len(depths))]
    return _build(2, in_chans, num_classes, features, depths, num_heads, mlp_ratio, drop_path_rate, qkv_bias, drop_rate)


def upstream_block(dim, input_resolution, num_heads, mlp_ratio=4.0, qkv_bias=True, drop=0.0, drop_path=0.0) -> SequenceBlock:
    """Upstream's MLLABlock: (b, l, dim) tokens of an image of input_resolution."""
    return SequenceBlock(input_resolution, dim, num_heads, 2, mlp_ratio, qkv_bias, drop, drop_path)


_DROP = (r"attn\.rope\.rotations$",)
BLOCK_MAP = Map(drop=_DROP, rename=((r"^(in_proj|act_proj|dwc|attn|out_proj)\.", r"mixer.\1."),))
MAP = Map(
    drop=_DROP,
    rename=(
        (r"^layers\.(\d+)\.blocks\.(\d+)\.(in_proj|act_proj|dwc|attn|out_proj)\.", r"layers.\1.blocks.\2.mixer.\3."),
        (r"^layers\.(\d+)\.downsample\.", lambda found: f"encoder.stages.{int(found[1]) + 1}.down."),
        (r"^layers\.", "encoder.stages."),
        (r"^patch_embed\.", "encoder.stem."),
    ),
)
