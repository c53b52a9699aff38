"""Bidirectional WKV on the CPU: allocates, packs one argument block, calls csrc/bi_wkv/cpu_forward.cpp and cpu_backward.cpp.

The caller has checked shapes, dtypes and the walk.
"""

from __future__ import annotations

import struct

import torch

from medssm.kernels import native
from medssm.kernels.bi_wkv.segments import bounds

_FORWARD = struct.Struct("24q").pack  # the fields of csrc/bi_wkv/cpu_forward.cpp's Arguments, in order
_BACKWARD = struct.Struct("34q").pack  # and of cpu_backward.cpp's


def refuse(v, k, w, u) -> str | None:
    """Why this kernel cannot serve these tensors, or None."""
    return None if v.device.type == "cpu" else f"it serves tensors on the CPU, v is on {v.device}"


def forward(w, u, k, v, mode, index, starts, reverse):
    """Arguments as in `reference.bi_wkv`. Returns out (b,l,d), contiguous."""
    out = native.like(v)
    if out.numel():
        problem, _keep = _problem(w, u, k, v, mode, index, starts, reverse)
        native.function("bi_wkv_forward")(_FORWARD(*problem, *_tokens(out)))
    return out


def backward(dout, w, u, k, v, mode, index, starts, reverse):
    """Gradients of w, u, k and v, each in its input's dtype and contiguous."""
    dk, dv = native.like(k), native.like(v)
    if not v.numel():
        return torch.zeros_like(w), torch.zeros_like(u), dk, dv
    dtype = torch.float64 if native.wide(w, u, k, v) else torch.float32
    dw, du = (torch.empty((v.shape[0], v.shape[2]), dtype=dtype, device=v.device) for _ in range(2))  # a row for each batch element
    dout = native.lanes(dout)
    problem, _keep = _problem(w, u, k, v, mode, index, starts, reverse)
    native.function("bi_wkv_backward")(_BACKWARD(*problem, *_tokens(dout), *_tokens(dk), *_tokens(dv), dw.data_ptr(), du.data_ptr()))
    return dw.sum(0).to(w.dtype), du.sum(0).to(u.dtype), dk, dv


def _tokens(tensor):
    """The fields of csrc/bi_wkv/problem.h's Tokens."""
    return tensor.data_ptr(), native.DTYPES[tensor.dtype], *tensor.stride()[:2]


def _problem(w, u, k, v, mode, index, starts, reverse):
    """The fields of csrc/bi_wkv/problem.h's Problem, and the tensors that they point into."""
    wide = native.wide(w, u, k, v)
    w, u = (t.to(torch.float64 if wide else torch.float32).contiguous() for t in (w, u))
    k, v, ends = native.lanes(k), native.lanes(v), bounds(starts, v.shape[1], reverse)
    fields = (
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
        wide,
        torch.get_num_threads(),
    )
    return fields, (w, u, k, v, ends)
