"""mamba_ssm.ops.triton.layernorm_gated on PyTorch: layer and RMS norm of groups of channels, gated before or after, in float32 inside.

norm_before_gate: out = (norm(x) weight + bias) silu(z);   else: out = norm(x silu(z)) weight + bias
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from medssm.kernels.dtypes import compute_dtype
from medssm.nn.norms import grouped_norm
from medssm.ops import shapes


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """Layer norm (is_rms_norm: RMS norm) over each group of the last dimension, with z gated by silu(z).

    Args:
        x, z: (*, d). weight, bias: (d,), bias may be None. group_size: channels of a group, a divisor of d; None is all d.

    Returns out in x's shape and dtype. Raises ValueError for a shape or group_size that does not fit.
    """
    channels = x.shape[-1]
    size = channels if group_size is None else group_size
    shapes.agree({"x": "*rows d | d", "weight?": "d", "bias?": "d", "z?": "*rows d | d"}, x, weight, bias, z)
    if channels % size:
        raise ValueError(f"group_size: expected a divisor of the {channels} channels, got {size}")
    return grouped_norm(x, weight, bias, z, size=size, eps=eps, norm_before_gate=norm_before_gate, rms=is_rms_norm)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """layernorm_fn with the RMS norm."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    upcast: bool = True,
) -> Tensor:
    """rmsnorm_fn by plain operations, without upcast in x's own type."""
    dtype = x.dtype
    wide = compute_dtype(x, weight)
    if upcast:
        x, z = x.to(wide), None if z is None else z.to(wide)
    gate = None if z is None else silu(z)
    x = x if gate is None or norm_before_gate else x * gate
    groups = x.unflatten(-1, (-1, group_size or x.shape[-1]))
    out = (groups / (groups.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight.to(wide)
    out = out if bias is None else out + bias.to(wide)
    return (out if gate is None or not norm_before_gate else out * gate).to(dtype)


class LayerNorm(nn.Module):
    """Layer norm of layernorm_fn. Weights: weight, bias (hidden_size,)."""

    rms = False

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None if self.rms else nn.Parameter(torch.empty_like(self.weight)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return layernorm_fn(x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate, self.rms)


class RMSNorm(LayerNorm):
    """RMS norm of rmsnorm_fn. Weight: weight (hidden_size,)."""

    rms = True
