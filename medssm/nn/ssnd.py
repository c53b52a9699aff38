"""SSND: VMamba's SS2D mixer in any number of dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medssm import ops
from medssm.kernels.dtypes import widened
from medssm.nn.blocks import depthwise
from medssm.nn.leaf import Leaf
from medssm.nn.mamba import rates, start_steps, step_rank
from medssm.orders import Order, axes3d, cross2d


class SSND(Leaf):
    """Scan an image or a volume in several orders at once (SS2D of Liu et al., VMamba, arXiv 2401.10166, in n dimensions):

        u, z = split(in_proj(x));   u = silu(depthwise_conv(u));   dt_k, B_k, C_k = split(x_proj_k u)
        y = sum_k selective_scan(u, dt_proj_k dt_k, -exp(A_logs_k), B_k, C_k, Ds_k) in order k;   out = out_proj(out_norm(y) silu(z))

    Args:
        d_model: channels in and out. d_state: n. d_conv: the side of the depthwise kernel, odd. expand: inner channels / d_model.
        dt_rank: "auto" is ceil(d_model / 16); the step is expanded inside the kernel, never stored. dt_*: as Mamba.
        spatial_dims: 2 or 3. orders: default cross2d() in 2D (VMamba's four), axes3d() in 3D (three axes, both ways).
        dropout: after out_proj. conv_bias, bias: of the convolution, and of in_proj and out_proj. d_conv=1 leaves the convolution out.
        gate: "silu"; "linear", out_norm(y) z; or None, without z (VMamba's later models).

    Input and output (b, *spatial, d_model), any size. Weights, k orders: in_proj, conv2d or conv3d, x_proj_weight (k, rank + 2n, inner),
    dt_projs_weight (k, inner, rank), dt_projs_bias (k, inner), A_logs (k inner, n), Ds (k inner), out_norm, out_proj: in 2D VMamba's.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 3,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        dropout: float = 0.0,
        conv_bias: bool = True,
        bias: bool = False,
        *,
        spatial_dims: int = 2,
        orders: Sequence[Order] | None = None,
        gate: str | None = "silu",
    ) -> None:
        super().__init__()
        if gate not in ("silu", "linear", None):
            raise ValueError(f"gate: expected 'silu', 'linear' or None, got {gate!r}")
        self.orders = orders_of(spatial_dims, orders)
        k, inner, rank = len(self.orders), int(expand * d_model), step_rank(d_model, dt_rank)
        self.d_state, self.dt_rank, self.spatial_dims, self.gate = d_state, rank, spatial_dims, gate
        self.in_proj = nn.Linear(d_model, 2 * inner if gate else inner, bias=bias)
        if d_conv > 1:
            convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[spatial_dims]
            self.add_module(f"conv{spatial_dims}d", convolution(inner, inner, d_conv, groups=inner, padding=d_conv // 2, bias=conv_bias))
        self.x_proj_weight = nn.Parameter(torch.stack([nn.Linear(inner, rank + 2 * d_state, bias=False).weight.detach() for _ in range(k)]))
        self.dt_projs_weight = nn.Parameter(torch.empty(k, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(k, inner))
        for i in range(k):
            start_steps(self.dt_projs_weight[i], self.dt_projs_bias[i], dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        self.A_logs = nn.Parameter(rates(k * inner, d_state))
        self.Ds = nn.Parameter(torch.ones(k * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, d_model, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(b, *spatial, d_model) -> the same shape."""
        k = len(self.orders)
        u, z = self.in_proj(x).chunk(2, dim=-1) if self.gate else (self.in_proj(x), None)
        u = self._local(u)
        rows = nn.functional.linear(u, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (k, -1))
        dt, B, C = rows.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        A = -torch.exp(widened(self.A_logs)).unflatten(0, (k, -1))
        y = ops.selective_scan_nd(
            u, dt, A, B, C, self.Ds.unflatten(0, (k, -1)), None, self.dt_projs_bias, True, delta_proj=self.dt_projs_weight, orders=self.orders
        )
        y = self.out_norm(y)
        if z is not None:
            y = y * (nn.functional.silu(z) if self.gate == "silu" else z)
        out: Tensor = self.dropout(self.out_proj(y))
        return out

    def _local(self, u: Tensor) -> Tensor:
        convolution: nn.Module | None = getattr(self, f"conv{self.spatial_dims}d", None)
        return nn.functional.silu(u) if convolution is None else depthwise(convolution, u, "silu")


def orders_of(spatial_dims: int, orders: Sequence[Order] | None) -> list[Order]:
    """`orders`, or where there are none cross2d() in 2D and axes3d() in 3D."""
    if orders is not None:
        return list(orders)
    if spatial_dims not in (2, 3):
        raise ValueError(f"orders: expected a list of orders for spatial_dims={spatial_dims}, got None")
    return cross2d() if spatial_dims == 2 else axes3d()
