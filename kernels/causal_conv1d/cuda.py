"""Causal depthwise convolution on a GPU: allocates, packs one argument block, calls csrc/causal_conv1d/cuda.cu.

The caller has checked shapes, dtypes and the walk.
"""

from __future__ import annotations

import torch

from medssm.kernels import cuda
from medssm.kernels.causal_conv1d.walks import begins, pack, packed_states, state
from medssm.kernels.cuda import STRIDED
from medssm.kernels.dtypes import compute_dtype
from medssm.kernels.native import fields, like, pointer

# The Arguments of csrc/causal_conv1d/cuda.cu.
_ARGUMENTS = fields(
    ("x", STRIDED[3]),
    ("weight", STRIDED[2]),
    ("bias", STRIDED[1]),
    ("initial", STRIDED[3]),
    "index begin",
    "segment table segments",
    "reverse batch length channels width silu wide",
    "out",
    ("dout dstate", STRIDED[3]),
    "dx dinitial sums",
)
_forward, _backward = cuda.Kernel("causal_conv1d", "forward", _ARGUMENTS), cuda.Kernel("causal_conv1d", "backward", _ARGUMENTS)
_STEPS = 128  # of a block: that file's kRun * kRuns


def forward(x, weight, bias, activation, index, starts, reverse, initial_state, final, sequences=None):
    """Arguments as in `reference.causal_conv1d`; final: whether the final state is wanted.

    Returns (out (b,l,d) contiguous, state (b,d,w-1) or None).
    """
    out, length, width = like(x), x.shape[1], weight.shape[1]
    begin, packed = _begins(starts, sequences, length, width, reverse)
    if out.numel():
        _forward(x, *_arguments(x, weight, bias, activation, index, begin, packed, reverse, initial_state, out=out))
    if not final:
        return out, None
    if packed is not None:
        return out, packed_states(x, width, index, packed, reverse, initial_state)
    return out, state(x, width, index, begin, reverse, initial_state)


def backward(dout, dstate, x, weight, bias, activation, index, starts, reverse, initial_state, sequences=None):
    """Gradients of x, weight, bias and initial_state (None where that input is), each in its input's dtype and contiguous."""
    batch, length, channels = x.shape
    width = weight.shape[1]
    dx, dinitial = like(x), like(initial_state)
    if dinitial is not None and (sequences is not None or not x.numel()):  # an empty sequence's final state is its initial one
        dinitial.zero_() if dstate is None else dinitial.copy_(dstate)
    if not x.numel():
        return dx, torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias), dinitial
    dtype = compute_dtype(x, weight, bias, initial_state)
    sums = torch.empty((batch * -(-(length + width - 1) // _STEPS), width + 1, channels), dtype=dtype, device=x.device)
    begin, packed = _begins(starts, sequences, length, width, reverse)
    outputs = {"dx": dx, "dinitial": dinitial, "sums": sums}
    _backward(x, *_arguments(x, weight, bias, activation, index, begin, packed, reverse, initial_state, dout=dout, dstate=dstate, **outputs))
    total = sums.sum(0)
    dbias = None if bias is None else total[width].to(bias.dtype)
    return dx, total[:width].t().to(weight.dtype).contiguous(), dbias, dinitial


def _begins(starts, sequences, length, width, reverse):
    """(the earliest step that each step sees, None) or (None, packed sequences)."""
    if sequences is None:
        return begins(starts, length, width, reverse), None
    return None, pack(starts, sequences, length, reverse)


def _arguments(
    x, weight, bias, activation, index, begin, packed, reverse, initial_state, out=None, dout=None, dstate=None, dx=None, dinitial=None, sums=None
):
    return (
        *cuda.strided(x, 3),
        *cuda.strided(weight, 2),
        *cuda.strided(bias, 1),
        *cuda.strided(initial_state, 3),
        pointer(index),
        pointer(begin),
        *((0, 0, 0) if packed is None else (packed.segment.data_ptr(), packed.table.data_ptr(), len(packed.table))),
        reverse,
        *x.shape,
        weight.shape[1],
        activation == "silu",
        compute_dtype(x, weight, bias, initial_state) is torch.float64,
        pointer(out),
        *cuda.strided(dout, 3),
        *cuda.strided(dstate, 3),
        pointer(dx),
        pointer(dinitial),
        pointer(sums),
    )
