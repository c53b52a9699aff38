"""The compiled modules under mamba_ssm and VMamba, which hand-written autograd functions call: forward and backward apart.

selective_scan_cuda (fwd, bwd), VMamba's selective_scan_cuda_core, _nrow, _oflex and _ndstate. A backward computes its forward again,
so `x`, what the forward keeps for it, is not read; it holds what upstream's holds, since callers take the last state out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from medssm import ops
from medssm.integrations.mamba_ssm.scan import grouped
from medssm.kernels.dtypes import compute_dtype

_CHUNK = 2048  # tokens per entry of x


@torch.no_grad()
def fwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool
) -> list[Tensor]:
    """selective_scan_cuda.fwd -> [out, x], with z [out, x, out silu(z)].

    Args as selective_scan_fn. out (b, d, l) in u's dtype, without the gate. x (b, d, ceil(l / 2048), 2n), per 2,048 tokens and state dimension:
    the product of the decays so far, the state (the last state is x[:, :, -1, 1::2]).
    """
    out, x = _scan(u, delta, A, B, C, D, delta_bias, delta_softplus)
    gated = [] if z is None else [(out * silu(z.to(out.dtype))).to(u.dtype)]
    return [out.to(u.dtype), x, *gated]


def bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    dz: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool,
) -> list[Any]:
    """selective_scan_cuda.bwd -> [du, ddelta, dA, dB, dC, dD, ddelta_bias], with z dz (written into `dz` if given), then out silu(z) if asked.

    dout: (b, d, l), of what fwd returns last. x, out: of fwd, not read. What is None has the gradient None.
    """
    out_z, found = gradients(
        lambda u, delta, A, B, C, D, delta_bias, z: _differentiable(u, delta, A, B, C, D, z, delta_bias, delta_softplus),
        (u, delta, A, B, C, D, delta_bias, z),
        dout,
    )
    *found, gate = found
    if z is not None:
        found.append(gate if dz is None else dz.copy_(gate))
    return [*found, out_z.detach()] if recompute_out_z else found


def core_fwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool, nrows: int = 1
) -> list[Tensor]:
    """selective_scan_cuda_core.fwd and _nrow.fwd (VMamba) -> [out, x]: fwd without a gate. nrows: of no effect."""
    return fwd(u, delta, A, B, C, D, None, delta_bias, delta_softplus)


def core_bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
) -> list[Any]:
    """selective_scan_cuda_core.bwd and _nrow.bwd (VMamba) -> [du, ddelta, dA, dB, dC, dD, ddelta_bias]."""
    return bwd(u, delta, A, B, C, D, None, delta_bias, dout, x, None, None, delta_softplus, False)


@torch.no_grad()
def oflex_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
    out_float: bool = True,
) -> list[Tensor]:
    """selective_scan_cuda_oflex.fwd (VMamba) -> [out, x].

    delta (b, e, l) and delta_bias (e,) may have fewer channels: channel j takes step j // (d / e). out_float: out in float32 whatever u's dtype.
    """
    bias = None if delta_bias is None else _spread(u, delta_bias, dim=0)
    out, x = _scan(u, _spread(u, delta), A, B, C, D, bias, delta_softplus)
    return [out if out_float else out.to(u.dtype), x]


def oflex_bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
) -> list[Any]:
    """selective_scan_cuda_oflex.bwd (VMamba) -> [du, ddelta, dA, dB, dC, dD, ddelta_bias]; dout in float32 or u's dtype."""

    def forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None) -> Tensor:
        wide, bias = u.to(compute_dtype(u, delta)), None if delta_bias is None else _spread(u, delta_bias, dim=0)
        return _differentiable(wide, _spread(u, delta), A, B, C, D, None, bias, delta_softplus).to(dout.dtype)

    return gradients(forward, (u, delta, A, B, C, D, delta_bias), dout)[1]


def ndstate_fwd(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool, nrows: int = 1
) -> list[Tensor]:
    """selective_scan_cuda_ndstate.fwd (VMamba), the state of size 1: A (d,), B and C (b, g, l) -> [out, x]."""
    return core_fwd(u, delta, A.unsqueeze(1), B.unsqueeze(2), C.unsqueeze(2), D, delta_bias, delta_softplus)


def ndstate_bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
) -> list[Any]:
    """selective_scan_cuda_ndstate.bwd (VMamba) -> [du, ddelta, dA (d,), dB (b, g, l), dC (b, g, l), dD, ddelta_bias]."""
    du, ddelta, dA, dB, dC, *rest = core_bwd(u, delta, A.unsqueeze(1), B.unsqueeze(2), C.unsqueeze(2), D, delta_bias, dout, x, delta_softplus)
    return [du, ddelta, dA.squeeze(1), dB.squeeze(2), dC.squeeze(2), *rest]


def _scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool
) -> tuple[Tensor, Tensor]:
    """out in float32 (float64 when computing in it), and fwd's x."""
    B, C = grouped(B, C, u)
    u = u.to(compute_dtype(u, delta, A, B, C))
    outs, kept, state = [], [], None
    passed: Tensor | int = 0
    for start in range(0, max(u.shape[-1], 1), _CHUNK):
        u_, delta_, B_, C_ = (t[..., start : start + _CHUNK] for t in (u, delta, B, C))
        out, state = ops.selective_scan(
            u_, delta_, A, B_, C_, D, None, delta_bias, delta_softplus, initial_state=state, return_final_state=True, layout="bdl"
        )
        steps = delta_.to(u.dtype) if delta_bias is None else delta_.to(u.dtype) + delta_bias[:, None]
        passed = passed + (softplus(steps) if delta_softplus else steps).sum(-1, keepdim=True)
        outs.append(out)
        kept.append(torch.stack([torch.exp(passed * A), state], dim=-1).flatten(-2))
    return torch.cat(outs, dim=-1).contiguous(), torch.stack(kept, dim=2)


def _differentiable(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool
) -> Tensor:
    return ops.selective_scan(u, delta, A, *grouped(B, C, u), D, z, delta_bias, delta_softplus, layout="bdl")


def _spread(u: Tensor, steps: Tensor, dim: int = 1) -> Tensor:
    """One step per channel of u."""
    return steps.repeat_interleave(u.shape[1] // steps.shape[dim], dim=dim)


def gradients(forward: Callable[..., Any], tensors: Sequence[Tensor | None], dout: Tensor | tuple[Tensor, ...]) -> tuple[Any, list[Any]]:
    """forward(*tensors), computed again, and the gradient of each tensor (None for None) from its output's, dout."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    with torch.enable_grad():
        out = forward(*leaves)
    found = iter(torch.autograd.grad(out, [t for t in leaves if t is not None], dout))
    return out, [None if t is None else next(found) for t in leaves]
