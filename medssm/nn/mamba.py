"""Mamba mixers: one selective scan per direction, each with its own parameters, summed. Weight names are mamba_ssm's and its forks'."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from medssm import ops
from medssm.kernels.dtypes import widened
from medssm.nn.blocks import causal, check_packed
from medssm.nn.inner import steps
from medssm.nn.leaf import Leaf
from medssm.orders import Order, raster, tri3d


class Mamba(Leaf):
    """The Mamba mixer (Gu and Dao, arXiv 2312.00752, section 3.4): for one direction

        u, z = split(in_proj(x));   u = silu(conv1d(u));   dt, B, C = split(x_proj(u))
        y = selective_scan(u, dt_proj(dt), -exp(A_log), B, C, D) silu(z);   out = out_proj(y)

    Args:
        d_model: channels in and out. d_state: n. d_conv: taps of the short convolution. expand: inner channels / d_model.
        dt_rank: of the step projection, "auto" is ceil(d_model / 16). dt_min, dt_max, dt_init, dt_scale, dt_init_floor: the steps that
            softplus(dt_proj.bias) starts from, log-uniform, and how dt_proj.weight starts ("random" or "constant").
        conv_bias, bias: of conv1d, and of in_proj and out_proj.

    Input and output (b, l, d_model), or (b, *spatial, d_model): tokens in row-major order; or packed sequences (1, l, d_model).
    Weights: A_log (inner, n), D (inner,), in_proj, conv1d, x_proj, dt_proj, out_proj, as mamba_ssm.Mamba.
    """

    suffixes: tuple[str, ...] = ("",)
    # Of the first direction; the others have the same with their suffix.
    A_log: nn.Parameter
    D: nn.Parameter
    conv1d: nn.Conv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        inner, rank = int(expand * d_model), step_rank(d_model, dt_rank)
        self.d_model, self.d_state, self.dt_rank = d_model, d_state, rank
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias)
        for s in dict.fromkeys(self.suffixes):
            self.register_parameter(f"A{s}_log", nn.Parameter(rates(inner, d_state)))
            self.register_parameter(f"D{s}", nn.Parameter(torch.ones(inner)))
            self.add_module(f"conv1d{s}", nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1, bias=conv_bias))
            self.add_module(f"x_proj{s}", nn.Linear(inner, rank + 2 * d_state, bias=False))
            project = nn.Linear(rank, inner)
            start_steps(project.weight, project.bias, dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
            self.add_module(f"dt_proj{s}", project)
        self.out_proj = nn.Linear(inner, d_model, bias=bias)

    def orders(self, x: Tensor) -> list[Order]:
        """One order per direction, in the order of `suffixes`, for an input."""
        return [raster()]

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """(b, l, d_model) or (b, *spatial, d_model) -> the same shape.

        cu_seqlens (n + 1,), int32 or int64, from 0 to l: x (1, l, d_model) holds n sequences one behind the other, each computed on its own.
        """
        orders = self.orders(x)
        check_packed(x, cu_seqlens, orders)
        u, z = self.in_proj(x).chunk(2, dim=-1)
        first, *others = zip(self.suffixes, orders, strict=True)
        y = self._scan(u, z, *first, cu_seqlens)
        for suffix, order in others:
            y = y + self._scan(u, z, suffix, order, cu_seqlens)
        out: Tensor = self.out_proj(self.merge(y))
        return out

    def merge(self, y: Tensor) -> Tensor:
        """What becomes of the sum over directions before out_proj."""
        return y

    def _scan(self, u: Tensor, z: Tensor, suffix: str, order: Order, cu_seqlens: Tensor | None) -> Tensor:
        """One direction's gated scan, (b, *spatial, inner)."""
        u = causal(getattr(self, f"conv1d{suffix}"), u, order, cu_seqlens)
        y: Tensor = ops.selective_scan(**self._operands(u, z, suffix), order=order, cu_seqlens=cu_seqlens)
        return y

    def _operands(self, u: Tensor, z: Tensor, suffix: str = "") -> dict[str, Any]:
        """Arguments of ops.selective_scan, or of its step, from the convolved u."""
        dt, B, C = getattr(self, f"x_proj{suffix}")(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        A, D = -torch.exp(widened(getattr(self, f"A{suffix}_log"))), getattr(self, f"D{suffix}")
        return {"u": u, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_softplus": True, **steps(getattr(self, f"dt_proj{suffix}"), dt)}


class BiMamba(Mamba):
    """Vim's bidirectional mixer ("v2", Zhu et al., arXiv 2401.09417): a forward and a backward scan with their own parameters (suffix _b).

    divide_out halves the sum, as Vim's released models do. Further arguments as Mamba.
    """

    suffixes = ("", "_b")

    def __init__(self, d_model: int, *args: Any, divide_out: bool = False, **kwargs: Any) -> None:
        super().__init__(d_model, *args, **kwargs)
        self.divide_out = divide_out

    def orders(self, x: Tensor) -> list[Order]:
        return [raster(), raster(reverse=True)]

    def merge(self, y: Tensor) -> Tensor:
        return y / 2 if self.divide_out else y


class TriMamba(Mamba):
    """SegMamba's tri-orientated mixer ("v3", Xing et al., arXiv 2401.13560): forward, backward (_b) and across slices (_s).

    slices: into how many chunks the row-major sequence falls for the third direction; None takes the first spatial axis of the input, so
    that it steps through the same in-slice position of each slice, at any input size. Further arguments as Mamba.
    """

    suffixes = ("", "_b", "_s")

    def __init__(self, d_model: int, *args: Any, slices: int | None = None, **kwargs: Any) -> None:
        super().__init__(d_model, *args, **kwargs)
        self.slices = slices

    def orders(self, x: Tensor) -> list[Order]:
        return tri3d(self.slices)


class FlipMamba(Mamba):
    """nnMamba's mixer (Gong et al., arXiv 2402.03526): the mean of one Mamba over the tokens as they are, in reverse, with their channels in reverse,
    and both, each turned back. Arguments as Mamba."""

    suffixes = ("", "")  # both directions have the same weights

    def orders(self, x: Tensor) -> list[Order]:
        return [raster(), raster(reverse=True)]

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """(b, l, d_model) or (b, *spatial, d_model) -> the same shape."""
        out = super().forward(x, cu_seqlens=cu_seqlens) + super().forward(x.flip(-1), cu_seqlens=cu_seqlens).flip(-1)
        return out / 4


def rates(channels: int, state: int) -> Tensor:
    """A_log of the S4D-real start: A_n = -(n + 1) in every channel."""
    return torch.log(torch.arange(1, state + 1, dtype=torch.float32)).repeat(channels, 1)


def step_rank(d_model: int, dt_rank: int | str) -> int:
    """The rank of a step projection: dt_rank, "auto" for ceil(d_model / 16)."""
    return math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)


@torch.no_grad()
def start_steps(
    weight: Tensor,  # (inner, rank)
    bias: Tensor,  # (inner,)
    low: float,
    high: float,
    init: str,
    scale: float,
    floor: float,
) -> None:
    """Start a step projection: softplus(bias) log-uniform in [low, high], at least floor; weight uniform or constant in rank**-0.5 scale."""
    if init not in ("random", "constant"):
        raise ValueError(f"dt_init: expected 'random' or 'constant', got {init!r}")
    if weight.is_meta:  # there is nothing to start, and PyTorch takes long to find that out
        return
    spread = weight.shape[-1] ** -0.5 * scale
    if init == "random":
        weight.uniform_(-spread, spread)
    else:
        weight.fill_(spread)
    bias.copy_(inverse_softplus(torch.exp(torch.rand_like(bias) * (math.log(high) - math.log(low)) + math.log(low)).clamp_min(floor)))


def step_biases(heads: int, low: float, high: float, floor: float = 0.0) -> Tensor:
    """Biases (heads,) whose softplus is log-uniform in [low, high], at least floor."""
    return inverse_softplus(torch.exp(torch.empty(heads).uniform_(math.log(low), math.log(high))).clamp_min(floor))


def inverse_softplus(dt: Tensor) -> Tensor:
    """The x with softplus(x) = dt, for dt above 0."""
    return dt + torch.log(-torch.expm1(-dt))
