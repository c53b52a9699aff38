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
    ("q k v g", _TOKENS),
    ("initial", _STATE),
    "index starts start_count reverse",
    "batch length heads keys values",
    "per_key wide threads",
    ("scale", "d"),
)
_forward = native.Kernel("gated_linear_attention", "forward", fields(("problem", _PROBLEM), ("out", _TOKENS), ("final", _STATE)))
_backward = native.Kernel(
    "gated_linear_attention",
    "backward",
    fields(("problem", _PROBLEM), ("dout", _TOKENS), ("dstate", _STATE), ("dq dk dv dg", _TOKENS), ("dinitial", _STATE)),
)
_ABSENT = (0, 0, 0, 0, 0, 0)


def forward(q, k, v, g, scale, index, starts, reverse, initial_state, final):
    """Arguments as in `reference.gated_linear_attention`; final: whether the final state is wanted.

    Returns (out (b,l,h,dv) contiguous, state (b,h,dk,dv) or None).
    """
    batch, _, heads, keys = q.shape
    dtype = compute_dtype(q, k, v, g, initial_state)
    out = native.like(v)
    state = torch.empty((batch, heads, keys, v.shape[3]), dtype=dtype, device=v.device) if final else None
    if out.numel():
        tensors = _adjacent(q, k, v, g)
        _forward(*_problem(*tensors, scale, index, starts, reverse, initial_state, dtype), *_tokens(out), *_state(state))
    elif final:
        state.copy_(initial_state) if initial_state is not None else state.zero_()
    return out, state


def backward(dout, dstate, q, k, v, g, scale, index, starts, reverse, initial_state):
    """Gradients of q, k, v, g and initial_state (None where it is), each in its input's dtype and contiguous."""
    dtype = compute_dtype(q, k, v, g, initial_state)
    dq, dk, dv, dinitial = (native.like(t) for t in (q, k, v, initial_state))
    dg = native.like(g, dtype)
    if v.numel():
        tensors = _adjacent(q, k, v, g)
        dout = native.lanes(dout)
        _backward(
            *_problem(*tensors, scale, index, starts, reverse, initial_state, dtype),
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
        if dinitial is not None:
            dinitial.zero_() if dstate is None else dinitial.copy_(dstate)  # the empty walk's final state is its initial one
    return dq, dk, dv, dg.to(g.dtype), dinitial


def _adjacent(q, k, v, g):
    """The tensors with adjacent elements, g where it has one per key. The caller holds them, copies among them, until the kernel is done."""
    return *(native.lanes(t) for t in (q, k, v)), native.lanes(g) if g.dim() == 4 else g


def _problem(q, k, v, g, scale, index, starts, reverse, initial_state, dtype):
    """The fields of Problem."""
    batch, length, heads, keys = q.shape
    return (
        *_tokens(q),
        *_tokens(k),
        *_tokens(v),
        *_tokens(g),
        *_state(initial_state),
        native.pointer(index),
        native.pointer(starts),
        0 if starts is None else starts.shape[0],
        reverse,
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
