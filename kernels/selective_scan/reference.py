"""Selective scan in plain PyTorch: the specification of every other backend.

For each batch, channel j and state i, along the walk p through the tokens (Gu and Dao, arXiv 2312.00752, section 3):

    s_t = delta_t + bias, softplus(s_t) if asked
    h_t = exp(s_t A) h_{t-1} + s_t B_t u_t
    y_t = C_t . h_t + D u_t,    out_t = y_t silu(z_t)
"""

from __future__ import annotations

import torch

from medssm.kernels.autocast import without_autocast
from medssm.kernels.dtypes import compute_dtype
from medssm.kernels.walks import over_sequences, walk_steps


@over_sequences("u delta B C z")
def selective_scan(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    delta_proj=None,
    index=None,
    starts=None,
    reverse=False,
    initial_state=None,
):
    """u, z (b,l,d); delta (b,l,d), or (b,l,r) with delta_proj (d,r); A (d,n); B, C (b,l,g,n); D, delta_bias (d,); state (b,d,n).

    Returns out (b,l,d) in u's dtype and the final state (b,d,n) in the compute dtype: float64 if any input is, else float32.
    """
    inputs = (u, delta, A, B, C, D, z, delta_bias, delta_proj, initial_state)
    dtype = compute_dtype(*inputs)
    with without_autocast(u.device):
        out_dtype = u.dtype
        u, delta, A, B, C, D, z, delta_bias, delta_proj, initial_state = (None if t is None else t.to(dtype) for t in inputs)
        batch, length, channels = u.shape
        groups = B.shape[2]

        s = delta if delta_proj is None else torch.einsum("blr,dr->bld", delta, delta_proj)
        if delta_bias is not None:
            s = s + delta_bias
        if delta_softplus:
            s = torch.logaddexp(s, torch.zeros_like(s))  # log(1 + e^s), exact at every s

        steps, fresh = walk_steps(length, index, starts, reverse, u.device)
        along = [t.index_select(1, steps).unbind(1) for t in (u, s, B, C)]
        zero = u.new_zeros(batch, channels, A.shape[1])
        h = zero if initial_state is None else initial_state
        y = []
        for t, (u_t, s_t, B_t, C_t) in enumerate(zip(*along, strict=True)):
            if t in fresh:
                h = zero
            B_t, C_t = (x.repeat_interleave(channels // groups, dim=1) for x in (B_t, C_t))  # channel j reads group j // (d / g)
            h = torch.exp(s_t[..., None] * A) * h + (s_t * u_t)[..., None] * B_t
            y.append((h * C_t).sum(-1))
        state = h.clone() if h is zero or h is initial_state else h
        if not y:
            return u.to(out_dtype, copy=True), state

        y = torch.stack(y, 1).index_select(1, torch.argsort(steps))
        if D is not None:
            y = y + D * u
        if z is not None:
            y = y * torch.nn.functional.silu(z)
        return y.to(out_dtype), state


def selective_scan_nd(x, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, delta_proj=None, walks=(), merge="sum"):
    """One selective scan per walk (index, starts, reverse), merged in list order.

    x (b,l,d) or (b,l,k,d); delta (b,l,k,d), or (b,l,k,r) with delta_proj (k,d,r); A (k,d,n); B, C (b,l,k,g,n);
    D, delta_bias (k,d); z (b,l,d). Returns (b,l,d), or (b,l,k,d) for merge="stack", in x's dtype.
    """
    inputs = (x, delta, A, B, C, D, z, delta_bias, delta_proj)
    dtype = compute_dtype(*inputs)
    outputs = []
    for k, (index, starts, reverse) in enumerate(walks):
        one = [None if t is None else t[k] for t in (A, D, delta_bias, delta_proj)]
        u = (x if x.dim() == 3 else x[:, :, k]).to(dtype)
        y, _ = selective_scan(u, delta[:, :, k], one[0], B[:, :, k], C[:, :, k], one[1], None, one[2], delta_softplus, one[3], index, starts, reverse)
        outputs.append(y)
    with without_autocast(x.device):
        if merge == "stack":
            y = torch.stack(outputs, 2)
        else:
            y = outputs[0]
            for other in outputs[1:]:
                y = y + other
            if merge == "mean":
                y = y / len(outputs)
        if z is not None:
            gate = torch.nn.functional.silu(z.to(dtype))
            y = y * (gate.unsqueeze(2) if merge == "stack" else gate)
        return y.to(x.dtype)
