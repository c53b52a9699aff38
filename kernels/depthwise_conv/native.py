"""Depthwise convolution on the CPU: allocates, packs one argument block, calls csrc/depthwise_conv/cpu.cpp.

The caller has checked shapes and dtypes. Images and sequences are volumes with leading axes of size 1.
"""

from __future__ import annotations

import struct

import torch

from medssm.kernels import native

# The fields of csrc/depthwise_conv/cpu.cpp's Forward and Backward, in order.
_FORWARD = struct.Struct("27q").pack
_BACKWARD = struct.Struct("35q").pack


def refuse(x, weight, bias) -> str | None:
    """Why this kernel cannot serve these tensors, or None."""
    if x.device.type != "cpu":
        return f"it serves tensors on the CPU, x is on {x.device}"
    if x.dim() > 5:
        return f"it serves up to three spatial axes, x has {x.dim() - 2}"
    return None


def forward(x, weight, bias, activation):
    """Arguments as in `reference.depthwise_conv`. Returns out, contiguous."""
    x = native.lanes(x)
    out = native.like(x)
    if out.numel():
        native.function("depthwise_conv_forward")(_FORWARD(*_problem(x, weight, bias, activation), out.data_ptr()))
    return out


def backward(dout, x, weight, bias, activation):
    """Gradients of x, weight and bias (None where there is none), each in its input's dtype and contiguous."""
    x, dout = native.lanes(x), native.lanes(dout.to(x.dtype))
    dx, dweight, dbias = (native.like(t) for t in (x, weight, bias))
    if not x.numel():
        return dx, dweight.zero_(), None if bias is None else dbias.zero_()
    # The gradient before the activation; without one it is dout itself.
    inner = native.like(x, torch.float64 if native.wide(x, weight, bias) else torch.float32) if activation else None
    native.function("depthwise_conv_backward")(
        _BACKWARD(
            *_problem(x, weight, bias, activation),
            dout.data_ptr(),
            *_axes(dout.stride()[:-1], 0),
            dx.data_ptr(),
            dweight.data_ptr(),
            native.pointer(dbias),
            native.pointer(inner),
        )
    )
    return dx, dweight, dbias


def _problem(x, weight, bias, activation):
    """The fields of csrc/depthwise_conv/cpu.cpp's Problem."""
    batch, *size, _ = x.shape
    return (
        x.data_ptr(),
        native.DTYPES[x.dtype],
        *_axes(x.stride()[:-1], 0),
        *_axes((batch, *size), 1),
        weight.data_ptr(),
        native.pointer(bias),
        native.DTYPES[weight.dtype],
        0 if bias is None else native.DTYPES[bias.dtype],
        *_axes(weight.shape, 1),
        *_axes(weight.stride(), 0),
        0 if bias is None else bias.stride(0),
        activation == "silu",
        native.wide(x, weight, bias),
        torch.get_num_threads(),
    )


def _axes(values, absent):
    """(first, z, y, x) of a shape or of strides; leading axes that an image or a sequence lacks get `absent`."""
    first, *axes = values
    return (first, *[absent] * (3 - len(axes)), *axes)
