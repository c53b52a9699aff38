"""RWKV for images and volumes: a spatial mix around bi_wkv and a channel mix, both after a shift of the channels by one voxel.

Weight names are Vision-RWKV's (Duan et al., arXiv 2403.02308).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from medssm import ops
from medssm.nn.leaf import Leaf
from medssm.ops import cut
from medssm.orders import Order


def q_shift(
    x: Tensor,  # (b, *spatial, c)
    pixels: int = 1,
    share: float | None = None,
) -> Tensor:
    """Shift groups of channels by `pixels` along an axis each, zeros coming in; (b, *spatial, c) in and out.

    The groups, int(share c) channels each, lie side by side in this order: along the last axis to its end ("right": a voxel gets its left
    neighbour's value) and to its beginning ("left"), then the same along the axis before it ("down", "up"), and so on to the first axis. In 2D
    these are Vision-RWKV's quarters, in 3D six groups: right, left, down, up, deeper, shallower. The default share is 1 / (2 dims); channels
    that are left over stay where they are.
    """
    dims, channels = x.dim() - 2, x.shape[-1]
    width = int(channels * (1 / (2 * dims) if share is None else share))
    if width * 2 * dims > channels:
        raise ValueError(f"share: expected at most 1/{2 * dims}, a group for each direction, got {share!r}")
    groups, over_ranks = [], cut.current()
    for i, (axis, forward) in enumerate((axis, forward) for axis in range(dims, 0, -1) for forward in (True, False)):
        group = x[..., i * width : (i + 1) * width]
        padded = None if over_ranks is None else over_ranks.around(group, axis, pixels)
        if padded is not None:
            groups.append(padded.narrow(axis, 0 if forward else 2 * pixels, x.shape[axis]))
            continue
        padded = nn.functional.pad(group, (0, 0) * (dims + 1 - axis) + ((pixels, 0) if forward else (0, pixels)))
        groups.append(padded.narrow(axis, 0 if forward else pixels, x.shape[axis]))
    return torch.cat([*groups, x[..., 2 * dims * width :]], -1)


class SpatialMix(Leaf):
    """RWKV's spatial mix, s = q_shift(x) and m a learned number for each channel:

        k, v, r = key(m_k x + (1 - m_k) s), value(m_v x + (1 - m_v) s), receptance(m_r x + (1 - m_r) s)
        out = output(sigmoid(r) norm(bi_wkv(spatial_decay / l, spatial_first / l, k, v)))        l: number of voxels

    Args:
        d_model: channels in and out. pixels, share: of q_shift; pixels=0 leaves it out. key_norm: a layer norm where `norm` stands.
        layer, layers: which of how many this is; decays and m start the stronger spread over the channels the deeper it stands.
        mode: "exact", or "upstream", the arithmetic of the published CUDA kernels (ops.bi_wkv). order: of the sequence, default row-major.

    Input and output (b, *spatial, d_model), any size, 2D and 3D. Weights: spatial_decay, spatial_first (d,), spatial_mix_k, _v, _r (1, 1, d),
    key, value, receptance, output, key_norm.
    """

    def __init__(
        self,
        d_model: int,
        *,
        pixels: int = 1,
        share: float | None = None,
        key_norm: bool = False,
        layer: int = 0,
        layers: int = 1,
        mode: str = "exact",
        order: Order | None = None,
    ) -> None:
        super().__init__()
        self.pixels, self.share, self.mode, self.order = pixels, share, mode, order
        along, depth = _place(d_model), layer / max(layers - 1, 1)
        self.spatial_decay = nn.Parameter(-5 + 8 * _place(d_model, last=1.0) ** (0.7 + 1.3 * depth))
        self.spatial_first = nn.Parameter(math.log(0.3) + 0.5 * ((torch.arange(d_model) + 1) % 3 - 1))
        if pixels:
            mix = along ** (1 - layer / layers)
            for name, start in (("k", mix), ("v", mix + 0.3 * depth), ("r", mix.sqrt())):
                self.register_parameter(f"spatial_mix_{name}", nn.Parameter(start.view(1, 1, -1)))
        self.key, self.value, self.receptance, self.output = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        self.key_norm = nn.LayerNorm(d_model) if key_norm else None

    def forward(self, x: Tensor) -> Tensor:
        """(b, *spatial, d_model) -> the same shape."""
        length = math.prod(cut.whole(x.shape[1:-1]))
        xk, xv, xr = mixed(self, x, "kvr")
        k, v, r = self.key(xk), self.value(xv), self.receptance(xr)
        w, u = self.spatial_decay / max(length, 1), self.spatial_first / max(length, 1)
        if self.order is None:
            y = ops.bi_wkv(w, u, k.flatten(1, -2), v.flatten(1, -2), mode=self.mode).view_as(v)
        else:
            y = ops.bi_wkv(w, u, k, v, mode=self.mode, order=self.order)
        if self.key_norm is not None:
            y = self.key_norm(y)
        out: Tensor = self.output(torch.sigmoid(r) * y)
        return out


class ChannelMix(Leaf):
    """RWKV's channel mix: sigmoid(receptance(m_r x + (1 - m_r) s)) value(norm(relu(key(m_k x + (1 - m_k) s))^2)), s = q_shift(x).

    hidden: channels behind `key`, default 4 d_model. Further arguments, input and output as SpatialMix. Weights: spatial_mix_k, _r (1, 1, d),
    key, receptance, value, key_norm.
    """

    def __init__(
        self,
        d_model: int,
        hidden: int | None = None,
        *,
        pixels: int = 1,
        share: float | None = None,
        key_norm: bool = False,
        layer: int = 0,
        layers: int = 1,
    ) -> None:
        super().__init__()
        self.pixels, self.share = pixels, share
        hidden = hidden or 4 * d_model
        if pixels:
            for name in "kr":
                self.register_parameter(f"spatial_mix_{name}", nn.Parameter((_place(d_model) ** (1 - layer / layers)).view(1, 1, -1)))
        self.key, self.receptance = nn.Linear(d_model, hidden, bias=False), nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(hidden, d_model, bias=False)
        self.key_norm = nn.LayerNorm(hidden) if key_norm else None

    def forward(self, x: Tensor) -> Tensor:
        """(b, *spatial, d_model) -> the same shape."""
        xk, xr = mixed(self, x, "kr")
        k = torch.relu(self.key(xk)).square()
        if self.key_norm is not None:
            k = self.key_norm(k)
        out: Tensor = torch.sigmoid(self.receptance(xr)) * self.value(k)
        return out


def mixed(module: SpatialMix | ChannelMix, x: Tensor, names: str) -> list[Tensor]:
    """x mixed with its shifted self, once for each of the module's spatial_mix parameters."""
    if not module.pixels:
        return [x] * len(names)
    shifted = q_shift(x, module.pixels, module.share)
    return [shifted + getattr(module, f"spatial_mix_{name}").flatten() * (x - shifted) for name in names]


def _place(channels: int, last: float | None = None) -> Tensor:
    """Where each channel stands among all: from 0 to (c - 1) / c, or to `last`."""
    at = torch.arange(channels, dtype=torch.float32)
    return at / channels if last is None else last * at / max(channels - 1, 1)
