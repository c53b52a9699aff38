"""Blocks of a channels-last U-Net. They take and give (b, c, *spatial) in channels-last memory, so that every token is contiguous inside.

At inference all normalisation is local: over the channels of a voxel, or by stored statistics (batch norm). No statistics cross space, so
a volume could be streamed through slab by slab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from medssm import ops
from medssm.nn.convolution import Conv3d, ConvTranspose2d, ConvTranspose3d
from medssm.nn.inner import plain
from medssm.nn.instance_norm import InstanceNorm2d, InstanceNorm3d
from medssm.nn.leaf import Leaf
from medssm.orders import Order, raster

Conv = nn.Conv2d | nn.Conv3d
CONV: dict[int, Callable[..., Conv]] = {2: nn.Conv2d, 3: Conv3d}
TRANSPOSED_CONV: dict[int, Callable[..., nn.Module]] = {2: ConvTranspose2d, 3: ConvTranspose3d}
BATCH_NORM: dict[int, Callable[..., nn.Module]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM: dict[int, Callable[..., nn.Module]] = {2: InstanceNorm2d, 3: InstanceNorm3d}
DROPOUT: dict[int, Callable[..., nn.Module]] = {2: nn.Dropout2d, 3: nn.Dropout3d}  # of whole channels
AVG_POOL: dict[int, Callable[..., nn.Module]] = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
MAX_POOL: dict[int, Callable[..., nn.Module]] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
LINEAR = {2: "bilinear", 3: "trilinear"}  # modes of nn.functional.interpolate
CUBIC = {2: "bicubic", 3: "trilinear"}  # PyTorch has no tricubic mode
_FORMAT = {2: torch.channels_last, 3: torch.channels_last_3d}


def check_dims(spatial_dims: int) -> None:
    """ValueError for anything but 2 and 3."""
    if spatial_dims not in CONV:
        raise ValueError(f"spatial_dims: expected 2 or 3, got {spatial_dims!r}")


def half(kernel: int | Sequence[int]) -> int | tuple[int, ...]:
    """The padding that keeps the size, of an odd kernel with one length or one per axis."""
    return kernel // 2 if isinstance(kernel, int) else tuple(length // 2 for length in kernel)


def tokens(x: Tensor) -> Tensor:
    """(b, c, *spatial) -> (b, *spatial, c), contiguous where x has channels-last memory."""
    return x.movedim(1, -1)


def image(x: Tensor) -> Tensor:
    """(b, *spatial, c) -> (b, c, *spatial), a view."""
    return x.movedim(-1, 1)


def spread(y: Tensor, stride: Sequence[int]) -> Tensor:
    """(b, *spatial, prod(stride) c) -> (b, *(spatial stride), c): each voxel's values become a block of voxels."""
    dims, coarse = len(stride), y.shape[1:-1]
    y = y.unflatten(-1, (*stride, -1))  # (b, *spatial, *stride, c)
    axes = [axis for i in range(dims) for axis in (1 + i, 1 + dims + i)]
    y = y.permute(0, *axes, 1 + 2 * dims)
    return y.reshape(y.shape[0], *(n * s for n, s in zip(coarse, stride, strict=True)), -1)


def depthwise(conv: nn.Module, x: Tensor, activation: str | None = None) -> Tensor:
    """The depthwise convolution `conv` on (b, *spatial, c), then the activation: None or "silu"."""
    if plain(conv):
        assert isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        y: Tensor = ops.depthwise_conv(x, conv.weight.squeeze(1), conv.bias, activation)
        return y
    y = tokens(conv(image(x)))
    return nn.functional.silu(y) if activation == "silu" else y


def enlarge(conv: nn.Module, x: Tensor) -> Tensor:
    """The depthwise transposed convolution `conv`, whose kernel is its stride, on (b, c, *spatial): a voxel times the kernel is a block."""
    if not plain(conv, (nn.ConvTranspose2d, nn.ConvTranspose3d, ConvTranspose2d, ConvTranspose3d)):
        y: Tensor = conv(x)
        return y
    assert isinstance(conv, nn.ConvTranspose2d | nn.ConvTranspose3d)
    t, weight = tokens(x), conv.weight.squeeze(1).movedim(0, -1)  # (b, *spatial, c), (*stride, c)
    for axis in range(len(conv.stride)):
        t, weight = t.unsqueeze(2 + 2 * axis), weight.unsqueeze(2 * axis)
    y = t * weight if conv.bias is None else t * weight + conv.bias
    return image(y.reshape(x.shape[0], *(x.shape[2 + axis] * step for axis, step in enumerate(conv.stride)), -1))


