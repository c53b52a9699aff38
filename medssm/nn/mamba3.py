"""Mamba3: the Mamba-3 mixer over a sequence, an image or a volume, in any number of scan orders. Weight names are mamba_ssm's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medssm import ops
from medssm.kernels.dtypes import widened
from medssm.nn.blocks import check_packed
from medssm.nn.leaf import Leaf
from medssm.nn.mamba import step_biases
from medssm.nn.mamba2 import GatedRMSNorm
from medssm.ops.ssd3 import State
from medssm.orders import Order, axes3d, cross2d, raster


class Mamba3(Leaf):
    """The Mamba-3 mixer (Lahoti et al., arXiv 2603.15569), with one set of weights for every order k:

        z, x, B, C, dt, A, trap, angles = split(in_proj(x));   B, C = B_norm(B), C_norm(C)
        y = mean_k ssd3(x, softplus(dt + dt_bias), -f(A), B, C, trap, angles, D, z, B_bias, C_bias) in order k;   out = out_proj(y)

    with f(a) = 1 + a for a >= 0, else 1 / (1 - a), at least A_floor. There is no convolution: the trapezoidal rule sees two tokens. With
    orders=[orders.raster()] it is mamba_ssm's Mamba3. The mean over orders keeps the scale of one scan.

    Args:
        d_model: channels in and out. d_state: n, of a head's (headdim, n) state. expand: inner channels / d_model.
        headdim: channels of a head, a divisor of the inner channels; None takes the largest one that divides 64.
        ngroups: heads share B and C by groups; it divides the heads. rope_fraction: the share of the n channels that turn, 0.5 or 1.
        dt_min, dt_max, dt_init_floor: the steps that softplus(dt_bias) starts from, log-uniform. A_floor: the smallest rate.
        is_outproj_norm: y is gated after an RMS norm of each head. is_mimo: mimo_rank keys and queries for each token, with weights mimo_x, mimo_z
            and mimo_o; channels i and i + n/2 then turn together, otherwise 2i and 2i + 1, as in upstream's kernels.
        spatial_dims: 1, 2 or 3, for the default of `orders`: row-major, both ways; cross2d(); axes3d().

    Input and output (b, l, d_model), or (b, *spatial, d_model), any size; or packed sequences (1, l, d_model).
    Weights, h heads of size p, rank r: in_proj, dt_bias, D (h,), B_bias, C_bias (h, r, n), B_norm, C_norm (n,), mimo_x, mimo_z, mimo_o (h, r, p),
    norm, out_proj, as mamba_ssm.Mamba3.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: float = 2,
        headdim: int | None = None,
        ngroups: int = 1,
        rope_fraction: float = 0.5,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_floor: float = 1e-4,
        is_outproj_norm: bool = False,
        is_mimo: bool = False,
        mimo_rank: int = 4,
        *,
        spatial_dims: int = 1,
        orders: Sequence[Order] | None = None,
    ) -> None:
        super().__init__()
        inner = int(expand * d_model)
        headdim = math.gcd(inner, 64) if headdim is None else headdim
        heads, angles = inner // headdim, int(d_state * rope_fraction) // 2
        if inner % headdim:
            raise ValueError(f"headdim: expected a divisor of the {inner} inner channels, got {headdim}")
        if heads % ngroups:
            raise ValueError(f"ngroups: expected a divisor of the {heads} heads, got {ngroups}")
        if rope_fraction not in (0.5, 1.0):
            raise ValueError(f"rope_fraction: expected 0.5 or 1, got {rope_fraction}")
        if angles < 1 or (is_mimo and d_state % 2):
            raise ValueError(f"d_state: expected at least {int(2 / rope_fraction)}{', an even number,' if is_mimo else ''} to turn, got {d_state}")
        if orders is None:
            if spatial_dims not in (1, 2, 3):
                raise ValueError(f"orders: expected a list of orders for spatial_dims={spatial_dims}, got None")
            both = [raster(), raster(reverse=True)]
            orders = {1: both, 2: cross2d(), 3: axes3d()}[spatial_dims]
        self.orders = list(orders)
        ranks = mimo_rank if is_mimo else 1
        self.headdim, self.ngroups, self.d_state, self.mimo_rank = headdim, ngroups, d_state, ranks
        self.A_floor, self.is_mimo, self.is_outproj_norm = A_floor, is_mimo, is_outproj_norm
        rows = ranks * ngroups * d_state
        self.split = (inner, inner, rows, rows, heads, heads, heads, angles)
        self.in_proj = nn.Linear(d_model, sum(self.split), bias=False)
        self.dt_bias = nn.Parameter(step_biases(heads, dt_min, dt_max, dt_init_floor))
        self.B_bias, self.C_bias = (nn.Parameter(torch.ones(heads, ranks, d_state)) for _ in range(2))
        self.B_norm: nn.Module = GatedRMSNorm(d_state)
        self.C_norm: nn.Module = GatedRMSNorm(d_state)
        if is_mimo:
            ones = torch.ones(heads, ranks, headdim)
            self.mimo_x, self.mimo_z, self.mimo_o = nn.Parameter(ones / ranks), nn.Parameter(ones.clone()), nn.Parameter(ones / ranks)
        self.D = nn.Parameter(torch.ones(heads))
        if is_outproj_norm:
            self.norm: nn.Module = GatedRMSNorm(inner, heads, before_gate=True)
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """(b, l, d_model) or (b, *spatial, d_model) -> the same shape.

        cu_seqlens (n + 1,), int32 or int64, from 0 to l: x (1, l, d_model) holds n sequences one behind the other, each computed on its own.
        """
        check_packed(x, cu_seqlens, self.orders)
        operands, z = self._operands(x)
        y: Tensor = ops.ssd3(**operands, order=self.orders[0], cu_seqlens=cu_seqlens)
        for order in self.orders[1:]:
            y = y + ops.ssd3(**operands, order=order, cu_seqlens=cu_seqlens)
        return self._out(y / len(self.orders), z)

    def step(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """One token, (b, d_model) -> (out, the four states after it), of one forward scan: stepping through a sequence equals orders=[raster()].

        state: of `allocate_inference_cache` before the first token. Its gradients are the scan's.
        """
        self._one_way()
        operands, z = self._operands(x)
        y, last = ops.ssd3_step(state, **operands)  # type: ignore[arg-type]
        return self._out(y, z), *last

    def allocate_inference_cache(self, batch_size: int, dtype: torch.dtype | None = None) -> State:
        """The states of `step`, zeros: angles (b, h, a), matrices (b, h, p, n), in float32 at least; keys (b, r, h, n), x (b, h, p), in dtype."""
        heads, wide, dtype = self.split[4], widened(self.dt_bias), self.dt_bias.dtype if dtype is None else dtype
        angle, matrix = (batch_size, heads, self.split[7]), (batch_size, heads, self.headdim, self.d_state)
        k, x = (batch_size, self.mimo_rank, heads, self.d_state), (batch_size, heads, self.headdim)
        return wide.new_zeros(angle), wide.new_zeros(matrix), wide.new_zeros(k, dtype=dtype), wide.new_zeros(x, dtype=dtype)

    def _one_way(self) -> None:
        if self.orders != [raster()]:
            raise ValueError(f"orders: expected [raster()], since only a forward scan runs token by token, got {self.orders}")

    def _operands(self, x: Tensor) -> tuple[dict[str, Any], Tensor]:
        """(the tensors of ops.ssd3, z (*, inner)); the gate is among them unless it comes after the norm."""
        z, x, B, C, dt, A, trap, angles = self.in_proj(x).split(self.split, dim=-1)
        B, C = (t.unflatten(-1, (self.mimo_rank, self.ngroups, self.d_state)) for t in (B, C))
        rate, dt = heavy_tail(widened(A)), functional.softplus(widened(dt) + self.dt_bias)
        operands = {"x": x.unflatten(-1, (-1, self.headdim)), "dt": dt, "A": -rate.clamp_min(self.A_floor), "trap": trap, "angles": angles}
        operands |= {"B": self.B_norm(B), "C": self.C_norm(C), "B_bias": self.B_bias, "C_bias": self.C_bias, "D": self.D}
        if self.is_mimo:
            operands |= {"mimo_x": self.mimo_x, "pairs": "halves"}
        if not self.is_outproj_norm:
            operands["z"] = z.unflatten(-1, (-1, self.headdim))
            if self.is_mimo:
                operands |= {"mimo_z": self.mimo_z, "mimo_o": self.mimo_o}
        return operands, z

    def _out(self, y: Tensor, z: Tensor) -> Tensor:
        """out of y (*, h, p), of the gate where it is not done yet; with a norm of several ranks y (*, r, h, p)."""
        if self.is_outproj_norm and self.is_mimo:
            gates = (z.unflatten(-1, (-1, self.headdim)).unsqueeze(-3) * self.mimo_z.transpose(0, 1)).flatten(-2)
            y = y if self.mimo_rank > 1 else y.unsqueeze(-3)
            y = self.norm(y.flatten(-2), gates).unflatten(-1, (-1, self.headdim))
            y = (y * self.mimo_o.transpose(0, 1)).sum(-3).to(z.dtype)
        y = y.flatten(-2)
        if self.is_outproj_norm and not self.is_mimo:
            y = self.norm(y, z)
        out: Tensor = self.out_proj(y)
        return out


def heavy_tail(x: Tensor) -> Tensor:
    """1 + x where x >= 0, else 1 / (1 - x): positive, with one derivative everywhere."""
    return x.clamp_min(0) + 1 / (1 - x.clamp_max(0))
