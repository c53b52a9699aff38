"""The delta rule on the CPU: allocates, packs one argument block, calls csrc/delta_rule.

The caller has checked shapes, dtypes and the walk.
"""

from __future__ import annotations

import struct

import torch

from medssm.kernels import native

# The fields of csrc/delta_rule/arguments.h's Problem, then those of cpu_forward.cpp and cpu_backward.cpp.
_PROBLEM = "37qd"
_FORWARD = struct.Struct(_PROBLEM + "3q").pack
_BACKWARD = struct.Struct(_PROBLEM + "13q").pack


def refuse(q, *_rest) -> str | None:
    """Why this kernel cannot serve these tensors, or None."""
    return None if q.device.type == "cpu" else f"it serves tensors on the CPU, q is on {q.device}"


def forward(q, k, v, beta, g, scale, index, starts, reverse, initial_state, save, final):
    """Arguments as in `reference.delta_rule`; save: whether a backward will follow; final: whether the final state is wanted.

    Returns (out (b,l,h,dv) in v's dtype, state (b,h,dk,dv) or None, recalled (b,l,h,dv) or None), the last two in the compute dtype: recalled_t =
    S'_t^T k_t is what the state holds for a key before its token.
    """
    q, k, v, initial_state, dtype = _dense(q, k, v, beta, g, initial_state)
    batch, _length, heads, keys = q.shape
    out = torch.empty(v.shape, dtype=v.dtype)
    state = torch.empty((batch, heads, keys, v.shape[3]), dtype=dtype) if final else None
    recalled = torch.empty(v.shape, dtype=dtype) if save else None
    if out.numel():
        native.function("delta_rule_forward")(
            _FORWARD(
                *_problem(q, k, v, beta, g, scale, index, starts, reverse, initial_state, dtype),
                out.data_ptr(),
                native.pointer(state),
                native.pointer(recalled),
            )
        )
    elif final:
        state.copy_(initial_state) if initial_state is not None else state.zero_()
    return out, state, recalled


def backward(dout, dstate, recalled, q, k, v, beta, g, scale, index, starts, reverse, initial_state):
    """Gradients of q, k, v, beta, g and initial_state (None where that input is), each in its input's dtype and contiguous."""
    inputs = (q, k, v, beta, g, initial_state)
    q, k, v, initial_state, dtype = _dense(*inputs)
    dout = native.lanes(dout)
    dstate = None if dstate is None else dstate.to(dtype).contiguous()
    dq, dk, dv, dbeta, dg, dinitial = gradients = [native.like(t, dtype) for t in inputs]
    if q.numel() and v.numel():
        native.function("delta_rule_backward")(
            _BACKWARD(
                *_problem(q, k, v, beta, g, scale, index, starts, reverse, initial_state, dtype),
                dout.data_ptr(),
                native.DTYPES[dout.dtype],
                *dout.stride()[:3],
                native.pointer(dstate),
                recalled.data_ptr(),
                *(native.pointer(t) for t in (dq, dk, dv, dbeta, dg, dinitial)),
            )
        )
    else:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        if dinitial is not None and dstate is not None:
            dinitial.copy_(dstate)  # the empty walk's final state is its initial one
    return tuple(None if t is None else gradient.to(t.dtype) for gradient, t in zip(gradients, inputs, strict=True))


def _dense(q, k, v, beta, g, initial_state):
    """Tokens with adjacent features, the state dense in the compute dtype, and that dtype."""
    dtype = torch.float64 if native.wide(q, k, v, beta, g, initial_state) else torch.float32
    state = None if initial_state is None else initial_state.to(dtype).contiguous()
    return native.lanes(q), native.lanes(k), native.lanes(v), state, dtype


def _problem(q, k, v, beta, g, scale, index, starts, reverse, initial_state, dtype):
    """The fields of csrc/delta_rule/arguments.h's Problem."""
    batch, length, heads, keys = q.shape
    tokens = [field for t in (q, k, v) for field in (t.data_ptr(), native.DTYPES[t.dtype], *t.stride()[:3])]
    scalars = [field for t in (beta, g) for field in ((0,) * 5 if t is None else (t.data_ptr(), native.DTYPES[t.dtype], *t.stride()))]
    return (
        *tokens,
        *scalars,
        native.pointer(initial_state),
        native.pointer(index),
        native.pointer(starts),
        0 if starts is None else starts.shape[0],
        reverse,
        batch,
        length,
        heads,
        keys,
        v.shape[3],
        dtype is torch.float64,
        torch.get_num_threads(),
        scale,
    )