def causal(conv: nn.Module, x: Tensor, order: Order | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """silu of the causal depthwise convolution `conv` along the tokens of (b, l, c), or along an order of (b, *spatial, c).

    cu_seqlens: packed sequences, as in medssm.ops.causal_conv1d. `conv` pads both ends by its width less 1, as a convolution over (b, c, l) that is
    causal once its end is cut off.
    """
    if plain(conv):
        assert isinstance(conv, nn.Conv1d)
        y: Tensor = ops.causal_conv1d(x, conv.weight.squeeze(1), conv.bias, "silu", order=order, cu_seqlens=cu_seqlens)
        return y
    spatial, t = x.shape[1:-1], x.flatten(1, -2).mT
    order = raster() if order is None else order
    if cu_seqlens is None and order == raster():
        y = conv(t)[..., : t.shape[-1]]
    else:
        index, starts = order.index(spatial).to(x.device), order.starts(spatial)
        if cu_seqlens is not None:
            bounds = cu_seqlens.cpu()
            starts = torch.cat([starts, t.shape[-1] - bounds if order.reverse else bounds]).unique()
        segments = t.index_select(-1, index).tensor_split(starts[(starts > 0) & (starts < t.shape[-1])], dim=-1)
        y = torch.cat([conv(segment)[..., : segment.shape[-1]] for segment in segments], dim=-1).index_select(-1, torch.argsort(index))
    return nn.functional.silu(y).mT.reshape(x.shape)


def check_packed(x: Tensor, cu_seqlens: Tensor | None, orders: Sequence[Order]) -> None:
    """ValueError where cu_seqlens is given and x is not (1, l, c), walked from one end to the other."""
    if cu_seqlens is None:
        return
    if x.dim() != 3 or x.shape[0] != 1:
        raise ValueError(f"x: expected (1, l, c), packed sequences, since cu_seqlens is given, got {tuple(x.shape)}")
    for order in orders:
        if order not in (raster(), raster(reverse=True)):
            raise ValueError(f"cu_seqlens: expected None, since {order} is no walk along sequences, got a tensor")


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each voxel of (b, c, *spatial)."""

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, *spatial) -> the same shape."""
        return image(super().forward(tokens(x)))


class ChannelLinear(nn.Linear):
    """A linear layer over the channels of each voxel of (b, c, *spatial)."""

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels_in, *spatial) -> (b, channels, *spatial)."""
        return image(super().forward(tokens(x)))


class ConvNorm(nn.Module):
    """act(norm(conv(x))) on (b, c, *spatial), the norm a batch norm; norm=False and act=None leave theirs out."""

    def __init__(
        self,
        channels_in: int,
        channels: int,
        kernel: int = 3,
        stride: int = 1,
        *,
        spatial_dims: int,
        groups: int = 1,
        bias: bool = False,
        norm: bool = True,
        act: Callable[[], nn.Module] | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.conv = CONV[spatial_dims](channels_in, channels, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = BATCH_NORM[spatial_dims](channels, norm_eps) if norm else None
        self.act = act() if act else None

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels_in, *spatial) -> (b, channels, *(spatial / stride))."""
        x = self.conv(x)
        x = x if self.norm is None else self.norm(x)
        return x if self.act is None else self.act(x)


class DenseBlock(nn.Module):
    """silu(norm(conv(silu(norm(conv(x))))) + x): full kernels, where maps are large and channels few. The norm is a batch norm: at inference a
    scale and a shift of each voxel."""

    def __init__(self, channels_in: int, channels: int, spatial_dims: int, kernel: int | Sequence[int] = 3) -> None:
        super().__init__()
        self.conv1 = CONV[spatial_dims](channels_in, channels, kernel, padding=half(kernel), bias=False)
        self.norm1 = BATCH_NORM[spatial_dims](channels)
        self.conv2 = CONV[spatial_dims](channels, channels, kernel, padding=half(kernel), bias=False)
        self.norm2 = BATCH_NORM[spatial_dims](channels)
        self.skip = nn.Identity() if channels_in == channels else CONV[spatial_dims](channels_in, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels_in, *spatial) -> (b, channels, *spatial)."""
        y = self.norm2(self.conv2(nn.functional.silu(self.norm1(self.conv1(x)))))
        return nn.functional.silu(y + self.skip(x))


class ConvBlock(nn.Module):
    """x + W2 silu(W1 norm(depthwise_conv(x))): spatial mixing by a depthwise kernel, channels by two linear layers (ConvNeXt's order)."""

    def __init__(self, channels: int, spatial_dims: int, kernel: int | Sequence[int] = 3, expand: float = 2) -> None:
        super().__init__()
        self.conv = CONV[spatial_dims](channels, channels, kernel, padding=half(kernel), groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, int(expand * channels))
        self.down = nn.Linear(int(expand * channels), channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        t = tokens(x)
        y = self.norm(depthwise(self.conv, t))
        return image(t + self.down(nn.functional.silu(self.up(y))))


class MixerBlock(nn.Module):
    """x + mixer(norm(x)), then a ConvBlock. `mixer` works on (b, *spatial, c)."""

    def __init__(self, channels: int, spatial_dims: int, mixer: nn.Module, kernel: int | Sequence[int] = 3, expand: float = 2) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(channels), mixer
        self.local = ConvBlock(channels, spatial_dims, kernel, expand)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        t = tokens(x)
        y: Tensor = self.local(image(t + self.mixer(self.norm(t))))
        return y


class Down(nn.Sequential):
    """Norm, then a convolution whose kernel is its stride: (b, channels_in, *spatial) -> (b, channels, *(spatial / stride))."""

    def __init__(self, channels_in: int, channels: int, spatial_dims: int, stride: Sequence[int]) -> None:
        super().__init__(ChannelNorm(channels_in), CONV[spatial_dims](channels_in, channels, tuple(stride), tuple(stride)))


class Up(Leaf):
    """A linear layer from each voxel to the stride's block of voxels: a transposed convolution whose kernel is its stride, as one matrix
    product and one rearrangement."""

    def __init__(self, channels_in: int, channels: int, spatial_dims: int, stride: Sequence[int]) -> None:
        super().__init__()
        self.stride = tuple(stride)
        self.linear = nn.Linear(channels_in, math.prod(self.stride) * channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels_in, *spatial) -> (b, channels, *(spatial stride))."""
        return image(spread(self.linear(tokens(x)), self.stride))


class ChannelsLast(Leaf):
    """Give the memory of (b, c, *spatial) the channels-last format: the entrance of a network of these blocks."""

    def __init__(self, spatial_dims: int) -> None:
        super().__init__()
        self.memory_format = _FORMAT[spatial_dims]

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, *spatial) -> the same shape."""
        if x.shape[1] == 1:  # contiguous either way: the strides tell the layers behind which one is meant
            return image(x.reshape(x.shape[0], *x.shape[2:], 1))
        return x.contiguous(memory_format=self.memory_format)
