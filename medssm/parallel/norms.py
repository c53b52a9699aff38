"""Norms whose statistics are taken over all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medssm.parallel.group import Ranks


def normalised(
    ranks: Ranks,
    x: Tensor,  # (b, c, *)
    weight: Tensor | None,  # (c,)
    bias: Tensor | None,  # (c,)
    eps: float,
    running_mean: Tensor | None = None,  # (c,), updated
    running_var: Tensor | None = None,  # (c,), updated
    momentum: float = 0.1,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) weight + bias, mean and var of each channel over the voxels of all ranks."""
    y, mean, var, count = _Normalised.apply(ranks, x, weight, bias, eps)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    return y


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
        own = x.numel() // x.shape[1]
        if own:
            mean, var = (t.double() for t in torch.batch_norm_update_stats(x, None, None, 0.0))
        else:
            mean = var = x.new_zeros(x.shape[1], dtype=torch.float64)
        # Sums of numbers, values and squares, the squares around the mean of each rank: no digits are lost.
        all_sums = mean.new_zeros(ranks.count, 3, x.shape[1])
        all_sums[ranks.rank] = torch.stack([torch.full_like(mean, own), mean, var])
        counts, means, variances = ranks.add(all_sums).unbind(1)
        count = counts.sum(0)
        mean = (counts * means).sum(0) / count
        var = (counts * (variances + (means - mean).square())).sum(0) / count
        narrow = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        ctx.ranks, ctx.eps = ranks, eps
        ctx.save_for_backward(x, weight, mean.to(narrow), (var + eps).rsqrt().to(narrow), count)
        y = torch.batch_norm(x, weight, bias, mean.to(narrow), var.to(narrow), False, 0.0, eps, False)
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        # dx = weight scale (dy - (sum dy + x^ sum dy x^) / count), x^ = (x - mean) scale, the sums over all ranks; own sums are dbias and dweight.
        _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(dy, x, weight, None, None, mean, scale, True, ctx.eps, [False, True, True])
        sums = ctx.ranks.add(torch.stack([dweight.double(), dbias.double()])) / count
        slope = (-sums[0] * scale).to(scale.dtype)
        shift = (sums[0] * scale * mean - sums[1]).to(scale.dtype)
        factor = scale if weight is None else scale * weight.to(scale.dtype)
        shape = (1, -1, *[1] * (x.dim() - 2))
        dx = torch.addcmul(dy * factor.view(shape), x, (slope * factor).view(shape)).add_((shift * factor).view(shape))
        return None, dx.to(x.dtype), None if weight is None else dweight, dbias if ctx.needs_input_grad[3] else None, None
