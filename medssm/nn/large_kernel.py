"""Bidirectional Mamba over large windows (LKM-UNet, Wang et al., arXiv 2403.07332), in 2D and 3D, on (b, c, *spatial)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from medssm.nn.blocks import image, tokens
from medssm.nn.leaf import Leaf
from medssm.nn.mamba import Mamba
from medssm.orders import Order, dilated, raster


class TwoWayMamba(nn.Module):
    """y -> out_proj(forward(norm(y)) + backward(norm(y))): two Mambas, one from the first token on and one from the last, with one out_proj.
    order: how they walk."""

    def __init__(self, channels: int, order: Order) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.mamba_forw = _Direction(channels, order)
        self.out_proj = nn.Linear(len(self.mamba_forw.D), channels, bias=False)
        self.mamba_backw = _Direction(channels, order.reversed())

    def scan(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        t = self.norm(tokens(x))
        return image(self.out_proj(self.mamba_forw(t) + self.mamba_backw(t)))


class _Direction(Mamba):
    """A Mamba without its out_proj."""

    def __init__(self, channels: int, order: Order) -> None:
        super().__init__(channels)
        self.add_module("out_proj", nn.Identity())
        self.order = order

    def orders(self, x: Tensor) -> list[Order]:
        return [self.order]


class PixelMamba(TwoWayMamba):
    """x + scan(x), each grid of voxels `step` apart (one number per axis) a sequence of its own. fit: as in medssm.orders.dilated."""

    def __init__(self, channels: int, step: Sequence[int], fit: str = "half") -> None:
        super().__init__(channels, dilated(step, fit=fit))

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        return x + self.scan(x)


class PatchMamba(TwoWayMamba, Leaf):
    """x + spread(scan(mean(x))): the mean of each patch of `size` voxels a side is a token, and its voxels get what becomes of it.

    divide: single voxels are the tokens where the size does not divide every axis; otherwise the last patches are smaller.
    """

    def __init__(self, channels: int, size: int, divide: bool = False) -> None:
        super().__init__(channels, raster())
        self.size, self.divide = size, divide

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        if self.size == 1 or (self.divide and any(n % self.size for n in x.shape[2:])):
            return x + self.scan(x)
        pool = functional.avg_pool2d if x.dim() == 4 else functional.avg_pool3d
        y = functional.interpolate(self.scan(pool(x, self.size, ceil_mode=True)), scale_factor=self.size, mode="nearest")
        for axis, n in enumerate(x.shape[2:], 2):
            y = y.narrow(axis, 0, n)
        return x + y
