"""mamba_ssm.ops.triton.layer_norm on PyTorch: layer and RMS norm with the addition of the residual before it, in float32 inside.

r = residual + dropout(rowscale x) + dropout(x1);   out = norm(r) weight + bias
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medssm.kernels.dtypes import compute_dtype


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Norm of x + residual over the last dimension.

    Args:
        x, residual, x1: (*, d). weight, bias, weight1, bias1: (d,); with weight1 a second norm of the same sum is returned too. rowscale: (*,).
        prenorm: return the sum as well, in residual's dtype (without one in float32 at least if residual_in_fp32, else in x's).
        return_dropout_mask: return two masks as well, of the entries of x and x1 that dropout left, None for what was not dropped from.

    Returns out, out1, the sum and the masks, those that are asked for; out and out1 in x's dtype.
    """
    compute = compute_dtype(x, residual, weight)
    dropped, mask = _dropout(x if rowscale is None else x * rowscale[..., None], dropout_p)
    total, mask1 = dropped.to(compute), None
    if x1 is not None:
        dropped, mask1 = _dropout(x1, dropout_p)
        total = total + dropped
    if residual is not None:
        total = total + residual
    outs: list[Any] = [_norm(total, weight, bias, eps, is_rms_norm).to(x.dtype)]
    if weight1 is not None:
        outs.append(_norm(total, weight1, bias1, eps, is_rms_norm).to(x.dtype))
    if prenorm:
        outs.append(total.to(residual.dtype if residual is not None else compute if residual_in_fp32 else x.dtype))
    if return_dropout_mask:
        outs += [mask, mask1]
    return outs[0] if len(outs) == 1 else tuple(outs)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """layer_norm_fn with the RMS norm."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32, True, return_dropout_mask
    )


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A linear layer behind layer_norm_fn; with prenorm (out, sum)."""
    y, total = layer_norm_fn(x, norm_weight, norm_bias, residual, eps=eps, prenorm=True, residual_in_fp32=residual_in_fp32, is_rms_norm=is_rms_norm)
    out = F.linear(y.to(linear_weight.dtype), linear_weight, linear_bias)
    return (out, total) if prenorm else out


def rms_norm_forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-6, is_rms_norm: bool = True) -> Tensor:
    """The RMS norm (else the layer norm) of x (*, d), in x's dtype."""
    return _norm(x.to(compute_dtype(x, weight)), weight, bias, eps, is_rms_norm).to(x.dtype)


class RMSNorm(nn.Module):
    """RMS norm over the last dimension, with rms_norm_fn's residual. Weight: weight (d,)."""

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, dropout_p: float = 0.0, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.eps, self.drop = eps, nn.Dropout(dropout_p) if dropout_p else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Tensor | tuple[Tensor, ...]:
        return rms_norm_fn(
            x,
            self.weight,
            self.bias,
            residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


# mamba_ssm.ops.triton.layernorm, the module of mamba_ssm 1: the same functions with fewer arguments in another order.


def layer_norm_fn_v1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """layer_norm_fn in mamba_ssm 1's order of arguments."""
    return layer_norm_fn(x, weight, bias, residual, eps=eps, prenorm=prenorm, residual_in_fp32=residual_in_fp32, is_rms_norm=is_rms_norm)


def rms_norm_fn_v1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, ...]:
    """rms_norm_fn in mamba_ssm 1's order of arguments."""
    return rms_norm_fn(x, weight, bias, residual, eps=eps, prenorm=prenorm, residual_in_fp32=residual_in_fp32)


# Upstream's plain PyTorch, in the inputs' own types; with upcast in float32 at least, as the functions above.


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
    *,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """layer_norm_fn with the given dropout masks; the sum is computed and returned in x's dtype, the layer norm in weight's."""
    dtype = x.dtype
    if upcast:
        wide = compute_dtype(x, weight)
        x, weight = x.to(wide), weight.to(wide)
        bias, residual, x1, weight1, bias1 = (None if t is None else t.to(wide) for t in (bias, residual, x1, weight1, bias1))
    total = _dropout(x if rowscale is None else x * rowscale[..., None], dropout_p, dropout_mask)[0]
    for other in (None if x1 is None else _dropout(x1, dropout_p, dropout_mask1)[0], residual):
        total = total if other is None else (total + other).to(x.dtype)
    pairs = [(w, b) for w, b in ((weight, bias), (weight1, bias1)) if w is not None]
    outs = [_norm(total if is_rms_norm else total.to(w.dtype), w, b, eps, is_rms_norm).to(dtype) for w, b in pairs] + [total] * prenorm
    return outs[0] if len(outs) == 1 else tuple(outs)


def rms_norm_ref(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
    """layer_norm_ref with the RMS norm."""
    return layer_norm_ref(*args, **kwargs, is_rms_norm=True)


def layer_norm_ref_v1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    upcast: bool = False,
    *,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """layer_norm_ref in mamba_ssm 1's order of arguments."""
    return layer_norm_ref(x, weight, bias, residual, eps=eps, prenorm=prenorm, upcast=upcast, is_rms_norm=is_rms_norm)


def rms_norm_ref_v1(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
    """layer_norm_ref_v1 with the RMS norm."""
    return layer_norm_ref_v1(*args, **kwargs, is_rms_norm=True)


def _dropout(x: Tensor, p: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """x with 0 where the mask (drawn if None) is False and the rest scaled up, and the mask; for p = 0 x and None."""
    if not p:
        return x, None
    mask = torch.rand(x.shape, device=x.device) >= p if mask is None else mask
    return x.masked_fill(~mask, 0) / (1 - p), mask


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if not rms:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    out = F.rms_norm(x, x.shape[-1:], weight, eps)
    return out if bias is None else out + bias
