"""Mamba2: the Mamba-2 mixer over a sequence, an image or a volume, in any number of scan orders. Weight names are mamba_ssm's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medssm import ops
from medssm.kernels.dtypes import widened
from medssm.nn.blocks import causal, check_packed
from medssm.nn.leaf import Leaf
from medssm.nn.mamba import step_biases
from medssm.nn.norms import grouped_norm
from medssm.orders import Order, axes3d, cross2d, raster


class Mamba2(Leaf):
    """The Mamba-2 mixer (Dao and Gu, arXiv 2405.21060, section 7), with one set of weights for every order k:

        z, u, dt = split(in_proj(x));   x_k, B_k, C_k = split(silu(conv1d(u)) in order k)
        y = mean_k ssd(x_k, softplus(dt + dt_bias), -exp(A_log), B_k, C_k, D) in order k;   out = out_proj(norm(y silu(z)))

    With orders=[orders.raster()] it is mamba_ssm's Mamba2. The mean over orders keeps the scale of one scan.

    Args:
        d_model: channels in and out. d_state: n, of a head's (headdim, n) state. d_conv: taps of the short convolution.
        expand: inner channels / d_model. headdim: channels of a head, a divisor of the inner channels; None takes the largest one that divides 64.
        ngroups: heads share B and C by groups; it divides the heads. A_init_range: A starts uniform in it, negated. D_has_hdim: D has a value for
            every channel instead of every head.
        rmsnorm: an RMS norm of each group's channels before out_proj; without it y is gated alone. norm_before_gate: norm(y) silu(z).
        dt_min, dt_max, dt_init_floor: the steps that softplus(dt_bias) starts from, log-uniform. dt_limit: (low, high), what the step is clamped to.
        bias, conv_bias: of in_proj and out_proj, and of conv1d.
        spatial_dims: 1, 2 or 3, for the default of `orders`: row-major, both ways; cross2d(); axes3d().

    Input and output (b, l, d_model), or (b, *spatial, d_model), any size; or packed sequences (1, l, d_model).
    Weights, h heads: in_proj, conv1d, dt_bias (h,), A_log (h,), D (h,) or (inner,), norm.weight, out_proj, as mamba_ssm.Mamba2.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2,
        headdim: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        *,
        spatial_dims: int = 1,
        orders: Sequence[Order] | None = None,
    ) -> None:
        super().__init__()
        inner = int(expand * d_model)
        headdim = math.gcd(inner, 64) if headdim is None else headdim
        heads = inner // headdim
        if inner % headdim:
            raise ValueError(f"headdim: expected a divisor of the {inner} inner channels, got {headdim}")
        if heads % ngroups:
            raise ValueError(f"ngroups: expected a divisor of the {heads} heads, got {ngroups}")
        if orders is None:
            if spatial_dims not in (1, 2, 3):
                raise ValueError(f"orders: expected a list of orders for spatial_dims={spatial_dims}, got None")
            both = [raster(), raster(reverse=True)]
            orders = {1: both, 2: cross2d(), 3: axes3d()}[spatial_dims]
        self.orders = list(orders)
        self.headdim, self.ngroups, self.d_state, self.dt_limit = headdim, ngroups, d_state, (dt_limit[0], dt_limit[1])
        self.split = (inner, inner + 2 * ngroups * d_state, heads)
        self.in_proj = nn.Linear(d_model, sum(self.split), bias=bias)
        channels = self.split[1]
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels, padding=d_conv - 1, bias=conv_bias)
        self.dt_bias = nn.Parameter(step_biases(heads, dt_min, dt_max, dt_init_floor))
        self.A_log = nn.Parameter(torch.log(torch.empty(heads).uniform_(*A_init_range)))
        self.D = nn.Parameter(torch.ones(inner if D_has_hdim else heads))
        self.norm: nn.Module | None = GatedRMSNorm(inner, ngroups, norm_before_gate) if rmsnorm else None
        self.out_proj = nn.Linear(inner, d_model, bias=bias)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """(b, l, d_model) or (b, *spatial, d_model) -> the same shape.

        cu_seqlens (n + 1,), int32 or int64, from 0 to l: x (1, l, d_model) holds n sequences one behind the other, each computed on its own.
        """
        check_packed(x, cu_seqlens, self.orders)
        z, u, dt = self.in_proj(x).split(self.split, dim=-1)
        y = self._scan(u, dt, self.orders[0], cu_seqlens)
        for order in self.orders[1:]:
            y = y + self._scan(u, dt, order, cu_seqlens)
        out: Tensor = self.out_proj(self._gate(y / len(self.orders), z))
        return out

    def _scan(self, u: Tensor, dt: Tensor, order: Order, cu_seqlens: Tensor | None) -> Tensor:
        """One scan with its own convolution, (b, *spatial, inner)."""
        operands = self._operands(causal(self.conv1d, u, order, cu_seqlens), dt)
        y: Tensor = ops.ssd(*operands, dt_limit=self.dt_limit, order=order, cu_seqlens=cu_seqlens)
        return y.flatten(-2)

    def _operands(self, u: Tensor, dt: Tensor) -> tuple[Any, ...]:
        """x to dt_softplus of ops.ssd (or ssd_step), from the convolved u and the projected dt."""
        rows = self.ngroups * self.d_state
        x, B, C = u.split([self.split[0], rows, rows], dim=-1)
        D = self.D if self.D.shape[0] == self.A_log.shape[0] else self.D.view(-1, self.headdim)
        B, C = (t.unflatten(-1, (self.ngroups, -1)) for t in (B, C))
        return x.unflatten(-1, (-1, self.headdim)), dt, -torch.exp(widened(self.A_log)), B, C, D, None, self.dt_bias, True

    def _gate(self, y: Tensor, z: Tensor) -> Tensor:
        gated: Tensor = y * nn.functional.silu(z) if self.norm is None else self.norm(y, z)
        return gated


class GatedRMSNorm(nn.Module):
    """RMS norm of y silu(z) over each group of channels; before_gate: of y, and the result gated. In float32 at least."""

    def __init__(self, channels: int, groups: int = 1, before_gate: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.groups, self.before_gate, self.eps = groups, before_gate, eps

    def forward(
        self,
        y: Tensor,  # (*, channels)
        z: Tensor | None = None,  # (*, channels); None: the norm alone
    ) -> Tensor:
        """The gated norm, of y's shape and dtype."""
        size = y.shape[-1] // self.groups
        return grouped_norm(y, self.weight, None, z, size=size, eps=self.eps, norm_before_gate=self.before_gate, rms=True)
