"""SSD in plain PyTorch: the specification of every other backend.

For each batch and head, along the walk p through the tokens (Dao and Gu, arXiv 2405.21060, sections 5 and 7):

    s_t = clamp(dt_t + bias, low, high), of softplus(dt_t + bias) if asked
    S_t = exp(s_t A) S_{t-1} + s_t x_t B_t^T
    y_t = S_t C_t + D x_t,    out_t = y_t silu(z_t)
"""

from __future__ import annotations

import math

import torch

from medssm.kernels.autocast import without_autocast
from medssm.kernels.dtypes import compute_dtype
from medssm.kernels.walks import over_sequences, walk_steps


@over_sequences("x dt B C z")
def ssd(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    low=0.0,
    high=math.inf,
    index=None,
    starts=None,
    reverse=False,
    initial_state=None,
):
    """x, z (b,l,h,p); dt (b,l,h); A, dt_bias (h,); D (h,) or (h,p); B, C (b,l,g,n); state (b,h,p,n).

    Returns out (b,l,h,p) in x's dtype and the final state (b,h,p,n) in the compute dtype: float64 if any input is, else float32.
    """
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    dtype = compute_dtype(*inputs)
    with without_autocast(x.device):
        out_dtype = x.dtype
        x, dt, A, B, C, D, z, dt_bias, initial_state = (None if t is None else t.to(dtype) for t in inputs)
        batch, length, heads, size = x.shape
        groups, state_size = B.shape[2:]

        s = dt if dt_bias is None else dt + dt_bias
        if dt_softplus:
            s = torch.logaddexp(s, torch.zeros_like(s))  # log(1 + e^s), exact at every s
        s = s.clamp(low, high)

        steps, fresh = walk_steps(length, index, starts, reverse, x.device)
        along = [t.index_select(1, steps).unbind(1) for t in (x, s, B, C)]
        zero = x.new_zeros(batch, heads, size, state_size)
        S = zero if initial_state is None else initial_state
        y = []
        for t, (x_t, s_t, B_t, C_t) in enumerate(zip(*along, strict=True)):
            if t in fresh:
                S = zero
            B_t, C_t = (row.repeat_interleave(heads // groups, dim=1)[:, :, None] for row in (B_t, C_t))  # head j reads group j // (h / g)
            S = torch.exp(s_t * A)[..., None, None] * S + (s_t[..., None] * x_t)[..., None] * B_t
            y.append((S * C_t).sum(-1))
        state = S.clone() if S is zero or S is initial_state else S
        if not y:
            return x.to(out_dtype, copy=True), state

        y = torch.stack(y, 1).index_select(1, torch.argsort(steps))
        if D is not None:
            y = y + (D if D.dim() == 2 else D[:, None]) * x
        if z is not None:
            y = y * torch.nn.functional.silu(z)
        return y.to(out_dtype), state
