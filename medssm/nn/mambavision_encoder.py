"""MambaVision (Hatamizadeh and Kautz, arXiv 2407.08083) as an encoder, in 2D and 3D."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from torch import nn

from medssm.nn.blocks import CONV, ChannelsLast, ConvNorm, check_dims
from medssm.nn.mambavision import ConvLayer, window_stage
from medssm.nn.unet import Encoder
from medssm.nn.vss import drop_paths


class Size(NamedTuple):
    """depths, heads: layers and attention heads per stage. features, stem: channels of the first stage, doubled from stage to stage, and of the stem.
    drop_path: stochastic depth at the last layer. layer_scale: what a weight for each channel of the layers' outputs starts from; None for none."""

    depths: Sequence[int]
    heads: Sequence[int]
    features: int
    stem: int
    drop_path: float
    layer_scale: float | None = None


def mambavision_encoder(in_channels: int, spatial_dims: int, size: Size, windows: Sequence[int], mlp_ratio: float = 4.0) -> Encoder:
    """Stages at 1/4, 1/8, … of the resolution: two of convolutions, the others in windows, whose sides are `windows`' entries from the third on."""
    check_dims(spatial_dims)
    conv, stages = CONV[spatial_dims], []
    widths = [size.features * 2**s for s in range(len(size.depths))]
    for s, (width, rates) in enumerate(zip(widths, drop_paths(size.depths, size.drop_path), strict=True)):
        down = {"down": conv(width // 2, width, 3, 2, 1, bias=False)} if s else {}
        if s < 2:
            blocks: nn.Module = nn.Sequential(*(ConvLayer(width, spatial_dims, rate) for rate in rates))
        else:
            blocks = window_stage(width, size.heads[s], windows[s], rates, mlp_ratio, size.layer_scale)
        stages.append(nn.Sequential(OrderedDict(**down, blocks=blocks)))
    half = partial(ConvNorm, stride=2, spatial_dims=spatial_dims, act=nn.ReLU, norm_eps=1e-4)
    stem = nn.Sequential(ChannelsLast(spatial_dims), half(in_channels, size.stem), half(size.stem, size.features))
    encoder = Encoder(stem, stages, widths, [(4,) * spatial_dims] + [(2,) * spatial_dims] * (len(widths) - 1))
    return encoder
