"""Triton: whether its kernels run on this machine, for which tensors, and the arguments of a launch.

The kernels take tensors on a GPU. With TRITON_INTERPRET=1, set before Python starts, they run in Triton's interpreter on tensors on the CPU: slowly,
with the same arithmetic, for tests on machines without a GPU. A kernel module is imported at its first call: importing medssm needs no Triton.
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
    if not INTERPRETED and not torch.cuda.is_available():
        return "torch finds no GPU or no driver"
    return None


_REASON = _look()  # looked up once, so that torch.compile reads a constant when it traces the choice of a backend


def reason() -> str | None:
    """None if Triton's kernels run here, else one line that says why not."""
    return _REASON


def refuse(*tensors: torch.Tensor | None) -> str | None:
    """Why these kernels cannot serve these tensors, or None."""
    for t in tensors:
        if t is not None and (t.device.type != DEVICE or t.dtype not in DTYPES):
            served = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            return f"it serves {served} on {DEVICE}, got {str(t.dtype).removeprefix('torch.')} on {t.device}"
    return None


def plain(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors as plain ones: a launch takes no subclass (MONAI's MetaTensor)."""
    return tuple(t if t is None or type(t) is torch.Tensor else t.detach().as_subclass(torch.Tensor) for t in tensors)


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
    """Makes the tensor's device the current one while a kernel is launched."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
