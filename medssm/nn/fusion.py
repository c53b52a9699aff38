"""Maps of several resolutions made into one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from medssm.nn.attention import CBAM
from medssm.nn.blocks import CONV, LINEAR, ConvNorm
from medssm.nn.leaf import Leaf


class ProductFusion(Leaf):
    """The product over maps of conv_i(map_i at the resolution of one of them), 3 x 3 (x 3) convolutions (SDI of U-Net v2, Peng et al.,
    arXiv 2311.17791). Finer maps are averaged, coarser ones interpolated linearly with the corners in place."""

    def __init__(self, channels: int, maps: int, spatial_dims: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList([CONV[spatial_dims](channels, channels, 3, padding=1) for _ in range(maps)])

    def forward(self, maps: Sequence[Tensor], level: int) -> Tensor:
        """Maps (b, channels, *spatial), the finest first, each of half the resolution of the one before -> the shape of maps[level]."""
        product: Tensor
        product, *others = [conv(at_level(m, i - level)) for i, (conv, m) in enumerate(zip(self.convs, maps, strict=True))]
        for other in others:
            product = product * other
        return product


class AttendedFusion(nn.Module):
    """The skips of U-Net v2 (arXiv 2311.17791): spatial and channel attention on each map and a 1 x 1 convolution to `width` channels; then for each
    resolution the product of all of them."""

    def __init__(self, features: Sequence[int], width: int, spatial_dims: int) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Sequential(CBAM(c, spatial_dims), ConvNorm(c, width, 1, spatial_dims=spatial_dims)) for c in features)
        self.products = nn.ModuleList(ProductFusion(width, len(features), spatial_dims) for _ in features)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (b, features[i], *spatial), each of half the resolution of the one before -> (b, width, *spatial) each."""
        gated = [gate(x) for gate, x in zip(self.gates, maps, strict=True)]
        return [product(gated, level) for level, product in enumerate(self.products)]


def at_level(x: Tensor, doublings: int) -> Tensor:
    """(b, c, *spatial) at 2**doublings of its resolution."""
    dims, size = x.dim() - 2, 2 ** abs(doublings)
    if doublings < 0:
        return functional.avg_pool2d(x, size) if dims == 2 else functional.avg_pool3d(x, size)
    y: Tensor = functional.interpolate(x, scale_factor=size, mode=LINEAR[dims], align_corners=True) if doublings else x
    return y
