"""Causal depthwise convolution on a GPU: allocates, packs one argument block, calls csrc/causal_conv1d/cuda.cu.

The caller has checked shapes, dtypes and the walk.
"""

from __future__ import annotations

import struct

import torch

from medssm.kernels import cuda
from medssm.kernels.causal_conv1d.walks import begins, state
from medssm.kernels.native import like, pointer, wide

_PACK = struct.Struct("41q").pack  # the fields of csrc/causal_conv1d/cuda.cu's Arguments
_STEPS = 128  # of a block: that file's kRun * kRuns


def forward(x, weight, bias, activation, index, starts, reverse, initial_state, final):
    """Arguments as in `reference.causal_conv1d`; final: whether the final state is wanted.

    Returns (out (b,l,d) contiguous, state (b,d,w-1) or None).
    """
    out, begin = like(x), begins(starts, x.shape[1], weight.shape[1], reverse)
    if out.numel():
        cuda.call("causal_conv1d_forward", _arguments(x, weight, bias, activation, index, begin, reverse, initial_state, out=out), x)
    return out, state(x, weight.shape[1], index, begin, reverse, initial_state) if final else None


def backward(dout, dstate, x, weight, bias, activation, index, starts, reverse, initial_state):
    """Gradients of x, weight, bias and initial_state (None where that input is), each in its input's dtype and contiguous."""
    batch, length, channels = x.shape
    width = weight.shape[1]
    dx, dinitial = like(x), like(initial_state)
    if not x.numel():
        if dinitial is not None:
            dinitial.zero_() if dstate is None else dinitial.copy_(dstate)  # the empty walk's final state is its initial one
        return dx, torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias), dinitial
    dtype = torch.float64 if wide(x, weight, bias, initial_state) else torch.float32
    sums = torch.empty((batch * -(-(length + width - 1) // _STEPS), width + 1, channels), dtype=dtype, device=x.device)
    begin = begins(starts, length, width, reverse)
    cuda.call(
        "causal_conv1d_backward",
        _arguments(x, weight, bias, activation, index, begin, reverse, initial_state, dout=dout, dstate=dstate, dx=dx, dinitial=dinitial, sums=sums),
        x,
    )
    total = sums.sum(0)
    dbias = None if bias is None else total[width].to(bias.dtype)
    return dx, total[:width].t().to(weight.dtype).contiguous(), dbias, dinitial


def _arguments(
    x, weight, bias, activation, index, begin, reverse, initial_state, out=None, dout=None, dstate=None, dx=None, dinitial=None, sums=None
):
    return _PACK(
        cuda.stream(x),
        *cuda.strided(x, 3),
        *cuda.strided(weight, 2),
        *cuda.strided(bias, 1),
        *cuda.strided(initial_state, 3),
        pointer(index),
        pointer(begin),
        reverse,
        *x.shape,
        weight.shape[1],
        activation == "silu",
        wide(x, weight, bias, initial_state),
        pointer(out),
        *cuda.strided(dout, 3),
        *cuda.strided(dstate, 3),
        pointer(dx),
        pointer(dinitial),
        pointer(sums),
    )
