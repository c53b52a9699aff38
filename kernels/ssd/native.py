"""SSD on the CPU: allocates, packs one argument block, calls csrc/ssd.

The caller has checked shapes, dtypes and the walk.
"""

from __future__ import annotations

import torch

from medssm.kernels import native
from medssm.kernels.dtypes import compute_dtype
from medssm.kernels.native import fields

# The structs of csrc: medssm/token_rows.h's HeadTokens and HeadOutput, medssm/matrix_scan.h's StateTensor, ssd/problem.h's Problem, then the
# Arguments of its cpu_forward.cpp and cpu_backward.cpp.
_TOKENS, _STATE = fields("data type batch token head"), fields("data type batch head row lane")
_PROBLEM = fields(
    ("x z B C dt", _TOKENS),
    ("initial", _STATE),
    "A D bias",
    ("walk", native.WALK),
    "batch length heads size groups states",
    "softplus wide threads",
    ("low high", "d"),
)
_forward = native.Kernel("ssd", "forward", fields(("problem", _PROBLEM), ("out y", _TOKENS), ("final", _STATE)))
_backward = native.Kernel(
    "ssd",
    "backward",
    fields(("problem", _PROBLEM), ("dout y", _TOKENS), ("dstate", _STATE), "dA dbias dD", ("dx ddt dB dC dz", _TOKENS), ("dinitial", _STATE)),
)


def forward(x, dt, A, B, C, D, z, dt_bias, dt_softplus, low, high, index, starts, reverse, initial_state, save, final, sequences=None):
    """Arguments as in `reference.ssd`; save: whether y is wanted; final: whether the final state is.

    Returns (out (b,l,h,p) contiguous, state (b,h,p,n) or None, y or None): y (b,l,h,p), the compute type, is out before the gate.
    """
    dtype = compute_dtype(x, dt, A, B, C, D, z, dt_bias, initial_state)
    out, y = native.like(x), native.like(x, dtype) if save else None
    state = native.new_state(x, (*x.shape[2:], B.shape[3]), dtype, initial_state, sequences) if final else None
    if out.numel():
        tokens, weights, initial = _dense(x, z, B, C), _weights(A, D, dt_bias, x.shape[3], dtype), native.contiguous(initial_state)
        _forward(
            *_problem(*tokens, dt, initial, *weights, dt_softplus, low, high, index, starts, sequences, reverse, dtype),
            *_tokens(out),
            *_tokens(y),
            *_state(state),
        )
    return out, state, y


def backward(dout, dstate, y, x, dt, A, B, C, D, z, dt_bias, dt_softplus, low, high, index, starts, reverse, initial_state, sequences=None):
    """Gradients of x, dt, A, B, C, D, z, dt_bias and initial_state (None where that input is), each in its input's dtype and contiguous.

    y: as `forward` kept it, None without z.
    """
    dtype = compute_dtype(x, dt, A, B, C, D, z, dt_bias, initial_state)
    batch, _, heads, size = x.shape
    dx, ddt, dB, dC, dz = (native.like(t) for t in (x, dt, B, C, z))
    dinitial = None if initial_state is None else native.new_state(x, initial_state.shape[1:], dtype, dstate, sequences)
    # Per batch element, to be summed: of A, of dt_bias, of D.
    dA, dbias = (torch.empty((batch, heads), dtype=torch.float64, device=x.device) for _ in range(2))
    dD = None if D is None else torch.empty((batch, heads, size), dtype=torch.float64, device=x.device)
    if x.numel():
        tokens, weights, dout = _dense(x, z, B, C), _weights(A, D, dt_bias, size, dtype), native.lanes(dout)
        initial, dstate = native.contiguous(initial_state), native.contiguous(dstate)
        _backward(
            *_problem(*tokens, dt, initial, *weights, dt_softplus, low, high, index, starts, sequences, reverse, dtype),
            *_tokens(dout),
            *_tokens(y),
            *_state(dstate),
            *map(native.pointer, (dA, dbias, dD)),
            *(field for t in (dx, ddt, dB, dC, dz) for field in _tokens(t)),
            *_state(dinitial),
        )
    else:
        for gradient in (dx, ddt, dB, dC, dz, dA, dbias, dD):
            if gradient is not None:
                gradient.zero_()
    dA, dbias = dA.sum(0).to(A.dtype), None if dt_bias is None else dbias.sum(0).to(dt_bias.dtype)
    if D is not None:
        dD = dD.sum(0 if D.dim() == 2 else (0, 2)).to(D.dtype)
    return dx, ddt, dA, dB, dC, dD, dz, dbias, None if dinitial is None else dinitial.to(initial_state.dtype)


def _dense(*tensors):
    """With adjacent elements in the last dimension."""
    return [None if t is None else native.lanes(t) for t in tensors]


def _weights(A, D, dt_bias, size, dtype):
    """A (h,), D (h,p) and dt_bias (h,), dense and of the compute type."""
    if D is not None and D.dim() == 1:
        D = D.unsqueeze(1).expand(-1, size)
    return [None if t is None else t.to(dtype).contiguous() for t in (A, D, dt_bias)]


def _problem(x, z, B, C, dt, initial_state, A, D, dt_bias, dt_softplus, low, high, index, starts, sequences, reverse, dtype):
    """The fields of Problem."""
    batch, length, heads, size = x.shape
    return (
        *_tokens(x),
        *_tokens(z),
        *_tokens(B),
        *_tokens(C),
        *_tokens(dt),
        *_state(initial_state),
        *map(native.pointer, (A, D, dt_bias)),
        *native.walk(index, starts, sequences, reverse),
        batch,
        length,
        heads,
        size,
        *B.shape[2:],
        dt_softplus,
        dtype is torch.float64,
        torch.get_num_threads(),
        low,
        high,
    )


def _tokens(t):
    """The fields of HeadTokens and HeadOutput: (b,l,h,d) with adjacent elements, or (b,l,h)."""
    return (0, 0, 0, 0, 0) if t is None else (t.data_ptr(), native.DTYPES[t.dtype], *t.stride()[:3])


def _state(t):
    """The fields of StateTensor of a state (b,h,p,n), whose rows are n."""
    if t is None:
        return (0, 0, 0, 0, 0, 0)
    batch, head, channel, state = t.stride()
    return t.data_ptr(), native.DTYPES[t.dtype], batch, head, state, channel
