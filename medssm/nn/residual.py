"""Parts of nnU-Net's residual U-Net (Isensee et al., MICCAI 2024, arXiv 2404.09556), made of the caller's choice of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from medssm.nn.blocks import AVG_POOL


class Layers(NamedTuple):
    """What makes the convolutions, norms, activations and dropouts of all blocks."""

    conv: Callable[..., nn.Module]
    conv_bias: bool
    norm: Callable[[int], nn.Module]
    act: Callable[[], nn.Module]
    dropout: Callable[[], nn.Module]


class ResBlock(nn.Module):
    """conv, norm, act, conv, norm, plus a 1 x 1 convolution of the input, act. The first and the last convolution take the stride."""

    def __init__(self, layers: Layers, channels_in: int, channels: int, kernel: Sequence[int], stride: int | Sequence[int] = 1) -> None:
        super().__init__()
        pad = [k // 2 for k in kernel]
        self.conv1 = layers.conv(channels_in, channels, kernel, stride, pad)
        self.norm1 = layers.norm(channels)
        self.act1 = layers.act()
        self.conv2 = layers.conv(channels, channels, kernel, 1, pad)
        self.norm2 = layers.norm(channels)
        self.act2 = layers.act()
        self.conv3 = layers.conv(channels_in, channels, 1)
        self.stride = (stride,) * len(kernel) if isinstance(stride, int) else tuple(stride)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels_in, *spatial) -> (b, channels, *(spatial / stride))."""
        y = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        # Every stride-th voxel, then the 1 x 1 convolution: its own stride crashes torch 2.13's backward on channels-last maps on a CPU.
        every: tuple[Any, ...] = (..., *(slice(None, None, n) for n in self.stride))
        out: Tensor = self.act2(y + self.conv3(x[every]))
        return out


class ConvDropoutNorm(nn.Module):
    """conv, dropout if any, norm, act if asked. channels_in: `channels` by default; bias: the layers' by default."""

    def __init__(
        self,
        layers: Layers,
        channels: int,
        kernel: Sequence[int],
        act: bool,
        *,
        channels_in: int | None = None,
        stride: int | Sequence[int] = 1,
        bias: bool | None = None,
    ) -> None:
        super().__init__()
        bias = layers.conv_bias if bias is None else bias
        self.conv = layers.conv(channels_in or channels, channels, kernel, stride, [k // 2 for k in kernel], bias=bias)
        self.dropout = layers.dropout()
        self.norm = layers.norm(channels)
        self.act = layers.act() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels_in, *spatial) -> (b, channels, *(spatial / stride))."""
        y: Tensor = self.act(self.norm(self.dropout(self.conv(x))))
        return y


class BasicBlock(nn.Module):
    """Two convolutions and the input itself."""

    def __init__(self, layers: Layers, channels: int, kernel: Sequence[int]) -> None:
        super().__init__()
        self.conv1 = ConvDropoutNorm(layers, channels, kernel, act=True)
        self.conv2 = ConvDropoutNorm(layers, channels, kernel, act=False)
        self.act = layers.act()

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        y: Tensor = self.act(self.conv2(self.conv1(x)) + x)
        return y


class StridedBlock(nn.Module):
    """A BasicBlock to other channels or a lower resolution: the way around it is a mean over the stride's voxels, then a 1 x 1 convolution and norm,
    each where it is needed."""

    def __init__(self, layers: Layers, channels_in: int, channels: int, kernel: Sequence[int], stride: int | Sequence[int] = 1) -> None:
        super().__init__()
        steps = (stride,) * len(kernel) if isinstance(stride, int) else tuple(stride)
        self.conv1 = ConvDropoutNorm(layers, channels, kernel, act=True, channels_in=channels_in, stride=steps)
        self.conv2 = ConvDropoutNorm(layers, channels, kernel, act=False)
        self.act = layers.act()
        self.skip = nn.Sequential()
        if max(steps) > 1:
            self.skip.append(AVG_POOL[len(steps)](steps, steps))
        if channels_in != channels:
            self.skip.append(ConvDropoutNorm(layers, channels, [1] * len(steps), act=False, channels_in=channels_in, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels_in, *spatial) -> (b, channels, *(spatial / stride))."""
        y: Tensor = self.act(self.conv2(self.conv1(x)) + self.skip(x))
        return y


class Upsample(nn.Module):
    """Nearest neighbours, then a 1 x 1 convolution."""

    def __init__(self, layers: Layers, channels_in: int, channels: int, stride: Sequence[int]) -> None:
        super().__init__()
        self.conv, self.stride = layers.conv(channels_in, channels, 1), [float(s) for s in stride]

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels_in, *spatial) -> (b, channels, *(spatial stride))."""
        y: Tensor = self.conv(nn.functional.interpolate(x, scale_factor=self.stride, mode="nearest"))
        return y


def residual_stage(layers: Layers, channels_in: int, channels: int, kernel: Sequence[int], stride: int | Sequence[int], count: int) -> nn.Sequential:
    """`count` blocks, the first a ResBlock with the stride, the others BasicBlocks."""
    more = [BasicBlock(layers, channels, kernel) for _ in range(count - 1)]
    return nn.Sequential(ResBlock(layers, channels_in, channels, kernel, stride), *more)


def basic_stage(layers: Layers, channels_in: int, channels: int, kernel: Sequence[int], stride: int | Sequence[int], count: int) -> nn.Sequential:
    """`count` blocks, the first a StridedBlock, the others BasicBlocks."""
    return nn.Sequential(
        StridedBlock(layers, channels_in, channels, kernel, stride), *(BasicBlock(layers, channels, kernel) for _ in range(count - 1))
    )


class Stages(NamedTuple):
    """The network's lists: one entry per stage, `decoder_blocks` one fewer and from coarse to fine."""

    features: list[int]
    strides: list[tuple[int, ...]]
    kernels: list[tuple[int, ...]]
    blocks: list[int]
    decoder_blocks: list[int]


