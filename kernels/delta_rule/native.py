"""The delta rule on the CPU: allocates, packs one argument block, calls csrc/delta_rule.

The caller has checked shapes, dtypes and the walk.
"""

from __future__ import annotations

import torch

from medssm.kernels import native
from medssm.kernels.dtypes import compute_dtype
from medssm.kernels.native import fields

# The structs of csrc/delta_rule: arguments.h's Tokens, Scalars and Problem, then cpu_forward.cpp's Forward and cpu_backward.cpp's Backward.
_TOKENS = _SCALARS = fields("data type batch token head")
_PROBLEM = fields(
    ("q k v", _TOKENS), ("beta g", _SCALARS), "initial", ("walk", native.WALK), "batch length heads keys values", "wide threads", ("scale", "d")
)
_forward = native.Kernel("delta_rule", "forward", fields(("problem", _PROBLEM), "out state recalled"))
_backward = native.Kernel("delta_rule", "backward", fields(("problem", _PROBLEM), ("dout", _TOKENS), "dstate recalled", "dq dk dv dbeta dg dinitial"))


def forward(q, k, v, beta, g, scale, index, starts, reverse, initial_state, save, final, sequences=None):
    """Arguments as in `reference.delta_rule`; save: whether a backward will follow; final: whether the final state is wanted.

    Returns (out (b,l,h,dv) in v's dtype, state (b,h,dk,dv) or None, recalled (b,l,h,dv) or None), the last two in the compute dtype: recalled_t =
    S'_t^T k_t is what the state holds for a key before its token.
    """
    q, k, v, initial_state, dtype = _dense(q, k, v, beta, g, initial_state)
    out = torch.empty(v.shape, dtype=v.dtype)
    state = native.new_state(q, (*q.shape[2:], v.shape[3]), dtype, initial_state, sequences) if final else None
    recalled = torch.empty(v.shape, dtype=dtype) if save else None
    if out.numel():
        _forward(
            *_problem(q, k, v, beta, g, scale, index, starts, sequences, reverse, initial_state, dtype),
            out.data_ptr(),
            native.pointer(state),
            native.pointer(recalled),
        )
    return out, state, recalled


def backward(dout, dstate, recalled, q, k, v, beta, g, scale, index, starts, reverse, initial_state, sequences=None):
    """Gradients of q, k, v, beta, g and initial_state (None where that input is), each in its input's dtype and contiguous."""
    inputs = (q, k, v, beta, g, initial_state)
    q, k, v, initial_state, dtype = _dense(*inputs)
    dout = native.lanes(dout)
    dstate = native.contiguous(dstate, dtype)
    dq, dk, dv, dbeta, dg = gradients = [native.like(t, dtype) for t in inputs[:5]]
    dinitial = None if initial_state is None else native.new_state(q, initial_state.shape[1:], dtype, dstate, sequences)
    if q.numel() and v.numel():
        _backward(
            *_problem(q, k, v, beta, g, scale, index, starts, sequences, reverse, initial_state, dtype),
            dout.data_ptr(),
            native.DTYPES[dout.dtype],
            *dout.stride()[:3],
            native.pointer(dstate),
            recalled.data_ptr(),
            *(native.pointer(t) for t in (dq, dk, dv, dbeta, dg, dinitial)),
        )
    else:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
    return tuple(None if t is None else gradient.to(t.dtype) for gradient, t in zip((*gradients, dinitial), inputs, strict=True))


def _dense(q, k, v, beta, g, initial_state):
    """Tokens with adjacent features, the state dense in the compute dtype, and that dtype."""
    dtype = compute_dtype(q, k, v, beta, g, initial_state)
    return native.lanes(q), native.lanes(k), native.lanes(v), native.contiguous(initial_state, dtype), dtype


def _problem(q, k, v, beta, g, scale, index, starts, sequences, reverse, initial_state, dtype):
    """The fields of csrc/delta_rule/arguments.h's Problem."""
    batch, length, heads, keys = q.shape
    tokens = [field for t in (q, k, v) for field in (t.data_ptr(), native.DTYPES[t.dtype], *t.stride()[:3])]
    scalars = [field for t in (beta, g) for field in ((0,) * 5 if t is None else (t.data_ptr(), native.DTYPES[t.dtype], *t.stride()))]
    return (
        *tokens,
        *scalars,
        native.pointer(initial_state),
        *native.walk(index, starts, sequences, reverse),
        batch,
        length,
        heads,
        keys,
        v.shape[3],
        dtype is torch.float64,
        torch.get_num_threads(),
        scale,
    )
