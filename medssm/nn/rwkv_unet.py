"""Blocks of RWKV-UNet (Jiang et al., arXiv 2501.08458), in 2D and 3D: inverted bottlenecks with a spatial mix, a channel mix of several maps.

They take and give (b, c, *spatial). Weight names are upstream's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from medssm.nn.blocks import BATCH_NORM, CONV, LINEAR, ChannelNorm, ConvNorm, image, tokens
from medssm.nn.leaf import Leaf
from medssm.nn.rwkv import ChannelMix, SpatialMix
from medssm.nn.vss import DropPath

EPS = 1e-6  # of the norms on maps; those on tokens have PyTorch's


class GLSP(nn.Module):
    """Global-local spatial perception, an inverted bottleneck:

        y = relu(bn(conv(norm(x))));   y = y + ln1(att(y));   y = se(conv_local(y)) + y;   out = proj(y) + x

    conv and proj are 1 x 1 convolutions, conv_local a depthwise one with a batch norm and SiLU. The last two sums only where channels and size stay.

    Args:
        hidden: channels between conv and proj. norm: "batch", "channel" (over the channels of a voxel) or None.
        mode: of the spatial mix `att`, None for a block without. gate: squeeze and excitation `se`.
    """

    def __init__(
        self,
        channels_in: int,
        channels: int,
        hidden: int,
        spatial_dims: int,
        *,
        kernel: int = 5,
        stride: int = 1,
        norm: str | None = "batch",
        mode: str | None = None,
        gate: bool = False,
        skip: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        layer = partial(ConvNorm, spatial_dims=spatial_dims, norm_eps=EPS)
        norms = {"batch": BATCH_NORM[spatial_dims], "channel": ChannelNorm}
        self.norm = norms[norm](channels_in, eps=EPS) if norm else nn.Identity()
        self.conv = layer(channels_in, hidden, 1, act=nn.ReLU)
        self.ln1 = nn.LayerNorm(hidden) if mode else None
        self.att = SpatialMix(hidden, key_norm=True, mode=mode) if mode else None
        self.conv_local = layer(hidden, hidden, kernel, stride, groups=hidden, act=nn.SiLU)
        self.se = SqueezeExcitation(hidden, spatial_dims) if gate else nn.Identity()
        self.proj = layer(hidden, channels, 1, norm=False)
        self.attends, self.skip, self.drop_path = mode is not None, skip and stride == 1 and channels == channels_in, DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels_in, *spatial) -> (b, channels, *(spatial / stride))."""
        y = self.conv(self.norm(x))
        if self.attends:
            assert self.att is not None and self.ln1 is not None
            t = tokens(y)
            y = image(t + self.drop_path(self.ln1(self.att(t))))
        local = self.se(self.conv_local(y))
        out: Tensor = x + self.drop_path(self.proj(y + local)) if self.skip else self.proj(local)
        return out


class SqueezeExcitation(Leaf):
    """x sigmoid(conv_expand(silu(conv_reduce(mean over space of x))))."""

    def __init__(self, channels: int, spatial_dims: int) -> None:
        super().__init__()
        self.conv_reduce, self.conv_expand = CONV[spatial_dims](channels, channels, 1), CONV[spatial_dims](channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        mean = x.mean(tuple(range(2, x.dim())), keepdim=True)
        return x * torch.sigmoid(self.conv_expand(nn.functional.silu(self.conv_reduce(mean))))


class UpBlock(nn.Module):
    """Twice the resolution, linearly interpolated, of proj(conv_local(conv(x))): convolutions as in GLSP, proj with a batch norm and ReLU.
    kernel None: 9 in 2D, 5 in 3D."""

    def __init__(self, channels_in: int, channels: int, spatial_dims: int, kernel: int | None = None) -> None:
        super().__init__()
        layer = partial(ConvNorm, spatial_dims=spatial_dims, norm_eps=EPS)
        self.conv = layer(channels_in, channels_in, 1, act=nn.ReLU)
        self.conv_local = layer(channels_in, channels_in, kernel or {2: 9, 3: 5}[spatial_dims], groups=channels_in, act=nn.SiLU)
        self.proj = layer(channels_in, channels, 1, act=nn.ReLU)
        self.mode = LINEAR[spatial_dims]

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels_in, *spatial) -> (b, channels, *(2 spatial))."""
        y = self.proj(self.conv_local(self.conv(x)))
        return interpolate(y, scale_factor=2.0, mode=self.mode)


class CrossChannelMix(Leaf):
    """Maps of several resolutions, projected to `width` channels each and resized to the finest, side by side in one channel mix (CCM of the paper):

        t = concat(projections(maps));   t = t + ln1(channel(t));   map_i = final_projections_i(part i of t), at the resolution it came with

    Projections are made at the coarser of two resolutions, which gives what upstream's at the finer one do: they and linear interpolation commute.
    """

    def __init__(self, channels: Sequence[int], width: int, spatial_dims: int, drop_path: float = 0.0) -> None:
        super().__init__()
        conv, total = CONV[spatial_dims], width * len(channels)
        self.projections = nn.ModuleList(conv(c, width, 1) for c in channels)
        self.channel = ChannelMix(total, 2 * total, key_norm=True)
        self.ln1, self.drop_path = nn.LayerNorm(total), DropPath(drop_path)
        self.final_projections = nn.ModuleList(conv(width, c, 1) for c in channels)
        self.width, self.mode = width, LINEAR[spatial_dims]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (b, channels[i], *spatial_i), the finest last -> maps of the same shapes."""
        finest = maps[-1].shape[2:]
        t = tokens(torch.cat([self._resized(project(x), finest) for project, x in zip(self.projections, maps, strict=True)], 1))
        t = t + self.drop_path(self.ln1(self.channel(t)))
        parts = image(t).split(self.width, 1)
        return [project(self._resized(y, x.shape[2:])) for project, y, x in zip(self.final_projections, parts, maps, strict=True)]

    def _resized(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return x if x.shape[2:] == size else interpolate(x, size=list(size), mode=self.mode)
