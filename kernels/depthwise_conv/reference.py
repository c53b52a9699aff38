"""Depthwise convolution in plain PyTorch: the specification of every other backend.

For each batch, channel and position, over the offsets o of a kernel with odd sides (cross-correlation, stride 1):

    y_p = act(bias + sum_o weight_o x_{p+o}),    x is zero outside
"""

from __future__ import annotations

import itertools

import torch
from torch.nn import functional

from medssm.kernels.autocast import without_autocast
from medssm.kernels.dtypes import compute_dtype


def depthwise_conv(x, weight, bias=None, activation=None):
    """x (b,*spatial,d); weight (d,*kernel), odd sides; bias (d,). Returns x's shape and dtype.

    The arithmetic is in float64 if any input is, else in float32.
    """
    inputs = (x, weight, bias)
    dtype = compute_dtype(*inputs)
    with without_autocast(x.device):
        out_dtype = x.dtype
        x, weight, bias = (None if t is None else t.to(dtype) for t in inputs)
        spatial, kernel = x.shape[1:-1], weight.shape[1:]
        padding = [side // 2 for side in reversed(kernel) for _ in range(2)]
        padded = functional.pad(x, [0, 0, *padding])

        y = torch.zeros_like(x)
        for offset in itertools.product(*map(range, kernel)):
            window = [slice(None), *(slice(o, o + n) for o, n in zip(offset, spatial, strict=True))]
            y = y + weight[(slice(None), *offset)] * padded[tuple(window)]
        if bias is not None:
            y = y + bias
        if activation == "silu":
            y = functional.silu(y)
        return y.to(out_dtype)
