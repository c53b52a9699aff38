"""Causal depthwise convolution on the CPU: allocates, packs one argument block, calls csrc/causal_conv1d/cpu.cpp.

The caller has checked shapes, dtypes and the walk.
"""

from __future__ import annotations

import torch

from medssm.kernels import native
from medssm.kernels.dtypes import compute_dtype
from medssm.kernels.native import fields

# The structs of csrc: medssm/taps.h's Taps, then causal_conv1d/problem.h's Problem, Forward and Backward.
_TAPS = fields("weight bias", "weight_type bias_type channels side_z side_y side_x", "stride_d stride_z stride_y stride_x bias_stride")
_PROBLEM = fields(
    "x x_type x_batch x_token batch length",
    ("taps", _TAPS),
    "initial initial_type initial_batch initial_channel initial_slot",
    ("walk", native.WALK),
    "silu wide threads",
)
_forward = native.Kernel("causal_conv1d", "forward", fields(("problem", _PROBLEM), "out state"))
_backward = native.Kernel(
    "causal_conv1d",
    "backward",
    fields(("problem", _PROBLEM), "dout dout_batch dout_token", "dstate dstate_batch dstate_channel dstate_slot", "dx dweight dbias dinitial"),
)


def forward(x, weight, bias, activation, index, starts, reverse, initial_state, final, sequences=None):
    """Arguments as in `reference.causal_conv1d`; final: whether the final state is wanted.

    Returns (out (b,l,d) contiguous, state (b,d,w-1) or None).
    """
    x = native.lanes(x)
    batch, length, channels = x.shape
    out = torch.empty((batch, length, channels), dtype=x.dtype, device=x.device)
    state = native.new_state(x, (channels, weight.shape[1] - 1), x.dtype, initial_state, sequences) if final else None
    if out.numel():
        _forward(*_problem(x, weight, bias, activation, index, starts, sequences, reverse, initial_state), out.data_ptr(), native.pointer(state))
    return out, state


def backward(dout, dstate, x, weight, bias, activation, index, starts, reverse, initial_state, sequences=None):
    """Gradients of x, weight, bias and initial_state (None where that input is), each in its input's dtype and contiguous."""
    x, dout = native.lanes(x), native.lanes(dout.to(x.dtype))
    dx, dweight, dbias = native.like(x), native.like(weight), native.like(bias)
    dinitial = None if initial_state is None else native.new_state(x, initial_state.shape[1:], initial_state.dtype, dstate, sequences)
    if x.numel():
        state = (0, 0, 0, 0) if dstate is None else (dstate.data_ptr(), *dstate.stride())
        _backward(
            *_problem(x, weight, bias, activation, index, starts, sequences, reverse, initial_state),
            dout.data_ptr(),
            *dout.stride()[:2],
            *state,
            dx.data_ptr(),
            dweight.data_ptr(),
            native.pointer(dbias),
            native.pointer(dinitial),
        )
    else:
        for gradient in (dweight, dbias):
            if gradient is not None:
                gradient.zero_()
    return dx, dweight, dbias, dinitial


def _problem(x, weight, bias, activation, index, starts, sequences, reverse, initial_state):
    """The fields of csrc/causal_conv1d/cpu.cpp's Problem."""
    batch, length, channels = x.shape
    initial = (0, 0, 0, 0, 0)
    if initial_state is not None:
        initial = (initial_state.data_ptr(), native.DTYPES[initial_state.dtype], *initial_state.stride())
    return (
        x.data_ptr(),
        native.DTYPES[x.dtype],
        *x.stride()[:2],
        batch,
        length,
        weight.data_ptr(),
        native.pointer(bias),
        native.DTYPES[weight.dtype],
        0 if bias is None else native.DTYPES[bias.dtype],
        channels,
        1,
        1,
        weight.shape[1],
        weight.stride(0),
        0,
        0,
        weight.stride(1),
        0 if bias is None else bias.stride(0),
        *initial,
        *native.walk(index, starts, sequences, reverse),
        activation == "silu",
        compute_dtype(x, weight, bias, initial_state) is torch.float64,
        torch.get_num_threads(),
    )
