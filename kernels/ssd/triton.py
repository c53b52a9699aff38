"""SSD (Mamba-2) on a GPU, in Triton: gated linear attention's recurrence with q = C, k = B, v = s x and g = s A, decays per head.

The kernels multiply x by s as they load it. Before they store, they add D x and multiply by silu(z). PyTorch computes the steps s, one number for
each token and head. The caller has checked shapes, dtypes and the walk.
"""

from __future__ import annotations

import torch

from medssm.kernels.autocast import without_autocast
from medssm.kernels.matrix_state import triton_core as core
from medssm.kernels.triton import plain


def forward(x, dt, A, B, C, D, z, dt_bias, dt_softplus, low, high, index, starts, reverse, initial_state, save, final, sequences=None):
    """Arguments as in `reference.ssd`; save: keep y, the output before the gate; final: whether the final state is wanted.

    Returns (out (b,l,h,p) contiguous, state (b,h,p,n) or None, y (b,l,h,p) float32 or None).
    """
    x, dt, A, B, C, D, z, dt_bias, initial_state = plain(x, dt, A, B, C, D, z, dt_bias, initial_state)
    with without_autocast(x.device):
        s = _steps(dt, dt_bias, dt_softplus, low, high)
        scan = core.scan_of(C, B, x, s * A.float(), 1.0, x.shape[2], index, starts, reverse, sequences, s, _skip(D, x), z)
        out, state, y = core.forward(scan, None if initial_state is None else initial_state.transpose(2, 3), save)
        return out, state.transpose(2, 3).contiguous() if final else None, y


def backward(dout, dstate, y, x, dt, A, B, C, D, z, dt_bias, dt_softplus, low, high, index, starts, reverse, initial_state, sequences=None):
    """y: what forward kept, where there is z. Gradients of x, dt, A, B, C, D, z, dt_bias and initial_state (None where that input is)."""
    dout, dstate, y, x, dt, A, B, C, D, z, dt_bias, initial_state = plain(dout, dstate, y, x, dt, A, B, C, D, z, dt_bias, initial_state)
    with without_autocast(x.device):
        raw = _raw_steps(dt, dt_bias)
        s = _steps(dt, dt_bias, dt_softplus, low, high)
        scan = core.scan_of(C, B, x, s * A.float(), 1.0, x.shape[2], index, starts, reverse, sequences, s, _skip(D, x), z)
        initial, dfinal = (None if t is None else t.transpose(2, 3) for t in (initial_state, dstate))
        found = core.backward(dout, dfinal, scan, initial, y)
        dA = (s * found.dg).sum((0, 1)).to(A.dtype)
        ds = found.dsteps + found.dg * A.float()
        unclamped = torch.logaddexp(raw, torch.zeros_like(raw)) if dt_softplus else raw
        ds = ds.where((unclamped >= low) & (unclamped <= high), 0.0)
        if dt_softplus:
            ds = ds * torch.sigmoid(raw)
        dbias = None if dt_bias is None else ds.sum((0, 1)).to(dt_bias.dtype)
        dinitial = None if initial is None else found.dinitial.transpose(2, 3).to(initial_state.dtype, copy=True).contiguous()
        return found.dv, ds.to(dt.dtype), dA, found.dk, found.dq, _skip_gradient(dout, x, z, D), found.dz, dbias, dinitial


def _steps(dt, dt_bias, dt_softplus, low, high):
    s = _raw_steps(dt, dt_bias)
    if dt_softplus:
        s = torch.logaddexp(s, torch.zeros_like(s))
    return s.clamp(low, high).contiguous()


def _raw_steps(dt, dt_bias):
    return dt.float() if dt_bias is None else dt.float() + dt_bias.float()


def _skip(D, x):
    """D as (h,p)."""
    if D is None:
        return None
    return (D if D.dim() == 2 else D[:, None]).float().expand(x.shape[2:]).contiguous()


def _skip_gradient(dout, x, z, D):
    """Sum over tokens, and over a head's channels where D is per head, of the gradient of y times x."""
    if D is None:
        return None
    products = dout.float() * x if z is None else dout.float() * torch.nn.functional.silu(z.float()) * x
    return products.sum((0, 1) if D.dim() == 2 else (0, 1, 3)).to(D.dtype)
