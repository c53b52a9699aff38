"""Norms that several mixers share."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from medssm.kernels.dtypes import compute_dtype


def grouped_norm(
    x: Tensor,  # (*, d)
    weight: Tensor,  # (d,)
    bias: Tensor | None,  # (d,)
    z: Tensor | None,  # (*, d)
    *,
    size: int,
    eps: float,
    norm_before_gate: bool,
    rms: bool,
) -> Tensor:
    """Layer norm (rms: RMS norm) of each group of `size` channels, gated by silu(z) where there is a z:

        norm_before_gate: out = (norm(x) weight + bias) silu(z);   else: out = norm(x silu(z)) weight + bias

    Computed in float32, or float64 if x, weight or z is. Returns out in x's shape and dtype. `size` must divide d.
    """
    wide = compute_dtype(x, weight, z)
    y, gate = x.to(wide), None if z is None else functional.silu(z.to(wide))
    if gate is not None and not norm_before_gate:
        y = y * gate
    y = (functional.rms_norm if rms else functional.layer_norm)(y.unflatten(-1, (-1, size)), (size,), eps=eps).flatten(-2) * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return (y * gate if gate is not None and norm_before_gate else y).to(x.dtype)
