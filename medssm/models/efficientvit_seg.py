"""EfficientViT for segmentation (Cai et al., arXiv 2205.14756), here in 3D too: convolutions first, multi-scale ReLU linear attention in the two
coarsest stages, and a light head that adds the three coarsest maps at an eighth of the resolution.

Upstream answers at that eighth; create_model's network enlarges its logits to the input's size, as the other networks here do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from medssm.models.facts import Facts
from medssm.models.options import only, preset
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn import Encoder
from medssm.nn.blocks import CUBIC, LINEAR, ChannelsLast, ConvNorm, check_dims
from medssm.nn.efficientvit import EfficientViTBlock, MBConv, Residual
from medssm.nn.leaf import Leaf
from medssm.nn.unet import NARROW, AnySize

_gelu = partial(nn.GELU, approximate="tanh")


class Head(NamedTuple):
    """width: channels. depth: blocks. expand: of the blocks. final: the channels before the logits over width, or None. fused: kind of blocks."""

    width: int
    depth: int
    expand: int = 4
    final: int | None = 4
    fused: bool = False


class Size(NamedTuple):
    """features, depths: channels and blocks of the five stages, from half resolution down. dim: channels of an attention head. large: the
    family of upstream's l sizes, with GELU and fused convolutions, else the b sizes'. heads: by the data set that upstream made them for."""

    features: Sequence[int]
    depths: Sequence[int]
    dim: int
    large: bool
    heads: dict[str, Head]


def _heads(width: int, depth: int) -> dict[str, Head]:
    return {"cityscapes": Head(width, depth), "ade20k": Head(width, depth, final=None)}


def _large_heads(depth: int) -> dict[str, Head]:
    return {"cityscapes": Head(256, depth, 1, None, True), "ade20k": Head(128, 3, 4, 8, True)}


SIZES = {
    "b0": Size((8, 16, 32, 64, 128), (1, 2, 2, 2, 2), 16, False, {"cityscapes": Head(32, 1)}),
    "b1": Size((16, 32, 64, 128, 256), (1, 2, 3, 3, 4), 16, False, _heads(64, 3)),
    "b2": Size((24, 48, 96, 192, 384), (1, 3, 4, 4, 6), 32, False, _heads(96, 3)),
    "b3": Size((32, 64, 128, 256, 512), (1, 4, 6, 6, 9), 32, False, _heads(128, 3)),
    "l1": Size((32, 64, 128, 256, 512), (1, 1, 1, 6, 6), 32, True, _large_heads(3)),
    "l2": Size((32, 64, 128, 256, 512), (1, 2, 2, 8, 8), 32, True, _large_heads(5)),
}
_CLASSES = {"cityscapes": 19, "ade20k": 150}


@register_model("efficientvit_seg", facts=Facts("2205.14756", "mit-han-lab/efficientvit", "Apache-2.0", input=(3, 256, 256), classes=19))
def efficientvit_seg(*, spatial_dims: int = 2, in_channels: int = 3, out_channels: int = 19, size: str = "b0", input_size: str = "any") -> AnySize:
    """EfficientViT for segmentation; logits (b, out_channels, *spatial) from an input of any size.

    Args:
        size: "b0" (0.7 M parameters in 2D), "b1", "b2", "b3", "l1" or "l2"; the heads are those that upstream has for Cityscapes.
        input_size: "any" pads and crops inside, "strict" raises where 32 does not divide the input.
    """
    return _build(size, "cityscapes", spatial_dims, in_channels, out_channels, enlarge=True, input_size=input_size)


def upstream(size: str, *, dataset: str, n_classes: int | None = None, norm_eps: float = 1e-5) -> AnySize:
    """Upstream's efficientvit_seg_<size>(dataset): logits at an eighth of the resolution. norm_eps: of the batch norms; upstream's released
    models set it after building, to 1e-5 (b) and 1e-7 (l)."""
    only("dataset", dataset, *SIZES[size].heads)
    return _build(size, dataset, 2, 3, n_classes or _CLASSES[dataset], norm_eps=norm_eps)


def _build(
    size: str, dataset: str, dims: int, in_channels: int, classes: int, enlarge: bool = False, input_size: str = "any", norm_eps: float = 1e-5
) -> AnySize:
    check_dims(dims)
    chosen = preset(SIZES, size)
    act = _gelu if chosen.large else nn.Hardswish
    stages = (_large_stages if chosen.large else _stages)(in_channels, chosen, act, {"spatial_dims": dims, "norm_eps": norm_eps})
    encoder = Encoder(ChannelsLast(dims), stages, chosen.features, [(2,) * dims] * 5)
    head = SegHead(chosen.features[:1:-1], chosen.heads[dataset], classes, act, dims, norm_eps)
    return EfficientViTSeg(encoder, head, enlarge, input_size)


class EfficientViTSeg(AnySize):
    """The encoder and the head; enlarge: logits at the input's size, not at an eighth of it."""

    def __init__(self, encoder: Encoder, head: SegHead, enlarge: bool, input_size: str) -> None:
        super().__init__((32,) * len(encoder.strides[0]), input_size)
        self.narrow = max(encoder.output_channels) <= NARROW
        self.encoder, self.seg_head, self.enlarge = encoder, head, enlarge

    def whole(self, x: Tensor) -> Tensor:
        """(b, in_channels, *spatial) -> (b, classes, *spatial), or at an eighth of the resolution."""
        logits: Tensor = self.seg_head(self.encoder(x)[:1:-1])
        return nn.functional.interpolate(logits, x.shape[2:], mode=LINEAR[len(self.size_divisor)]) if self.enlarge else logits


