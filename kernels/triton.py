"""Triton: whether it serves on this machine, and which tensors.

Its kernels take tensors on a GPU; with TRITON_INTERPRET=1, set before Python starts, they run in Triton's interpreter on tensors of the CPU:
slow, and the same arithmetic, for tests on machines without a GPU. A kernel module is imported at its first call: importing medssm needs no Triton.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _look() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if not INTERPRETED and torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built for the CPU"
    return None


_REASON = _look()  # looked up once: a choice of backend that torch.compile traces then reads a constant


def reason() -> str | None:
    """None where Triton's kernels serve, else one line that says why not."""
    return _REASON


def refuse(*tensors: torch.Tensor | None) -> str | None:
    """Why these kernels cannot serve these tensors, or None."""
    for t in tensors:
        if t is not None and (t.device.type != DEVICE or t.dtype not in DTYPES):
            served = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            return f"it serves {served} on {DEVICE}, got {str(t.dtype).removeprefix('torch.')} on {t.device}"
    return None


def plain(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Of a subclass (MONAI's MetaTensor) the tensor itself: a launch takes nothing else."""
    return tuple(t if t is None or type(t) is torch.Tensor else t.detach().as_subclass(torch.Tensor) for t in tensors)


def present(instead: torch.Tensor, *tensors: torch.Tensor | None):
    """A kernel's pointers: one that is not there is `instead`, which the kernel then never reads in its place."""
    return (instead if t is None else t for t in tensors)


def strides(tensor: torch.Tensor | None, count: int) -> tuple[int, ...]:
    """A tensor's strides, zeros where there is none."""
    return (0,) * count if tensor is None else tensor.stride()


def pointers(instead: torch.Tensor, **tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A kernel's pointers, by parameter name. None becomes `instead`: a pointer that the kernel gets and never reads."""
    return {name: instead if t is None else t for name, t in tensors.items()}


def strided(dims: tuple[str, ...], instead: torch.Tensor, **tensors: torch.Tensor | None) -> dict[str, torch.Tensor | int]:
    """A kernel's pointers, as `pointers` gives them, and for each its strides over its first dimensions: `<name>_<dim>`, 0 for None."""
    arguments: dict[str, torch.Tensor | int] = {}
    for name, t in tensors.items():
        arguments[name] = instead if t is None else t
        steps = (0,) * len(dims) if t is None else t.stride()[: len(dims)]
        arguments |= {f"{name}_{dim}": step for dim, step in zip(dims, steps, strict=True)}
    return arguments


def on(tensor: torch.Tensor):
    """The tensor's device as the current one while a kernel is launched."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
