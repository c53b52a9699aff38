"""High-order scans (H-vmunet, Wu et al., arXiv 2403.13642): HorNet's recursive gating with an SS-ND scan at every order, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medssm.nn.blocks import CONV, depthwise, image, tokens
from medssm.nn.ssnd import SSND
from medssm.nn.vss import MLP

_EPS = 1e-6


class HighOrderBlock(nn.Module):
    """x + gamma1 scan(norm1(x)), then x + gamma2 mlp(norm2(x)), with a HighOrderScan."""

    def __init__(self, channels: int, order: int, spatial_dims: int, layer_scale: float = 1e-6) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels, _EPS), nn.LayerNorm(channels, _EPS)
        self.scan, self.mlp = HighOrderScan(channels, order, spatial_dims), MLP(channels, 4 * channels)
        self.gamma1, self.gamma2 = (nn.Parameter(torch.full((channels,), layer_scale)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        t = tokens(x)
        t = t + self.gamma1 * self.scan(self.norm1(t))
        return image(t + self.gamma2 * self.mlp(self.norm2(t)))


class HighOrderScan(nn.Module):
    """For the widths c_i = channels / 2^(order - 1 - i), i from 0:

        p, a = split(proj_in(x));   a_i = local(a)_i / 3;   y_0 = scan_0(p a_0);   y_i = scan_i(pws_i(y_(i-1)) a_i);   out = proj_out(y_last)

    2**order must divide the channels. Input and output (b, *spatial, channels).
    """

    def __init__(self, channels: int, order: int, spatial_dims: int) -> None:
        super().__init__()
        if channels % 2**order:
            raise ValueError(f"features: expected a multiple of {2**order} for a scan of order {order}, got {channels}")
        conv = CONV[spatial_dims]
        self.widths = [channels // 2**i for i in range(order - 1, -1, -1)]
        self.proj_in, self.proj_out = conv(channels, 2 * channels, 1), conv(channels, channels, 1)
        self.local = LocalScan(sum(self.widths), spatial_dims)
        self.scans = nn.ModuleList([SSND(width, spatial_dims=spatial_dims) for width in self.widths])
        self.pws = nn.ModuleList([conv(a, b, 1) for a, b in zip(self.widths[:-1], self.widths[1:], strict=True)])

    def forward(self, x: Tensor) -> Tensor:
        """(b, *spatial, channels) -> the same shape."""
        y, a = tokens(self.proj_in(image(x))).split([self.widths[0], sum(self.widths)], -1)
        gates = (self.local(a) / 3).split(self.widths, -1)
        y = self.scans[0](y * gates[0])
        for i, widen in enumerate(self.pws, 1):
            y = self.scans[i](tokens(widen(image(y))) * gates[i])
        return tokens(self.proj_out(image(y)))


class LocalScan(nn.Module):
    """A norm; half of the channels through a depthwise 3 x 3 (x 3) convolution and half through a scan, taking turns; a norm."""

    def __init__(self, channels: int, spatial_dims: int) -> None:
        super().__init__()
        half = channels // 2
        self.pre_norm, self.post_norm = nn.LayerNorm(channels, _EPS), nn.LayerNorm(channels, _EPS)
        self.conv = CONV[spatial_dims](half, half, 3, padding=1, groups=half, bias=False)
        self.scan = SSND(half, spatial_dims=spatial_dims)

    def forward(self, x: Tensor) -> Tensor:
        """(b, *spatial, channels) -> the same shape."""
        left, right = self.pre_norm(x).chunk(2, -1)
        y: Tensor = self.post_norm(torch.stack((depthwise(self.conv, left), self.scan(right)), -1).flatten(-2))
        return y


def high_order_layer(channels_in: int, channels: int, order: int, depth: int, spatial_dims: int, layer_scale: float) -> nn.Sequential:
    """`depth` blocks, then a 3 x 3 (x 3) convolution to other channels."""
    blocks: Sequence[nn.Module] = [HighOrderBlock(channels_in, order, spatial_dims, layer_scale) for _ in range(depth)]
    return nn.Sequential(*blocks, CONV[spatial_dims](channels_in, channels, 3, padding=1))
