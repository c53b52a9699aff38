"""mamba_ssm.ops.triton.layer_norm on PyTorch: layer and RMS norm with the addition of the residual before it, in float32 inside.

r = residual + dropout(rowscale x) + dropout(x1);   out = norm(r) weight + bias
"""

from __future__ import annotations

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
        prenorm: return the sum as well, in residual's dtype (without one in float32 if residual_in_fp32, else in x's).

    Returns out, (out, out1), (out, sum) or (out, out1, sum); out in x's dtype. Raises NotImplementedError for return_dropout_mask.
    """
    if return_dropout_mask:
        raise NotImplementedError("return_dropout_mask: expected False (it is not in this release of medssm), got True")
    compute = compute_dtype(x, residual, weight)
    total = F.dropout(x if rowscale is None else x * rowscale[..., None], dropout_p).to(compute)
    if x1 is not None:
        total = total + F.dropout(x1, dropout_p)
    if residual is not None:
        total = total + residual
    outs = [_norm(total, weight, bias, eps, is_rms_norm).to(x.dtype)]
    if weight1 is not None:
        outs.append(_norm(total, weight1, bias1, eps, is_rms_norm).to(x.dtype))
    if prenorm:
        outs.append(total.to(residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype))
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


class RMSNorm(nn.Module):
    """RMS norm over the last dimension, with rms_norm_fn's residual. Weight: weight (d,)."""

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, dropout_p: float = 0.0, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.eps, self.dropout_p = eps, dropout_p
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Tensor | tuple[Tensor, ...]:
        return rms_norm_fn(
            x,
            self.weight,
            self.bias,
            residual,
            eps=self.eps,
            dropout_p=self.dropout_p if self.training else 0.0,
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


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if not rms:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    out = F.rms_norm(x, x.shape[-1:], weight, eps)
    return out if bias is None else out + bias
