"""Transposed convolutions of channels-last maps as values between zeros and a convolution of ours.

A transposed convolution of stride s puts s - 1 zeros between voxels and convolves with the mirrored kernel. For depthwise ones PyTorch has no fast
kernel in channels-last memory on a CPU: 64 channels of 32^3 by a kernel of 3^3 take over ten times as long as this way (torch 2.13, AVX2).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from medssm import ops


def is_spaced(layer: nn.ConvTranspose2d | nn.ConvTranspose3d) -> bool:
    """Whether `spaced` computes the layer: a stride, and a depthwise kernel of odd sides with a padding of half of them, or one of a single voxel."""
    if max(layer.stride) == 1 or any(p != k // 2 or not k % 2 for k, p in zip(layer.kernel_size, layer.padding, strict=True)):
        return False
    depthwise = layer.groups == layer.in_channels == layer.out_channels > 1 and max(layer.dilation) == 1
    return depthwise or (layer.groups == 1 and max(layer.kernel_size) == 1)


def spaced(
    x: Tensor,  # (b, c, *spatial)
    weight: Tensor,  # (c, 1, *kernel) of a depthwise convolution, or (c, out, 1, ...)
    bias: Tensor | None,  # (out,)
    stride: Sequence[int],
    output_padding: Sequence[int],
) -> Tensor:  # (b, out, *((n - 1) stride + 1 + output_padding)), channels last
    """The transposed convolution of a layer that `is_spaced`."""
    t, axes = x.movedim(1, -1), range(1, weight.dim() - 1)
    shape = [(n - 1) * s + 1 + more for n, s, more in zip(x.shape[2:], stride, output_padding, strict=True)]
    every = (slice(None), *(slice(None, (n - 1) * s + 1, s) for n, s in zip(x.shape[2:], stride, strict=True)))
    if weight.shape[2:].numel() == 1 < weight.shape[1]:
        y = t.new_zeros(len(t), *shape, weight.shape[1]) if bias is None else bias.expand(len(t), *shape, -1).clone()
        y[every] = F.linear(t, weight.flatten(1).t(), bias)
    else:
        y = t.new_zeros(len(t), *shape, t.shape[-1])
        y[every] = t
        y = ops.depthwise_conv(y, weight.squeeze(1).flip(*axes), bias)
    return y.movedim(-1, 1)
