"""What PyTorch does around a call: whether it traces, transforms or differentiates, and so which way to the kernel the call takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd import forward_ad

# Looked up once: `direct` is asked at every call.
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter
_is_compiling, _grad_enabled, _tracing = torch.compiler.is_compiling, torch.is_grad_enabled, torch._C._get_tracing_state
_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transforms = torch._C._functorch.peek_interpreter_stack


def needs_grad(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether autograd will ask this call for gradients."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def direct(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether a call may go straight to the kernel: plain tensors, no gradients, nothing that traces or transforms."""
    return plain(tensors, with_gradients=not _grad_enabled())


def plain(tensors: Sequence[torch.Tensor | None], with_gradients: bool = True) -> bool:
    """Whether nothing traces or transforms a call, and its tensors are PyTorch's own; with_gradients: they may ask for gradients."""
    if _is_compiling() or _modes() or _function_modes() or _transforms() is not None or forward_ad._current_level >= 0 or _tracing() is not None:
        return False
    for t in tensors:
        kind = type(t)
        if kind is not _Tensor and kind is not _Parameter:
            if t is not None:
                return False
        elif not with_gradients and t.requires_grad:  # type: ignore[union-attr]  # it is no None here
            return False
    return True


def traced() -> bool:
    """Whether a tracer or a fake mode is at work: a tensor made now belongs to that trace, and must not be kept for later calls."""
    return _is_compiling() or bool(_modes()) or _tracing() is not None


def transformed() -> str | None:
    """Why a kernel without forward-mode and higher-order derivatives cannot serve under the torch.func transform in force, or None."""
    if torch.compiler.is_compiling():
        return None
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode derivatives (jvp) need backend='reference'"
    for level in torch._C._functorch.get_interpreter_stack() or ():
        if level.key() != torch._C._functorch.TransformType.Vmap:
            return f"torch.func.{level.key().name.lower()} needs backend='reference'"
    return None