class SegHead(nn.Module):
    """Maps at 1/32, 1/16 and 1/8 of the resolution, in this order, each mixed to `head.width` channels and enlarged to the last, added, then
    blocks and logits."""

    def __init__(self, channels: Sequence[int], head: Head, classes: int, act: Callable[[], nn.Module], dims: int, norm_eps: float) -> None:
        super().__init__()
        common: dict[str, Any] = {"spatial_dims": dims, "norm_eps": norm_eps}
        width, block = head.width, FusedMBConv if head.fused else MBConv
        inputs = [ConvNorm(c, width, 1, **common) for c in channels]
        self.input_ops = nn.ModuleList([*(nn.Sequential(conv, _Enlarge(4 // 2**i, dims)) for i, conv in enumerate(inputs[:-1])), inputs[-1]])
        self.middle = nn.Sequential(*(Residual(block(width, width, expand=head.expand, act=act, **common)) for _ in range(head.depth)))
        last = width * (head.final or 1)
        widen = [ConvNorm(width, last, 1, act=act, **common)] if head.final else []
        logits = ConvNorm(last, classes, 1, bias=True, norm=False, spatial_dims=dims)
        self.output_ops = nn.Sequential(nn.Sequential(*widen, logits))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Three maps (b, c, *spatial), the coarsest first -> (b, classes, *spatial) at the last one's resolution."""
        coarse, middle, fine = (op(x) for op, x in zip(self.input_ops, maps, strict=True))
        logits: Tensor = self.output_ops(self.middle(coarse + middle + fine))
        return logits


class _Enlarge(Leaf):
    """Cubic (in 3D linear) interpolation by a factor."""

    def __init__(self, factor: int, dims: int) -> None:
        super().__init__()
        self.factor, self.mode = factor, CUBIC[dims]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(x, [n * self.factor for n in x.shape[2:]], mode=self.mode, align_corners=False)


class DSConv(nn.Module):
    """A depthwise convolution with activation, then a pointwise one without."""

    def __init__(self, channels: int, *, act: Callable[[], nn.Module], **common: Any) -> None:
        super().__init__()
        self.depth_conv = ConvNorm(channels, channels, 3, groups=channels, act=act, **common)
        self.point_conv = ConvNorm(channels, channels, 1, **common)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        y: Tensor = self.point_conv(self.depth_conv(x))
        return y


class ResBlock(nn.Module):
    """Two full convolutions, an activation between."""

    def __init__(self, channels: int, *, act: Callable[[], nn.Module], **common: Any) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 3, act=act, **common)
        self.conv2 = ConvNorm(channels, channels, 3, **common)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        y: Tensor = self.conv2(self.conv1(x))
        return y


class FusedMBConv(nn.Module):
    """A full convolution to expand * channels_in with activation, then a pointwise one without."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1, *, expand: float, act: Callable[[], nn.Module], **common: Any) -> None:
        super().__init__()
        wide = round(channels_in * expand)
        self.spatial_conv = ConvNorm(channels_in, wide, 3, stride, act=act, **common)
        self.point_conv = ConvNorm(wide, channels, 1, **common)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels_in, *spatial) -> (b, channels, *(spatial / stride))."""
        y: Tensor = self.point_conv(self.spatial_conv(x))
        return y


class _Main(nn.Module):
    """`main` alone: where the resolution changes there is no way around."""

    def __init__(self, main: nn.Module) -> None:
        super().__init__()
        self.main = main

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.main(x)
        return y


def _stages(in_channels: int, size: Size, act: Callable[[], nn.Module], common: dict[str, Any]) -> list[nn.Module]:
    """The b family: inverted bottlenecks, attention behind the first of them in the two coarsest stages."""
    widths, depths = size.features, size.depths
    stem = [ConvNorm(in_channels, widths[0], 3, 2, act=act, **common)]
    stages: list[nn.Module] = [nn.Sequential(*stem, *(Residual(DSConv(widths[0], act=act, **common)) for _ in range(depths[0])))]
    for s in (1, 2):
        down = _Main(MBConv(widths[s - 1], widths[s], 2, act=act, **common))
        stages.append(nn.Sequential(down, *(Residual(MBConv(widths[s], widths[s], act=act, **common)) for _ in range(depths[s] - 1))))
    for s in (3, 4):
        down = _Main(MBConv(widths[s - 1], widths[s], 2, act=act, fewer_norm=True, **common))
        stages.append(nn.Sequential(down, *(EfficientViTBlock(widths[s], dim=size.dim, act=act, **common) for _ in range(depths[s]))))
    return stages


def _large_stages(in_channels: int, size: Size, act: Callable[[], nn.Module], common: dict[str, Any]) -> list[nn.Module]:
    """The l family: full convolutions, then fused bottlenecks, inverted ones in the fourth stage, attention in the coarsest."""
    widths, depths = size.features, size.depths
    stem = [ConvNorm(in_channels, widths[0], 3, 2, act=act, **common)]
    stages: list[nn.Module] = [nn.Sequential(*stem, *(Residual(ResBlock(widths[0], act=act, **common)) for _ in range(depths[0])))]
    for s in (1, 2):
        down = _Main(FusedMBConv(widths[s - 1], widths[s], 2, expand=16, act=act, **common))
        stages.append(nn.Sequential(down, *(Residual(FusedMBConv(widths[s], widths[s], expand=4, act=act, **common)) for _ in range(depths[s]))))
    blocks: tuple[tuple[int, int, Callable[..., nn.Module]], ...] = ((3, 4, _bottleneck), (4, 6, partial(EfficientViTBlock, dim=size.dim)))
    for s, expand, block in blocks:
        down = _Main(MBConv(widths[s - 1], widths[s], 2, expand=4 * expand, act=act, fewer_norm=True, **common))
        stages.append(nn.Sequential(down, *(block(widths[s], expand=expand, act=act, **common) for _ in range(depths[s]))))
    return stages


def _bottleneck(channels: int, *, expand: int, act: Callable[[], nn.Module], **common: Any) -> Residual:
    return Residual(MBConv(channels, channels, expand=expand, act=act, fewer_norm=True, **common))


def weight_map(size: str) -> Map:
    """Upstream's b sizes keep the first stage apart from the others."""
    stages = r"^backbone\.stages\.(\d+)\."
    if SIZES[size].large:
        return Map(rename=((stages, r"encoder.stages.\1."), (r"^head\.", "seg_head."), (r"\.op_list\b", "")))
    return Map(
        rename=(
            (stages, lambda found: f"encoder.stages.{int(found[1]) + 1}."),
            (r"^backbone\.input_stem\.", "encoder.stages.0."),
            (r"^head\.", "seg_head."),
            (r"\.op_list\b", ""),
        )
    )


for _size in SIZES:
    register_upstream(f"efficientvit_seg_{_size}", builder=partial(upstream, _size), map=weight_map(_size))
