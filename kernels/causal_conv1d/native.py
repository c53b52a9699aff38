"""Causal depthwise convolution on the CPU: allocates, packs one argument block, calls csrc/causal_conv1d/cpu.cpp.

The caller has checked shapes, dtypes and the walk.
"""

from __future__ import annotations

import struct

import torch

from medssm.kernels import native

# The fields of csrc/causal_conv1d/cpu.cpp's Forward and Backward, in order.
_FORWARD = struct.Struct("33q").pack
_BACKWARD = struct.Struct("42q").pack


def refuse(x, weight, bias, initial_state) -> str | None:
    """Why this kernel cannot serve these tensors, or None."""
    return None if x.device.type == "cpu" else f"it serves tensors on the CPU, x is on {x.device}"


def forward(x, weight, bias, activation, index, starts, reverse, initial_state, final):
    """Arguments as in `reference.causal_conv1d`; final: whether the final state is wanted.

    Returns (out (b,l,d) contiguous, state (b,d,w-1) or None).
    """
    x = native.lanes(x)
    batch, length, channels = x.shape
    out = torch.empty((batch, length, channels), dtype=x.dtype, device=x.device)
    state = torch.empty((batch, channels, weight.shape[1] - 1), dtype=x.dtype, device=x.device) if final else None
    if out.numel():
        native.function("causal_conv1d_forward")(
            _FORWARD(*_problem(x, weight, bias, activation, index, starts, reverse, initial_state), out.data_ptr(), native.pointer(state))
        )
    elif final:
        state.copy_(initial_state) if initial_state is not None else state.zero_()
    return out, state


def backward(dout, dstate, x, weight, bias, activation, index, starts, reverse, initial_state):
    """Gradients of x, weight, bias and initial_state (None where that input is), each in its input's dtype and contiguous."""
    x, dout = native.lanes(x), native.lanes(dout.to(x.dtype))
    dx, dweight, dbias, dinitial = (native.like(t) for t in (x, weight, bias, initial_state))
    if x.numel():
        state = (0, 0, 0, 0) if dstate is None else (dstate.data_ptr(), *dstate.stride())
        native.function("causal_conv1d_backward")(
            _BACKWARD(
                *_problem(x, weight, bias, activation, index, starts, reverse, initial_state),
                dout.data_ptr(),
                *dout.stride()[:2],
                *state,
                dx.data_ptr(),
                dweight.data_ptr(),
                native.pointer(dbias),
                native.pointer(dinitial),
            )
        )
    else:
        for gradient in (dweight, dbias, dinitial):
            if gradient is not None:
                gradient.zero_()
        if dinitial is not None and dstate is not None:
            dinitial.copy_(dstate)  # the empty walk's final state is its initial one
    return dx, dweight, dbias, dinitial


def _problem(x, weight, bias, activation, index, starts, reverse, initial_state):
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
        native.pointer(index),
        native.pointer(starts),
        0 if starts is None else starts.shape[0],
        reverse,
        activation == "silu",
        native.wide(x, weight, bias, initial_state),
        torch.get_num_threads(),
    )
