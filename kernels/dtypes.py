"""The number type that an op computes in."""

from __future__ import annotations

import torch


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 if any of the tensors is float64, else float32. None stands for an input that was not given."""
    return torch.float64 if any(t is not None and t.dtype is torch.float64 for t in tensors) else torch.float32


def widened(t: torch.Tensor) -> torch.Tensor:
    """t in float64 if it is, else in float32."""
    return t.to(compute_dtype(t))
