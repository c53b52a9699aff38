"""Bidirectional WKV on the CPU: allocates, packs one argument block, calls csrc/bi_wkv/cpu_forward.cpp and cpu_backward.cpp.

The caller has checked shapes, dtypes and the walk.
"""

from __future__ import annotations

import torch

from medssm.kernels import native
from medssm.kernels.bi_wkv.segments import bounds
from medssm.kernels.dtypes import compute_dtype
from medssm.kernels.native import fields

# The structs of csrc/bi_wkv: problem.h's Tokens and Problem, then the Arguments of cpu_forward.cpp and cpu_backward.cpp.
_TOKENS = fields("data type batch token")
_PROBLEM = fields(("k v", _TOKENS), "w u index bounds segments reverse", "batch length channels", "upstream wide threads")
_forward = native.Kernel("bi_wkv", "forward", fields(("problem", _PROBLEM), ("out", _TOKENS)))
_backward = native.Kernel("bi_wkv", "backward", fields(("problem", _PROBLEM), ("dout dk dv", _TOKENS), "dw du"))


def forward(w, u, k, v, mode, index, starts, reverse):
    """Arguments as in `reference.bi_wkv`. Returns out (b,l,d), contiguous."""
    out = native.like(v)
    if out.numel():
        problem, _keep = _problem(w, u, k, v, mode, index, starts, reverse)
        _forward(*problem, *_tokens(out))
    return out


def backward(dout, w, u, k, v, mode, index, starts, reverse):
    """Gradients of w, u, k and v, each in its input's dtype and contiguous."""
    dk, dv = native.like(k), native.like(v)
    if not v.numel():
        return torch.zeros_like(w), torch.zeros_like(u), dk, dv
    dtype = compute_dtype(w, u, k, v)
    dw, du = (torch.empty((v.shape[0], v.shape[2]), dtype=dtype, device=v.device) for _ in range(2))  # a row for each batch element
    dout = native.lanes(dout)
    problem, _keep = _problem(w, u, k, v, mode, index, starts, reverse)
    _backward(*problem, *_tokens(dout), *_tokens(dk), *_tokens(dv), dw.data_ptr(), du.data_ptr())
    return dw.sum(0).to(w.dtype), du.sum(0).to(u.dtype), dk, dv


def _tokens(tensor):
    """The fields of csrc/bi_wkv/problem.h's Tokens."""
    return tensor.data_ptr(), native.DTYPES[tensor.dtype], *tensor.stride()[:2]


def _problem(w, u, k, v, mode, index, starts, reverse):
    """The fields of csrc/bi_wkv/problem.h's Problem, and the tensors that they point into."""
    dtype = compute_dtype(w, u, k, v)
    w, u = (t.to(dtype).contiguous() for t in (w, u))
    k, v, ends = native.lanes(k), native.lanes(v), bounds(starts, v.shape[1], reverse)
    values = (
        *_tokens(k),
        *_tokens(v),
        w.data_ptr(),
        u.data_ptr(),
        native.pointer(index),
        native.pointer(ends),
        1 if ends is None else ends.shape[0] - 1,
        reverse,
        *v.shape,
        mode == "upstream",
        dtype is torch.float64,
        torch.get_num_threads(),
    )
    return values, (w, u, k, v, ends)
