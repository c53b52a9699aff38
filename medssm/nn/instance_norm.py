"""Instance norms that keep channels-last memory.

PyTorch's instance norm copies such a map twice, to channels-first memory and back, which takes many times as long as the norm. For a batch of one it
also gives a wrong gradient where that of its output is channels-last (seen in torch 2.13: the memory of one is read in the order of the other). The
classes here are PyTorch's own, weights and names included, without either. torch.compile, torch.export, torch.jit.trace and torch.func see
PyTorch's operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medssm.kernels.dtypes import compute_dtype
from medssm.nn.leaf import Leaf
from medssm.ops import modes


@torch.fx.wrap
def instance_norm(
    x: Tensor,  # (b, c, *spatial), 2D or 3D
    weight: Tensor | None = None,  # (c,)
    bias: Tensor | None = None,  # (c,)
    eps: float = 1e-5,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, mean and variance of each sample's channel over space; in the memory format of x.

    ValueError for a single voxel, which has no variance.
    """
    if not _eager(x) or not modes.plain((weight, bias)):
        return F.instance_norm(x, weight=weight, bias=bias, eps=eps)
    if not _is_channels_last(x):  # one sample's channels are those of a batch norm
        return F.batch_norm(x, None, None, weight, bias, True, eps=eps) if len(x) == 1 else F.instance_norm(x, weight=weight, bias=bias, eps=eps)
    y: Tensor = _ChannelsLast.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
    return y


class _ChannelsLast(torch.autograd.Function):
    """The statistics by sums in pairs: those of PyTorch's batch norm in this memory lose digits on large maps. The gradient is a batch norm's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        axes = tuple(range(2, x.dim()))
        shape = (-1, *[1] * len(axes))
        mean = x.mean(axes, keepdim=True, dtype=compute_dtype(x))
        y = x - mean
        scale = rstd = (y.square_().mean(axes, keepdim=True) + eps).rsqrt()
        if weight is not None:
            scale = rstd * weight.view(shape)
        shift = -mean * scale if bias is None else torch.addcmul(bias.view(shape), mean, scale, value=-1)
        ctx.save_for_backward(x, weight, mean.flatten(1), rstd.flatten(1))
        ctx.eps = eps
        return torch.addcmul(shift, x, scale, out=y).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        options = weight, None, None
        samples = zip(dy.split(1), x.split(1), mean, rstd, strict=True)
        wanted = ctx.needs_input_grad[:3]
        found = [torch.ops.aten.native_batch_norm_backward(d, one, *options, m, r, True, ctx.eps, wanted) for d, one, m, r in samples]
        dx, dweight, dbias = zip(*found, strict=True)
        return torch.cat(dx) if wanted[0] else None, sum(dweight) if wanted[1] else None, sum(dbias) if wanted[2] else None, None


def _eager(x: Tensor) -> bool:
    """Whether x is a tensor of PyTorch's, or of a subclass that only sees functions (MONAI's MetaTensor): values, and no part of a trace."""
    return isinstance(x, Tensor) and type(x).__torch_dispatch__ is Tensor.__torch_dispatch__


def _is_channels_last(x: Tensor) -> bool:
    """Whether x is a batch of maps on a CPU, of several voxels, whose channels lie side by side."""
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if form is None or not x.is_cpu or len(x) == 0 or x.shape[2:].numel() == 1:
        return False
    return x.stride(1) == 1 < x.shape[1] and x.is_contiguous(memory_format=form)


class _InstanceNorm(Leaf, nn.modules.instancenorm._InstanceNorm):
    spatial_dims: int

    def forward(self, x: Tensor) -> Tensor:
        """(b, num_features, *spatial) -> the same shape."""
        if self.track_running_stats or x.dim() != self.spatial_dims + 2:
            return super().forward(x)
        return instance_norm(x, self.weight, self.bias, self.eps)


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """nn.InstanceNorm2d that keeps channels-last memory."""

    spatial_dims = 2


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """nn.InstanceNorm3d that keeps channels-last memory."""

    spatial_dims = 3
