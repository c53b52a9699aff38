"""Attention gates: a factor between 0 and 1 for each channel, or for each voxel, of a map (b, c, *spatial)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from medssm.nn.blocks import CONV
from medssm.nn.leaf import Leaf


class ChannelAttention(Leaf):
    """x sigmoid(f(mean(x))), f(v) = W2 relu(W1 v), the mean over space (squeeze and excitation, Hu et al., arXiv 1709.01507); with `peaks`
    x sigmoid(f(mean(x)) + f(max(x))) (CBAM, Woo et al., arXiv 1807.06521).

    layer(channels_in, channels) makes W1 and W2, layers over channels; `hidden` channels lie between them.
    """

    def __init__(self, channels: int, hidden: int, layer: Callable[[int, int], nn.Module], peaks: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2, self.peaks = layer(channels, hidden), layer(hidden, channels), peaks

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        axes = list(range(2, x.dim()))
        weight = self._weight(x.mean(axes, keepdim=True))
        if self.peaks:
            weight = weight + self._weight(x.amax(axes, keepdim=True))
        return x * torch.sigmoid(weight)

    def _weight(self, pooled: Tensor) -> Tensor:
        weight: Tensor = self.fc2(torch.relu(self.fc1(pooled)))
        return weight


class SpatialAttention(nn.Module):
    """x sigmoid(conv(cat(mean(x), max(x)))), the mean and the maximum over channels (CBAM, Woo et al., arXiv 1807.06521)."""

    def __init__(self, spatial_dims: int, kernel: int = 7, dilation: int = 1, bias: bool = False) -> None:
        super().__init__()
        self.conv = CONV[spatial_dims](2, 1, kernel, padding=kernel // 2 * dilation, dilation=dilation, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, *spatial) -> the same shape."""
        return x * torch.sigmoid(self.conv(torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1)))


class CBAM(nn.Sequential):
    """Channel attention by means and maxima, then spatial attention (Woo et al., arXiv 1807.06521): (b, channels, *spatial) -> the same shape."""

    def __init__(self, channels: int, spatial_dims: int, reduction: int = 16) -> None:
        layer = partial(CONV[spatial_dims], kernel_size=1, bias=False)
        super().__init__(ChannelAttention(channels, max(1, channels // reduction), layer, peaks=True), SpatialAttention(spatial_dims))
