"""Gated linear attention (Yang et al., arXiv 2312.06635) for images and volumes: causal along several scan orders at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medssm import ops
from medssm.kernels.dtypes import compute_dtype
from medssm.nn.blocks import check_packed
from medssm.nn.leaf import Leaf
from medssm.nn.ssnd import orders_of
from medssm.orders import Order


class GatedLinearAttention(Leaf):
    """One set of queries, keys and values, scanned in every order with that order's own decays, and summed:

        q, k, v, z = q_proj(x), k_proj(x), v_proj(x), g_proj(x);   log decay_j = logsigmoid(W_j decay_in(x) + b_j) / slowness
        o = sum_j gated_linear_attention(q, k, v, log decay_j) in order j;   out = o_proj(o_norm(o) silu(z))

    In an order S_t = decay_t S_{t-1} + k_t v_t^T and o_t = q_t S_t: a state of dk x dv a head. An order and its reverse together see all voxels.

    Args:
        d_model: channels in and out. heads: that share the channels. expand_k, expand_v: channels of q and k, and of v, over d_model.
        decay: "key", a number for each head and each of its key channels, by way of `rank` channels; "head", one for each head, from x itself.
        slowness: divides the log decays; the larger, the longer the memory at the start. gate: "silu", or None, without z.
        spatial_dims: 2 or 3. orders: default cross2d() in 2D, axes3d() in 3D.

    Input and output (b, *spatial, d_model), any size; or packed sequences (1, l, d_model), with orders=[raster()].
    Weights, n orders: q_proj, k_proj, v_proj, g_proj, decay_in (where decay is "key"), decay_weight (n, heads dk, rank) or (n, heads, d_model),
    decay_bias, o_norm (RMS over a head's channels), o_proj.
    """

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        *,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        decay: str = "key",
        rank: int = 16,
        slowness: float = 16.0,
        gate: str | None = "silu",
        spatial_dims: int = 2,
        orders: Sequence[Order] | None = None,
    ) -> None:
        super().__init__()
        if decay not in ("key", "head"):
            raise ValueError(f"decay: expected 'key' or 'head', got {decay!r}")
        if gate not in ("silu", None):
            raise ValueError(f"gate: expected 'silu' or None, got {gate!r}")
        keys, values = int(expand_k * d_model), int(expand_v * d_model)
        if keys < heads or keys % heads or values % heads:
            raise ValueError(f"heads: expected a number that divides {keys} channels of keys and {values} of values, got {heads}")
        self.orders = orders_of(spatial_dims, orders)
        self.heads, self.decay_by, self.slowness = heads, decay, slowness
        n = len(self.orders)
        self.q_proj, self.k_proj = nn.Linear(d_model, keys, bias=False), nn.Linear(d_model, keys, bias=False)
        self.v_proj = nn.Linear(d_model, values, bias=False)
        self.g_proj = nn.Linear(d_model, values, bias=False) if gate else None
        self.decay_in = nn.Linear(d_model, rank, bias=False) if decay == "key" else nn.Identity()
        rows, width = (keys, rank) if decay == "key" else (heads, d_model)
        self.decay_weight = nn.Parameter(torch.stack([nn.Linear(width, rows).weight.detach() for _ in range(n)]))
        self.decay_bias = nn.Parameter(torch.zeros(n, rows))
        self.o_norm = nn.RMSNorm(values // heads, eps=1e-5)
        self.o_proj = nn.Linear(values, d_model, bias=False)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """(b, *spatial, d_model) -> the same shape.

        cu_seqlens (n + 1,), int32 or int64, from 0 to l: x (1, l, d_model) holds n sequences one behind the other, each computed on its own.
        """
        check_packed(x, cu_seqlens, self.orders)
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)) for project in (self.q_proj, self.k_proj, self.v_proj))
        low, y = self.decay_in(x), None
        wide = compute_dtype(v)  # of the sum over orders and of its norm
        for order, weight, bias in zip(self.orders, self.decay_weight, self.decay_bias, strict=True):
            g = nn.functional.logsigmoid(nn.functional.linear(low, weight, bias).to(wide)) / self.slowness
            g = g.unflatten(-1, (self.heads, -1)) if self.decay_by == "key" else g
            scanned = ops.gated_linear_attention(q, k, v, g, order=order, cu_seqlens=cu_seqlens)
            y = scanned.to(wide) if y is None else y + scanned
        y = self.o_norm(y).to(v.dtype).flatten(-2)
        if self.g_proj is not None:
            y = y * nn.functional.silu(self.g_proj(x))
        out: Tensor = self.o_proj(y)
        return out
