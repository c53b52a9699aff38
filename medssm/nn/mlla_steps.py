"""The steps of MLLA's networks from one resolution to another: more channels, a strided depthwise convolution, the new channels.

They take and give (b, c, *spatial). Weight names are upstream's.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from medssm.nn.blocks import TRANSPOSED_CONV, ChannelNorm, ConvNorm


class Shrink(nn.Module):
    """Half the resolution: `ratio` times the new channels in between (Han et al., arXiv 2405.16605)."""

    def __init__(self, channels_in: int, channels: int, spatial_dims: int, ratio: int = 4) -> None:
        super().__init__()
        wide = ratio * channels
        layer = partial(ConvNorm, spatial_dims=spatial_dims, bias=True)
        self.conv = nn.Sequential(
            layer(channels_in, wide, 1, norm=False, act=nn.ReLU),
            layer(wide, wide, 3, 2, groups=wide, norm=False, act=nn.ReLU),
            layer(wide, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels_in, *spatial) -> (b, channels, *(spatial / 2))."""
        y: Tensor = self.conv(x)
        return y


class Grow(nn.Module):
    """Twice the resolution: `ratio` times the old channels in between, the convolution a transposed one, and a norm over the new channels at the end
    (Jiang et al., arXiv 2410.23738)."""

    def __init__(self, channels_in: int, channels: int, spatial_dims: int, ratio: int = 4) -> None:
        super().__init__()
        wide = ratio * channels_in
        layer = partial(ConvNorm, kernel=1, spatial_dims=spatial_dims, bias=True)
        self.conv = nn.Sequential(
            layer(channels_in, wide, norm=False, act=nn.ReLU),
            TRANSPOSED_CONV[spatial_dims](wide, wide, 3, 2, 1, 1, groups=wide, bias=False),
            layer(wide, channels),
        )
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels_in, *spatial) -> (b, channels, *(2 spatial))."""
        y: Tensor = self.norm(self.conv(x))
        return y
