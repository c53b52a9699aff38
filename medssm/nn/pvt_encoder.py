"""The pyramid vision transformer's second version (Wang et al., arXiv 2106.13797) as an encoder, in 2D and 3D."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from medssm.nn.blocks import CONV, ChannelNorm, check_dims
from medssm.nn.pvt import ReducedBlock
from medssm.nn.unet import Encoder
from medssm.nn.vss import drop_paths, start_linears

_HEADS, _REDUCTIONS, _EPS = (1, 2, 5, 8), (8, 4, 2, 1), 1e-6


class Size(NamedTuple):
    """features, depths, mlp_ratios: channels, blocks, and hidden channels of the MLPs over outer, per stage."""

    features: Sequence[int]
    depths: Sequence[int]
    mlp_ratios: Sequence[int] = (8, 8, 4, 4)


_WIDE = (64, 128, 320, 512)
SIZES = {
    "pvt_v2_b0": Size((32, 64, 160, 256), (2, 2, 2, 2)),
    "pvt_v2_b1": Size(_WIDE, (2, 2, 2, 2)),
    "pvt_v2_b2": Size(_WIDE, (3, 4, 6, 3)),
    "pvt_v2_b3": Size(_WIDE, (3, 4, 18, 3)),
    "pvt_v2_b4": Size(_WIDE, (3, 8, 27, 3)),
    "pvt_v2_b5": Size(_WIDE, (3, 6, 40, 3), (4, 4, 4, 4)),
}


def pvt_encoder(in_channels: int, spatial_dims: int, size: Size, drop_path: float = 0.1) -> Encoder:
    """Four stages at 1/4 to 1/32 of the resolution, each a strided convolution with a kernel that overlaps, blocks of attention with fewer keys, a
    norm; every axis of an input must be a multiple of 32. drop_path: stochastic depth at the last block."""
    check_dims(spatial_dims)
    stages, widths = [], [in_channels, *size.features]
    for s, rates in enumerate(drop_paths(size.depths, drop_path)):
        width, (kernel, step) = size.features[s], (3, 2) if s else (7, 4)
        hidden = size.mlp_ratios[s] * width
        parts = OrderedDict(
            patch=nn.Sequential(CONV[spatial_dims](widths[s], width, kernel, step, kernel // 2), ChannelNorm(width)),
            blocks=nn.Sequential(
                *(ReducedBlock(width, _HEADS[s], _REDUCTIONS[s], hidden, spatial_dims, norm=False, eps=_EPS, drop_path=rate) for rate in rates)
            ),
            norm=ChannelNorm(width, _EPS),
        )
        stages.append(nn.Sequential(parts))
    encoder = Encoder(nn.Identity(), stages, size.features, [(4,) * spatial_dims] + [(2,) * spatial_dims] * 3)
    start_linears(encoder)
    return encoder
