"""UNETR++'s efficient paired attention and its block (Shaker et al., arXiv 2212.04497), in 2D and 3D and on any grid of voxels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medssm.kernels.dtypes import compute_dtype
from medssm.nn import positions
from medssm.nn.blocks import CONV, DROPOUT, LINEAR, image, tokens
from medssm.nn.leaf import Leaf
from medssm.nn.unetr import ResidualBlock


class PairedAttention(Leaf):
    """Attention over channels and attention over space with queries and keys in common, on (b, *spatial, c). In each head, with n voxels:

        q, k, v, w = qkvv(x);   q' and k' are q and k, every channel divided by its norm over the voxels
        channels: y = v softmax(temperature q'^T k')^T;   space: s = softmax(temperature2 q' (E^T k)^T) (F^T w)

    E and F (n, projected) are linear layers along the voxels: time and memory grow with n, not with its square. out = [out_proj(s), out_proj2(y)],
    half of the channels each, or y + s.

    Args:
        channels, heads: heads divides the channels. projected: tokens that E and F make of the voxels. dropout: of both attentions.
        grid: the voxels that E and F are made for. On another grid they are interpolated and scaled by the numbers of voxels, so that they stand for
            the same weighted mean; made for one number n of voxels, without a grid, they fit every grid of n.
        shared: F is E. bias: of E and F. fusion: "concat" or "sum". scrambled: upstream's order of s, whose channels and voxels are mixed up:
            (voxels, heads, channels) is read as (channels, heads, voxels).
    """

    def __init__(
        self,
        channels: int,
        grid: Sequence[int],
        heads: int = 4,
        projected: int = 64,
        dropout: float = 0.0,
        *,
        shared: bool = True,
        bias: bool = True,
        fusion: str = "concat",
        scrambled: bool = False,
    ) -> None:
        super().__init__()
        if channels % heads or channels % 2:
            raise ValueError(f"heads: expected a number that divides {channels} channels, which are even, got {heads}")
        self.heads, self.grid, self.scrambled, voxels = heads, tuple(grid), scrambled, math.prod(grid)
        self.temperature, self.temperature2 = (nn.Parameter(torch.ones(heads, 1, 1)) for _ in range(2))
        self.qkvv = nn.Linear(channels, 4 * channels, bias=False)
        bound = 1 / math.sqrt(voxels)
        names = ("E",) if shared else ("E", "F")
        self.projections = nn.ParameterDict({name: torch.empty(voxels, projected).uniform_(-bound, bound) for name in names})
        self.biases = nn.ParameterDict({name: torch.empty(projected).uniform_(-bound, bound) for name in names if bias})
        self.dropout = nn.Dropout(dropout)
        self.out_proj, self.out_proj2 = (nn.Linear(channels, channels // 2) if fusion == "concat" else None for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(b, *spatial, channels) -> the same shape."""
        b, c, d = x.shape[0], x.shape[-1], x.shape[-1] // self.heads
        q, k, v, w = self.qkvv(x.flatten(1, -2)).unflatten(-1, (4, self.heads, d)).permute(2, 0, 3, 1, 4)  # (b, heads, n, d) each
        norms = (torch.linalg.vector_norm(t, dim=2, dtype=compute_dtype(t)).clamp_min(1e-12) for t in (q, k))  # (b, heads, d)
        of_q, of_k = norms
        between = (q.mT @ k) / (of_q[..., :, None] * of_k[..., None, :]) * self.temperature
        y = v @ self.dropout(between.softmax(-1)).mT.to(v.dtype)
        keys, values = self.project("E", x, k), self.project("F" if "F" in self.projections else "E", x, w)
        q = (q * (self.temperature2 / of_q[..., None, :])).to(k.dtype)
        s = functional.scaled_dot_product_attention(q, keys, values, dropout_p=self.dropout.p if self.training else 0.0, scale=1.0)
        s = s.permute(0, 3, 1, 2).reshape(b, -1, c) if self.scrambled else s.transpose(1, 2).flatten(-2)
        y = y.transpose(1, 2).flatten(-2)
        out = y + s if self.out_proj is None or self.out_proj2 is None else torch.cat((self.out_proj(s), self.out_proj2(y)), -1)
        return out.view_as(x)

    def project(self, name: str, x: Tensor, t: Tensor) -> Tensor:
        """E or F along the voxels of x's grid: (b, heads, n, d) -> (b, heads, projected, d)."""
        weight = self.projections[name].unflatten(0, self.grid)[None]
        weight = positions.resize_positions(weight, x, LINEAR[x.dim() - 2]).flatten(0, -2)  # (n, projected)
        out = (weight.mT.to(t.dtype) @ t) * (math.prod(self.grid) / t.shape[2])
        return out + self.biases[name][:, None].to(out.dtype) if name in self.biases else out


class PairedBlock(nn.Module):
    """t = x + pos_embed, t = t + gamma epa(norm(t)), then t + out(local(t)), on (b, c, *spatial); local: residual blocks of convolutions.

    grid: of pos_embed (1, n, c), which is interpolated on another one. blocks: of `local`. The others as PairedAttention.
    """

    def __init__(
        self,
        channels: int,
        grid: Sequence[int],
        heads: int = 4,
        projected: int = 64,
        spatial_dims: int = 3,
        dropout: float = 0.0,
        blocks: int = 1,
        **attention: Any,
    ) -> None:
        super().__init__()
        self.grid, self.interpolation = tuple(grid), LINEAR[spatial_dims]
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(grid), channels))
        self.norm, self.gamma = nn.LayerNorm(channels), nn.Parameter(torch.full((channels,), 1e-6))
        self.epa = PairedAttention(channels, grid, heads, projected, dropout, **attention)
        self.local = nn.Sequential(*(ResidualBlock(channels, channels, spatial_dims, norm="batch") for _ in range(blocks)))
        self.out = nn.Sequential(DROPOUT[spatial_dims](0.1), CONV[spatial_dims](channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        t = tokens(x).contiguous()  # behind a transposed convolution the channels come first
        t = t + positions.resize_positions(self.pos_embed.unflatten(1, self.grid), t, self.interpolation)
        t = t + self.gamma * self.epa(self.norm(t))
        x = image(t)
        y: Tensor = x + self.out(self.local(x))
        return y