def residual_encoder(layers: Layers, stages: Stages, in_channels: int, stem_channels: int | None = None) -> tuple[nn.Sequential, list[nn.Sequential]]:
    """The stem, with stem_channels or features[0], and the stages."""
    widths = [stem_channels or stages.features[0], *stages.features]
    stem = residual_stage(layers, in_channels, widths[0], stages.kernels[0], 1, stages.blocks[0])
    steps = zip(widths[:-1], stages.features, stages.kernels, stages.strides, stages.blocks, strict=True)
    return stem, [residual_stage(layers, *step) for step in steps]


def residual_decoder(layers: Layers, stages: Stages, out_channels: int, joins: Sequence[bool], all_heads: bool) -> dict[str, list[Any]]:
    """Decoder's arguments: a level per stage but the coarsest, which takes its skip where `joins` says so, the coarsest first; all_heads: logits at
    every level, else at the finest alone."""
    features, levels = stages.features, range(len(stages.features) - 2, -1, -1)
    ups, up_stages, heads = [], [], []
    for s, join, count in zip(levels, joins, stages.decoder_blocks, strict=True):
        ups.append(Upsample(layers, features[s + 1], features[s], stages.strides[s + 1]))
        up_stages.append(residual_stage(layers, features[s] * (2 if join else 1), features[s], stages.kernels[s], 1, count))
        heads.append(layers.conv(features[s], out_channels, 1) if all_heads or s == 0 else None)
    return {"upsample_layers": ups, "stages": up_stages, "seg_layers": heads, "joins": list(joins)}


def maker(kind: Callable[..., nn.Module] | None, kwargs: Mapping[str, Any] | None) -> Callable[..., nn.Module]:
    """kind with its keywords; None makes nothing."""
    return partial(kind or nn.Identity, **(kwargs or {}))
