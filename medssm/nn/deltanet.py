"""DeltaNet and its kin (gated DeltaNet, KDA, gated DeltaNet-2, RWKV-7) for images and volumes: the delta rule along several scan orders at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medssm import ops
from medssm.kernels.dtypes import widened
from medssm.nn.blocks import CONV, causal, check_packed, depthwise
from medssm.nn.leaf import Leaf
from medssm.nn.mamba import step_biases
from medssm.nn.ssnd import orders_of
from medssm.orders import Order

RULES = ("delta", "kda", "gdn2", "rwkv7")


class DeltaNet(Leaf):
    """The mixer of DeltaNet (Yang et al., arXiv 2406.06484) and gated DeltaNet (arXiv 2412.06464), with one set of weights for every order k:

        q, k, v = split(silu(conv(qkv_proj(x))));   q, k to unit length a head;   beta = sigmoid(b_proj(x))
        g = -exp(A_log) softplus(a_proj(x) + dt_bias)
        o = mean_k delta_rule(q, k, v, beta, g) in order k;   out = o_proj(o_norm(o) silu(g_proj(x)))

    A head's state maps its keys to values; a token replaces what the state holds for its key by its value, in part (beta), and all of it fades (g).
    The mean over orders keeps the scale of one scan; an order and its reverse together see all voxels. That is the rule "delta". In its place, with
    gates of a number per key or value channel by way of `rank` channels (a_proj, b_proj, w_proj):

        "kda"      g per key: -exp(A_log) softplus(a_proj(x) + dt_bias) (Kimi delta attention, arXiv 2510.26692)
        "gdn2"     the same g; what is erased is recalled for b * k, b = sigmoid(b_proj(x)); what is written is w * v, w = sigmoid(w_proj(x)) (gated
                   DeltaNet-2, arXiv 2605.22791)
        "rwkv7"    g per key: -exp(-1/2) sigmoid(a_proj(x) + dt_bias); k is erased in part, b * k, b = sigmoid(b_proj(x)), and k (1 + (b - 1) k_a) is
                   written (the rule of RWKV-7, arXiv 2503.14456, without its token shift and bonus)

    Args:
        d_model: channels in and out. heads: that share the channels. expand_k, expand_v: channels of q and k, and of v, over d_model.
        rule: one of the above. rank: channels that the gates per channel pass through.
        gated: with the decay g; only "delta" can be without it: its state then forgets only what is replaced. gate: "silu", or None, without g_proj.
        conv: "space", a depthwise convolution over the voxels around, once for all orders; "order", a causal one along each order; None, silu
            alone. d_conv: its side or taps, odd in space.
        dt_min, dt_max: the steps that softplus(dt_bias) starts from, log-uniform.
        spatial_dims: 2 or 3. orders: default cross2d() in 2D, axes3d() in 3D.

    Input and output (b, *spatial, d_model), any size; or packed sequences (1, l, d_model), with orders=[raster()].
    Weights, h heads: qkv_proj, convolution, b_proj, a_proj, w_proj, dt_bias (h,) or one per key channel, A_log (h,), k_a, g_proj, o_norm (RMS over a
    head's channels), o_proj.
    """

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        *,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        rule: str = "delta",
        rank: int = 16,
        gated: bool = True,
        gate: str | None = "silu",
        conv: str | None = "space",
        d_conv: int = 3,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        spatial_dims: int = 2,
        orders: Sequence[Order] | None = None,
    ) -> None:
        super().__init__()
        if rule not in RULES:
            raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
        if not gated and rule != "delta":
            raise ValueError(f"gated: expected True with rule={rule!r}, got False")
        if gate not in ("silu", None):
            raise ValueError(f"gate: expected 'silu' or None, got {gate!r}")
        if conv not in ("space", "order", None):
            raise ValueError(f"conv: expected 'space', 'order' or None, got {conv!r}")
        keys, values = int(expand_k * d_model), int(expand_v * d_model)
        if keys < heads or values < heads or keys % heads or values % heads:
            raise ValueError(f"heads: expected a number that divides {keys} channels of keys and {values} of values, got {heads}")
        self.orders = orders_of(spatial_dims, orders)
        self.heads, self.conv, self.rule, self.split = heads, conv, rule, (keys, keys, values)
        channels = sum(self.split)
        self.qkv_proj = nn.Linear(d_model, channels, bias=False)
        if conv == "space":
            self.convolution: nn.Module = CONV[spatial_dims](channels, channels, d_conv, groups=channels, padding=d_conv // 2, bias=False)
        elif conv == "order":
            self.convolution = nn.Conv1d(channels, channels, d_conv, groups=channels, padding=d_conv - 1, bias=False)

        def per_channel(width: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(d_model, rank, bias=False), nn.Linear(rank, width, bias=False))

        self.b_proj: nn.Module = per_channel(keys) if rule in ("gdn2", "rwkv7") else nn.Linear(d_model, heads, bias=False)
        self.w_proj = per_channel(values) if rule == "gdn2" else None
        self.a_proj: nn.Module | None = None
        if rule == "rwkv7":
            self.a_proj = per_channel(keys)
            self.dt_bias = nn.Parameter(torch.linspace(-6, -1, keys // heads).repeat(heads))  # of decays from 0.998 to 0.85
            self.k_a = nn.Parameter(torch.ones(keys))
        elif gated:
            self.a_proj = nn.Linear(d_model, heads, bias=False) if rule == "delta" else per_channel(keys)
            self.dt_bias = nn.Parameter(step_biases(heads if rule == "delta" else keys, dt_min, dt_max))
            self.A_log = nn.Parameter(torch.log(torch.empty(heads).uniform_(1, 16)))
        self.g_proj = nn.Linear(d_model, values, bias=False) if gate else None
        self.o_norm = nn.RMSNorm(values // heads, eps=1e-5)
        self.o_proj = nn.Linear(values, d_model, bias=False)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """(b, *spatial, d_model) -> the same shape.

        cu_seqlens (n + 1,), int32 or int64, from 0 to l: x (1, l, d_model) holds n sequences one behind the other, each computed on its own.
        """
        check_packed(x, cu_seqlens, self.orders)
        if cu_seqlens is not None and self.conv == "space":
            raise ValueError("cu_seqlens: expected None with conv='space', which sees across sequences (conv='order' does not), got a tensor")
        u: Tensor = self.qkv_proj(x)
        gates = self.gates(x)
        if self.conv == "space":
            u = depthwise(self.convolution, u, "silu")
        elif self.conv is None:
            u = functional.silu(u)
        heads = None if self.conv == "order" else self._heads(u)  # the same for every order, or of that order's own convolution

        def scan(order: Order) -> Tensor:
            q, k, v = heads or self._heads(causal(self.convolution, u, order, cu_seqlens))
            o: Tensor = self.recur(q, k, v, gates, order=order, cu_seqlens=cu_seqlens)
            return o

        y = scan(self.orders[0])
        for order in self.orders[1:]:
            y = y + scan(order)
        y = self.o_norm(y / len(self.orders)).flatten(-2)
        if self.g_proj is not None:
            y = y * functional.silu(self.g_proj(x))
        out: Tensor = self.o_proj(y)
        return out

    def gates(self, x: Tensor) -> dict[str, Tensor]:
        """What the rule takes beside q, k and v, the same for every order: beta, g, b, w."""
        b, found = torch.sigmoid(widened(self.b_proj(x))), {}
        if self.a_proj is not None:
            logits = widened(self.a_proj(x)) + self.dt_bias
            if self.rule == "delta":
                found["g"] = -torch.exp(widened(self.A_log)) * functional.softplus(logits)
            elif self.rule == "rwkv7":
                found["g"] = -math.exp(-0.5) * torch.sigmoid(self._by_heads(logits))
            else:
                found["g"] = -torch.exp(widened(self.A_log))[:, None] * functional.softplus(self._by_heads(logits))
        if self.rule in ("gdn2", "rwkv7"):
            found["b"] = self._by_heads(b)
            found["beta"] = b.new_ones(*x.shape[:-1], self.heads)
        else:
            found["beta"] = b
        if self.w_proj is not None:
            found["w"] = torch.sigmoid(widened(self._by_heads(self.w_proj(x))))
        return found

    def recur(self, q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor], **walk: Any) -> Any:
        """`ops.delta_rule` by the rule; gates: what the method of that name gives."""
        settings: dict[str, Any] = {}
        if self.rule == "gdn2":
            settings = {"erase": gates["b"] * k, "write": gates["w"]}
        elif self.rule == "rwkv7":
            settings = {"erase": k, "erase_out": gates["b"] * k, "erase_first": True}
            k = k * (1 + (gates["b"] - 1) * self._by_heads(widened(self.k_a)))
        return ops.delta_rule(q, k, v, gates["beta"], g=gates.get("g"), **settings, **walk)

    def _by_heads(self, t: Tensor) -> Tensor:
        by_heads: Tensor = t.unflatten(-1, (self.heads, -1))
        return by_heads

    def _heads(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys of unit length, and values, by heads."""
        q, k, v = map(self._by_heads, u.split(self.split, dim=-1))
        return functional.normalize(q, dim=-1, eps=1e-6), functional.normalize(k, dim=-1, eps=1e-6), v
