"""Gated linear attention on the CPU: allocates, packs one argument block, calls csrc/gated_linear_attention.

The caller has checked shapes, dtypes and the walk.
"""

from __future__ import annotations

import torch

from medssm.kernels import native
from medssm.kernels.dtypes import compute_dtype
from medssm.kernels.native import fields

# The structs of csrc: medssm/token_rows.h's HeadTokens and HeadOutput, medssm/matrix_scan.h's StateTensor, gated_linear_attention/problem.h's
# Problem, then the Arguments of its cpu_forward.cpp and cpu_backward.cpp.
_TOKENS, _STATE = fields("data type batch token head"), fields("data type batch head row lane")
_PROBLEM = fields(
    ("q k v g", _TOKENS), ("initial", _STATE), ("walk", native.WALK), "batch length heads keys values", "per_key wide threads", ("scale", "d")
)
_forward = native.Kernel("gated_linear_attention", "forward", fields(("problem", _PROBLEM), ("out", _TOKENS), ("final", _STATE)))
_backward = native.Kernel(
    "gated_linear_attention",
    "backward",
    fields(("problem", _PROBLEM), ("dout", _TOKENS), ("dstate", _STATE), ("dq dk dv dg", _TOKENS), ("dinitial", _STATE)),
)
_ABSENT = (0, 0, 0, 0, 0, 0)


def forward(q, k, v, g, scale, index, starts, reverse, initial_state, final, sequences=None):
    """Arguments as in `reference.gated_linear_attention`; final: whether the final state is wanted.

    Returns (out (b,l,h,dv) contiguous, state (b,h,dk,dv) or None).
    """
    dtype = compute_dtype(q, k, v, g, initial_state)
    out = native.like(v)
    state = native.new_state(q, (*q.shape[2:], v.shape[3]), dtype, initial_state, sequences) if final else None
    if out.numel():
        tensors, initial = _adjacent(q, k, v, g), native.contiguous(initial_state)
        _forward(*_problem(*tensors, initial, scale, index, starts, sequences, reverse, dtype), *_tokens(out), *_state(state))
    return out, state


def backward(dout, dstate, q, k, v, g, scale, index, starts, reverse, initial_state, sequences=None):
    """Gradients of q, k, v, g and initial_state (None where it is), each in its input's dtype and contiguous."""
    dtype = compute_dtype(q, k, v, g, initial_state)
    dq, dk, dv, dg = native.like(q), native.like(k), native.like(v), native.like(g, dtype)
    dinitial = None if initial_state is None else native.new_state(q, initial_state.shape[1:], dtype, dstate, sequences)
    if v.numel():
        tensors, initial, dout, dstate = _adjacent(q, k, v, g), native.contiguous(initial_state), native.lanes(dout), native.contiguous(dstate)
        _backward(
            *_problem(*tensors, initial, scale, index, starts, sequences, reverse, dtype),
            *_tokens(dout),
            *_state(dstate),
            *_tokens(dq),
            *_tokens(dk),
            *_tokens(dv),
            *_tokens(dg),
            *_state(dinitial),
        )
    else:
        for gradient in (dq, dk, dv, dg):
            gradient.zero_()
    return dq, dk, dv, dg.to(g.dtype), None if dinitial is None else dinitial.to(initial_state.dtype)


def _adjacent(q, k, v, g):
    """The tensors with adjacent elements, g where it has one per key. The caller holds them, copies among them, until the kernel is done."""
    return *(native.lanes(t) for t in (q, k, v)), native.lanes(g) if g.dim() == 4 else g


def _problem(q, k, v, g, initial_state, scale, index, starts, sequences, reverse, dtype):
    """The fields of Problem."""
    batch, length, heads, keys = q.shape
    return (
        *_tokens(q),
        *_tokens(k),
        *_tokens(v),
        *_tokens(g),
        *_state(initial_state),
        *native.walk(index, starts, sequences, reverse),
        batch,
        length,
        heads,
        keys,
        v.shape[3],
        g.dim() == 4,
        dtype is torch.float64,
        torch.get_num_threads(),
        scale,
    )


def _tokens(t):
    """The fields of HeadTokens and HeadOutput: (b,l,h,d) with adjacent elements, or (b,l,h)."""
    return t.data_ptr(), native.DTYPES[t.dtype], *t.stride()[:3]


def _state(t):
    """The fields of StateTensor."""
    return _ABSENT if t is None else (t.data_ptr(), native.DTYPES[t.dtype], *t.stride())
