"""Linear attention on the CPU: allocates, packs one argument block, calls csrc/linear_attention.

The caller has checked shapes, dtypes and the walk.
"""

from __future__ import annotations

import torch

from medssm.kernels import native
from medssm.kernels.dtypes import compute_dtype
from medssm.kernels.native import fields

_MAPS = {None: 0, "relu": 1, "elu": 2}  # csrc/linear_attention/problem.h
# The structs there: Tokens, Angles, Problem, Forward and Backward.
_TOKENS, _ANGLES = fields("data type batch token head"), fields("data token head")
_PROBLEM = fields(
    ("q k v", _TOKENS),
    ("cos sin", _ANGLES),
    "batch q_length length heads groups dk dv",
    ("walk", native.WALK),
    "causal feature_map normalize wide threads",
    ("scale eps", "d"),
)
_FORWARD = fields(("problem", _PROBLEM), ("out", _TOKENS), "initial_kv initial_z kv z")
_BACKWARD = fields(("problem", _PROBLEM), ("dout dq dk dv", _TOKENS), "initial_kv initial_z kv z later_kv later_z dkv dz")
# By whether it is causal.
_forward = {False: native.Kernel("linear_attention", "forward", _FORWARD), True: native.Kernel("linear_attention", "causal_forward", _FORWARD)}
_backward = {False: native.Kernel("linear_attention", "backward", _BACKWARD), True: native.Kernel("linear_attention", "causal_backward", _BACKWARD)}


def forward(q, k, v, cos, sin, initial_kv, initial_k, feature_map, causal, normalize, scale, eps, index, starts, reverse, sequences=None):
    """Arguments as in `reference.linear_attention`. Returns out (b,l,h,dv) contiguous and the sums, kv and z."""
    dtype = compute_dtype(q, k, v, cos, sin, initial_kv, initial_k)
    q, k, v = native.lanes(q), native.lanes(k), native.lanes(v)
    batch, length, heads, dk = q.shape
    groups, dv = v.shape[2:]
    out = torch.empty((batch, length, heads, dv), dtype=v.dtype, device=v.device)
    kv, z = (native.new_state(k, shape, dtype, t, sequences) for shape, t in (((groups, dk, dv), initial_kv), ((groups, dk), initial_k)))
    cos, sin, initial_kv, initial_k = _rows(cos, dtype), _rows(sin, dtype), native.contiguous(initial_kv, dtype), native.contiguous(initial_k, dtype)
    problem = _problem(dtype, q, k, v, cos, sin, feature_map, causal, normalize, scale, eps, index, starts, sequences, reverse)
    _forward[bool(causal)](*problem, *_tokens(out), *(native.pointer(t) for t in (initial_kv, initial_k, kv, z)))
    return out, kv, z


def backward(
    dout, dkv, dz, kv, z, q, k, v, cos, sin, initial_kv, initial_k, feature_map, causal, normalize, scale, eps, index, starts, reverse, sequences=None
):
    """Gradients of q, k, v, initial_kv and initial_k (None where that input is), each in its input's dtype and contiguous.

    kv and z are forward's.
    """
    dtype = kv.dtype
    q, k, v, dout = native.lanes(q), native.lanes(k), native.lanes(v), native.lanes(dout)
    gradients = [native.like(t) for t in (q, k, v)]
    totals = [None if causal and initial_kv is None else native.new_state(k, t.shape[1:], dtype, d, sequences) for t, d in ((kv, dkv), (z, dz))]
    cos, sin = _rows(cos, dtype), _rows(sin, dtype)
    sums = [native.contiguous(t, dtype) for t in (initial_kv, initial_k, kv, z, dkv, dz)]
    problem = _problem(dtype, q, k, v, cos, sin, feature_map, causal, normalize, scale, eps, index, starts, sequences, reverse)
    _backward[bool(causal)](*problem, *_tokens(dout), *(n for t in gradients for n in _tokens(t)), *(native.pointer(t) for t in (*sums, *totals)))
    initial = (None if t is None else total.to(t.dtype) for t, total in zip((initial_kv, initial_k), totals, strict=True))
    return *gradients, *initial


def _problem(dtype, q, k, v, cos, sin, feature_map, causal, normalize, scale, eps, index, starts, sequences, reverse):
    """The fields of Problem."""
    batch, length, heads, dk = q.shape
    angles = (0, 0, 0) * 2 if cos is None else (cos.data_ptr(), *cos.stride()[:2], sin.data_ptr(), *sin.stride()[:2])
    return (
        *_tokens(q),
        *_tokens(k),
        *_tokens(v),
        *angles,
        batch,
        length,
        k.shape[1],
        heads,
        k.shape[2],
        dk,
        v.shape[3],
        *native.walk(index, starts, sequences, reverse),
        causal,
        _MAPS[feature_map],
        normalize,
        dtype is torch.float64,
        torch.get_num_threads(),
        scale,
        eps,
    )


def _tokens(t):
    return t.data_ptr(), native.DTYPES[t.dtype], *t.stride()[:3]


def _rows(t, dtype):
    """In the compute type with adjacent channels; groups that share a row go on sharing it."""
    return None if t is None else native.lanes(t.to(dtype))
