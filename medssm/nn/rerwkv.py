"""RWKV with several passes of WKV (Re-WKV: Yang et al., Restore-RWKV, arXiv 2407.11087): each walks the voxels in another order.

In place of Vision-RWKV's learned mix of a voxel with a shifted one, `shift` makes one input for keys, values and receptance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from medssm import ops
from medssm.nn.blocks import CONV, depthwise, image, tokens
from medssm.nn.inner import plain
from medssm.nn.leaf import Leaf
from medssm.nn.rwkv import ChannelMix, q_shift
from medssm.orders import Order, raster


def lines(spatial_dims: int, walk: Callable[..., Order] = raster) -> list[Order]:
    """One walk for each axis along which its lines run, the last axis first: rows, then columns, in 3D then through the slices."""
    axes = range(spatial_dims)
    return [walk((*(a for a in axes if a != along), along)) for along in reversed(axes)]


class ReWKVBlock(nn.Module):
    """x + gamma1 att(ln1(x)), then x + gamma2 ffn(ln2(x)), on (b, c, *spatial)."""

    def __init__(self, channels: int, spatial_dims: int, mode: str) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.att = RecurrentSpatialMix(channels, OmniShift(channels, spatial_dims), lines(spatial_dims), mode)
        self.ffn = ShiftedChannelMix(channels, OmniShift(channels, spatial_dims))
        self.gamma1, self.gamma2 = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        t = tokens(x)
        t = t + self.gamma1 * self.att(self.ln1(t))
        return image(t + self.gamma2 * self.ffn(self.ln2(t)))


class RecurrentSpatialMix(Leaf):
    """The spatial mix, for each order in turn:

        k, v, r = key(s), value(s), receptance(s), s = shift(x);   v = bi_wkv(spatial_decay_j / l, spatial_first_j / l, k, v) in order j
        out = output(sigmoid(r) v)

    Args:
        d_model: channels in and out. shift: on (b, *spatial, d_model). orders: of the passes. mode: of ops.bi_wkv.

    Input and output (b, *spatial, d_model). Weights: spatial_decay, spatial_first (orders, d_model), key, value, receptance, output, the shift's.
    """

    def __init__(self, d_model: int, shift: nn.Module, orders: Sequence[Order], mode: str = "exact") -> None:
        super().__init__()
        self.shift, self.orders, self.mode = shift, list(orders), mode
        self.spatial_decay, self.spatial_first = (nn.Parameter(torch.randn(len(self.orders), d_model)) for _ in range(2))
        self.key, self.value, self.receptance, self.output = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(b, *spatial, d_model) -> the same shape."""
        s = self.shift(x)
        k, v, r = self.key(s), self.value(s), torch.sigmoid(self.receptance(s))
        out: Tensor = self.output(self.gated(k, v, r))
        return out

    def gated(self, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
        """What the passes make of keys and values (b, *spatial, d_model), times r."""
        return r * self.passes(k, v, self.orders)

    def passes(self, k: Tensor, v: Tensor, orders: Sequence[Order | Tensor]) -> Tensor:
        """The values behind a pass in each order, (b, *spatial, d_model)."""
        length = max(math.prod(k.shape[1:-1]), 1)
        for w, u, order in zip(self.spatial_decay / length, self.spatial_first / length, orders, strict=True):
            v = ops.bi_wkv(w, u, k, v, mode=self.mode, order=order)
        return v


class ShiftedChannelMix(ChannelMix):
    """RWKV's channel mix of s = shift(x): sigmoid(receptance(s)) value(relu(key(s))^2)."""

    def __init__(self, d_model: int, shift: nn.Module, hidden: int | None = None) -> None:
        super().__init__(d_model, hidden, pixels=0)
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        """(b, *spatial, d_model) -> the same shape."""
        return super().forward(self.shift(x))


class OmniShift(Leaf):
    """alpha_0 x + alpha_1 conv1x1(x) + alpha_2 conv3x3(x) + alpha_3 conv5x5(x), depthwise convolutions, on (b, *spatial, channels).

    The four are one convolution with the sum of their kernels, in training too.
    """

    def __init__(self, channels: int, spatial_dims: int) -> None:
        super().__init__()
        self.conv1x1, self.conv3x3, self.conv5x5 = (
            CONV[spatial_dims](channels, channels, side, padding=side // 2, groups=channels, bias=False) for side in (1, 3, 5)
        )
        self.alpha = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        """(b, *spatial, channels) -> the same shape."""
        convolutions = [self.conv1x1, self.conv3x3, self.conv5x5]
        if not all(plain(conv) for conv in convolutions):
            parts = [x, *(depthwise(conv, x) for conv in convolutions)]
            return torch.stack([a * part for a, part in zip(self.alpha, parts, strict=True)]).sum(0)
        dims = x.dim() - 2
        one, three, five = (conv.weight.squeeze(1) for conv in convolutions)
        three = self.alpha[2] * three + nn.functional.pad(self.alpha[0] + self.alpha[1] * one, (1, 1) * dims)
        return ops.depthwise_conv(x, self.alpha[3] * five + nn.functional.pad(three, (1, 1) * dims))


class QShift(nn.Module):
    """q_shift by one voxel."""

    def forward(self, x: Tensor) -> Tensor:
        """(b, *spatial, channels) -> the same shape."""
        return q_shift(x)
