"""Changes of the resolution by 2 that move voxels into channels and back (Shi et al., arXiv 1609.05158), in 2D and 3D."""

from __future__ import annotations

from torch import Tensor

from medssm.nn.blocks import CONV
from medssm.nn.leaf import Leaf


def shuffle(x: Tensor) -> Tensor:
    """(b, 2^n c, *spatial) -> (b, c, *(2 spatial)): PixelShuffle of a factor of 2 for n spatial axes."""
    dims = x.dim() - 2
    y: Tensor = x.unflatten(1, (-1, *(2,) * dims))  # (b, c, *twos, *spatial)
    y = y.permute(0, 1, *(axis for i in range(dims) for axis in (2 + dims + i, 2 + i)))
    return y.reshape(*y.shape[:2], *(2 * n for n in x.shape[2:]))


def unshuffle(x: Tensor) -> Tensor:
    """(b, c, *(2 spatial)) -> (b, 2^n c, *spatial): PixelUnshuffle of a factor of 2 for n spatial axes, which undoes `shuffle`."""
    dims = x.dim() - 2
    y = x.reshape(*x.shape[:2], *(side for n in x.shape[2:] for side in (n // 2, 2)))
    return y.permute(0, 1, *range(3, 3 + 2 * dims, 2), *range(2, 2 + 2 * dims, 2)).flatten(1, 1 + dims)


class PixelDown(Leaf):
    """A convolution, then each block of 2 x 2 (x 2) voxels becomes the channels of one."""

    def __init__(self, channels_in: int, channels: int, spatial_dims: int) -> None:
        super().__init__()
        if channels % 2**spatial_dims:
            raise ValueError(f"features: expected multiples of {2**spatial_dims} behind the first stage, got {channels}")
        self.conv = CONV[spatial_dims](channels_in, channels // 2**spatial_dims, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels_in, *spatial) -> (b, channels, *(spatial / 2))."""
        return unshuffle(self.conv(x))


class PixelUp(Leaf):
    """A convolution, then each voxel's channels become a block of 2 x 2 (x 2) voxels."""

    def __init__(self, channels_in: int, channels: int, spatial_dims: int) -> None:
        super().__init__()
        self.conv = CONV[spatial_dims](channels_in, channels * 2**spatial_dims, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels_in, *spatial) -> (b, channels, *(2 spatial))."""
        return shuffle(self.conv(x))
