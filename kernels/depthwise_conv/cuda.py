"""Depthwise convolution on a GPU: allocates, packs one argument block, calls csrc/depthwise_conv/cuda.cu.

The caller has checked shapes and dtypes. Images and sequences are volumes with leading axes of size 1.
"""

from __future__ import annotations

import math

import torch

from medssm.kernels import cuda
from medssm.kernels.cuda import STRIDED
from medssm.kernels.dtypes import compute_dtype
from medssm.kernels.native import fields, like, pointer

# The Arguments of csrc/depthwise_conv/cuda.cu.
_ARGUMENTS = fields(
    ("x", STRIDED[5]),
    ("weight", STRIDED[4]),
    ("bias", STRIDED[1]),
    ("dout", STRIDED[5]),
    "out out_type",
    "batch size_z size_y size_x channels side_z side_y side_x",
    "turned silu wide share shares",
)
_convolve, _weights = cuda.Kernel("depthwise_conv", "convolve", _ARGUMENTS), cuda.Kernel("depthwise_conv", "weights", _ARGUMENTS)
_SHARE = 16  # rows along the last axis that a block sums the gradient of the weight over


def forward(x, weight, bias, activation):
    """Arguments as in `reference.depthwise_conv`. Returns out, contiguous."""
    out = like(x)
    _call(_convolve, x, weight, bias, out, silu=activation == "silu", dtype=compute_dtype(x, weight, bias))
    return out


def backward(dout, x, weight, bias, activation):
    """Gradients of x, weight and bias (None where there is none), each in its input's dtype and contiguous."""
    dx, dtype, g = like(x), compute_dtype(x, weight, bias), dout
    if not x.numel():
        return dx, torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
    if activation == "silu":
        g = like(x, dtype)
        _call(_convolve, x, weight, bias, g, dout=dout, dtype=dtype)
    _call(_convolve, g, weight, None, dx, turned=True, dtype=dtype)
    offsets, shares = weight[0].numel(), -(-math.prod(x.shape[1:-2]) // _SHARE)
    sums = torch.empty((x.shape[0] * shares, offsets + 1, x.shape[-1]), dtype=dtype, device=x.device)
    _call(_weights, x, weight, None, sums, dout=g, shares=shares, dtype=dtype)
    total = sums.sum(0)
    dweight = total[:offsets].t().reshape(weight.shape).to(weight.dtype).contiguous()
    return dx, dweight, None if bias is None else total[offsets].to(bias.dtype)


def _call(kernel, x, weight, bias, out, *, dtype, dout=None, turned=False, silu=False, shares=0):
    if not x.numel():
        return
    batch, *size, channels = x.shape
    kernel(
        x,
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
    )


def _strided(tensor):
    """A (b, *spatial, d) tensor as Strided<5>."""
    first, *axes, last = tensor.stride()
    return tensor.data_ptr(), cuda.DTYPES[tensor.dtype], first, *_axes(axes, 0), last


def _axes(values, absent: int) -> tuple[int, ...]:
    """(z, y, x); leading axes that an image or a sequence lacks get `absent`."""
    return (*(absent,) * (3 - len(values)), *values)
