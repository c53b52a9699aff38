"""Argument checks that every op shares: one clear error that names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def floating(tensors: dict[str, torch.Tensor | None]) -> None:
    """All are floating-point tensors on one device."""
    first, device = None, None
    for name, t in tensors.items():
        if t is None:
            continue
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
        if t.dtype not in _FLOATS:
            raise ValueError(f"{name}: expected float32, float64, bfloat16 or float16, got {str(t.dtype).removeprefix('torch.')}")
        if device is None:
            first, device = name, t.device
        elif t.device != device:
            raise ValueError(f"{name}: expected device {device}, where {first} is, got {t.device}")


def shape(name: str, tensor: torch.Tensor | None, *allowed: Sequence[int]) -> None:
    """The tensor's shape is one of `allowed`; None passes."""
    if tensor is None or any(tuple(tensor.shape) == tuple(a) for a in allowed):
        return
    raise ValueError(f"{name}: expected {' or '.join(str(tuple(a)) for a in allowed)}, got {tuple(tensor.shape)}")


def dims(name: str, tensor: torch.Tensor, *allowed: int, form: str) -> None:
    """The tensor has one of the allowed numbers of dimensions; `form` shows the expected shape."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dim() not in allowed:
        raise ValueError(f"{name}: expected {form}, got {tuple(tensor.shape)}")


def choice(name: str, value, allowed: Sequence) -> None:
    """The value is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, allowed))}, got {value!r}")


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 if any input is, else float32, whatever the storage."""
    return torch.float64 if any(t is not None and t.dtype is torch.float64 for t in tensors) else torch.float32
