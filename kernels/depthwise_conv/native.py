"""Depthwise convolution on the CPU: allocates, packs one argument block, calls csrc/depthwise_conv/cpu.cpp.

The caller has checked shapes and dtypes. Images and sequences are volumes with leading axes of size 1.
"""

from __future__ import annotations

import torch

from medssm.kernels import native
from medssm.kernels.dtypes import compute_dtype
from medssm.kernels.native import fields

# The structs of csrc: medssm/taps.h's Taps, then depthwise_conv/cpu.cpp's Problem, Forward and Backward.
_TAPS = fields("weight bias", "weight_type bias_type channels side_z side_y side_x", "stride_d stride_z stride_y stride_x bias_stride")
_PROBLEM = fields("x x_type x_batch x_z x_y x_x", "batch size_z size_y size_x", ("taps", _TAPS), "silu wide threads")
_forward = native.Kernel("depthwise_conv", "forward", fields(("problem", _PROBLEM), "out"))
_backward = native.Kernel(
    "depthwise_conv", "backward", fields(("problem", _PROBLEM), "dout dout_batch dout_z dout_y dout_x", "dx dweight dbias inner")
)


def forward(x, weight, bias, activation):
    """Arguments as in `reference.depthwise_conv`. Returns out, contiguous."""
    x = native.lanes(x)
    out = native.like(x)
    if out.numel():
        _forward(*_problem(x, weight, bias, activation), out.data_ptr())
    return out


def backward(dout, x, weight, bias, activation):
    """Gradients of x, weight and bias (None where there is none), each in its input's dtype and contiguous."""
    x, dout = native.lanes(x), native.lanes(dout.to(x.dtype))
    dx, dweight, dbias = (native.like(t) for t in (x, weight, bias))
    if not x.numel():
        return dx, dweight.zero_(), None if bias is None else dbias.zero_()
    # The gradient before the activation; without one it is dout itself.
    inner = native.like(x, compute_dtype(x, weight, bias)) if activation else None
    _backward(
        *_problem(x, weight, bias, activation),
        dout.data_ptr(),
        *_axes(dout.stride()[:-1], 0),
        dx.data_ptr(),
        dweight.data_ptr(),
        native.pointer(dbias),
        native.pointer(inner),
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
        compute_dtype(x, weight, bias) is torch.float64,
        torch.get_num_threads(),
    )


def _axes(values, absent):
    """(first, z, y, x) of a shape or of strides; leading axes that an image or a sequence lacks get `absent`."""
    first, *axes = values
    return (first, *[absent] * (3 - len(axes)), *axes)
