"""The structs of csrc/selective_scan/arguments.h, field by field."""

from __future__ import annotations

import torch

from medssm.kernels.native import DTYPES as _DTYPES
from medssm.kernels.native import WALK, fields, walk

TOKENS, OUTPUT = fields("data type batch token channel"), fields("data type batch token earlier")
PROBLEM = fields(
    ("u delta z", TOKENS),
    ("B C", fields("data type batch token group state")),
    "A D bias proj initial",
    ("walk", WALK),
    "batch length channels groups state rank",
    "softplus wide threads",
    ("scale", "d"),
)
_ABSENT = (0, 0, 0, 0, 0)


def problem(dtype, u, delta, z, B, C, weights, softplus, index, starts, sequences, reverse, scale, threads):
    """The fields of Problem. weights: A, D, delta_bias, delta_proj and initial_state, `dense`; the caller keeps them alive."""
    A, D, delta_bias, delta_proj, initial_state = weights
    batch, length, channels = u.shape
    return (
        u.data_ptr(),
        _DTYPES[u.dtype],
        *u.stride(),
        delta.data_ptr(),
        _DTYPES[delta.dtype],
        *delta.stride(),
        *(_ABSENT if z is None else (z.data_ptr(), _DTYPES[z.dtype], *z.stride())),
        B.data_ptr(),
        _DTYPES[B.dtype],
        *B.stride(),
        C.data_ptr(),
        _DTYPES[C.dtype],
        *C.stride(),
        A.data_ptr(),
        0 if D is None else D.data_ptr(),
        0 if delta_bias is None else delta_bias.data_ptr(),
        0 if delta_proj is None else delta_proj.data_ptr(),
        0 if initial_state is None else initial_state.data_ptr(),
        *walk(index, starts, sequences, reverse),
        batch,
        length,
        channels,
        B.shape[2],
        A.shape[1],
        0 if delta_proj is None else delta.shape[2],
        softplus,
        dtype is torch.float64,
        threads,
        scale,
    )


def output(out, earlier=None):
    """The fields of Output: a tensor (b,l,d) with adjacent channels, and what it is to be added to."""
    if out is None:
        return _ABSENT
    batch, token, _ = out.stride()
    return out.data_ptr(), _DTYPES[out.dtype], batch, token, 0 if earlier is None else earlier.data_ptr()


def dense(t, dtype):
    """A weight as the kernel reads it: contiguous, the compute dtype."""
    return t if t is None or (t.dtype is dtype and t.is_contiguous()) else t.to(dtype).contiguous()
