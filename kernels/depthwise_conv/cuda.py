"""Depthwise convolution on a GPU: allocates, packs one argument block, calls csrc/depthwise_conv/cuda.cu.

The caller has checked shapes and dtypes. Images and sequences are volumes with leading axes of size 1.
"""

from __future__ import annotations

import math
import struct

import torch

from medssm.kernels import cuda
from medssm.kernels.native import like, pointer, wide

_PACK = struct.Struct("39q").pack  # the fields of csrc/depthwise_conv/cuda.cu's Arguments
_SHARE = 16  # rows along the last axis that a block sums the gradient of the weight over


def forward(x, weight, bias, activation):
    """Arguments as in `reference.depthwise_conv`. Returns out, contiguous."""
    out = like(x)
    _call("depthwise_conv_convolve", x, weight, bias, out, silu=activation == "silu", dtype=_compute(x, weight, bias))
    return out


def backward(dout, x, weight, bias, activation):
    """Gradients of x, weight and bias (None where there is none), each in its input's dtype and contiguous."""
    dx, dtype, g = like(x), _compute(x, weight, bias), dout
    if not x.numel():
        return dx, torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
    if activation == "silu":
        g = like(x, dtype)
        _call("depthwise_conv_convolve", x, weight, bias, g, dout=dout, dtype=dtype)
    _call("depthwise_conv_convolve", g, weight, None, dx, turned=True, dtype=dtype)
    offsets, shares = weight[0].numel(), -(-math.prod(x.shape[1:-2]) // _SHARE)
    sums = torch.empty((x.shape[0] * shares, offsets + 1, x.shape[-1]), dtype=dtype, device=x.device)
    _call("depthwise_conv_weights", x, weight, None, sums, dout=g, shares=shares, dtype=dtype)
    total = sums.sum(0)
    dweight = total[:offsets].t().reshape(weight.shape).to(weight.dtype).contiguous()
    return dx, dweight, None if bias is None else total[offsets].to(bias.dtype)


def _compute(*tensors) -> torch.dtype:
    return torch.float64 if wide(*tensors) else torch.float32


def _call(name, x, weight, bias, out, *, dtype, dout=None, turned=False, silu=False, shares=0):
    if not x.numel():
        return
    batch, *size, channels = x.shape
    cuda.call(
        name,
        _PACK(
            cuda.stream(x),
            *_strided(x),
            weight.data_ptr(),
            cuda.DTYPES[weight.dtype],
            weight.stride(0),
            *_axes(weight.stride()[1:], 0),
            *cuda.strided(bias, 1),
            *((0,) * 7 if dout is None else _strided(dout)),
            pointer(out),
            cuda.DTYPES[out.dtype],
            batch,
            *_axes(size, 1),
            channels,
            *_axes(weight.shape[1:], 1),
            turned,
            silu,
            dtype is torch.float64,
            _SHARE,
            shares,
        ),
        x,
    )


def _strided(tensor):
    """A (b, *spatial, d) tensor as Strided<5>."""
    first, *axes, last = tensor.stride()
    return tensor.data_ptr(), cuda.DTYPES[tensor.dtype], first, *_axes(axes, 0), last


def _axes(values, absent: int) -> tuple[int, ...]:
    """(z, y, x); leading axes that an image or a sequence lacks get `absent`."""
    return (*(absent,) * (3 - len(values)), *values)
