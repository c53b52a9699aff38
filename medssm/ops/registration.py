"""How an op becomes a PyTorch operator: schema, implementation, fake kernel, autograd and vmap, in one call.

A public function takes the direct road to its kernel when `direct(...)` says that nothing traces, transforms or differentiates;
else it calls the registered operator, which torch.compile, torch.export, autograd and vmap understand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.autograd import forward_ad

from medssm import dispatch
from medssm.kernels import cuda, native, triton

_library = torch.library.Library("medssm", "DEF")

# Looked up once: `direct` is asked at every call.
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter
_is_compiling, _grad_enabled, _tracing = torch.compiler.is_compiling, torch.is_grad_enabled, torch._C._get_tracing_state
_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transforms = torch._C._functorch.peek_interpreter_stack


def operator(name: str, schema: str, implementation: Callable, fake: Callable) -> Callable:
    """Define medssm::name with an implementation for every device and a fake kernel (shapes and dtypes only)."""
    _library.define(name + schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"medssm::{name}", fake, lib=_library)
    return getattr(torch.ops.medssm, name).default


def differentiable(name: str, setup: Callable, backward: Callable) -> None:
    """Attach a gradient: setup(ctx, inputs, output) and backward(ctx, *grads)."""
    torch.library.register_autograd(f"medssm::{name}", backward, setup_context=setup, lib=_library)


def once_differentiable(name: str) -> None:
    """A backward operator's own autograd: raise, since an opaque operator would silently contribute a zero second derivative."""

    def refuse(_ctx, *_grads):
        raise RuntimeError(f"medssm::{name}: second derivatives need backend='reference'")

    differentiable(name, lambda ctx, inputs, output: None, refuse)


def foldable(name: str, call: Callable, names: Sequence[str], tokens: Sequence[str]) -> None:
    """vmap by folding: the mapped dimension of token tensors joins the batch; mapped weights raise.

    names: the operator's argument names in order; tokens: those whose first dimension is the batch.
    """

    def rule(info, in_dims, *args):
        size, folded, batch = info.batch_size, [], None
        for argument, dim, value in zip(names, in_dims, args, strict=True):
            if argument in tokens and value is not None:
                value = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
                batch = value.shape[1]
                value = value.reshape(size * batch, *value.shape[2:])
            elif dim is not None and isinstance(value, torch.Tensor):
                raise ValueError(f"{argument}: vmap over weights is not supported, only over tensors that carry a batch dimension")
            folded.append(value)
        outputs = call(*folded)
        single = isinstance(outputs, torch.Tensor)
        unfolded = tuple(o if o.dim() == 1 and o.numel() == 0 else o.reshape(size, batch, *o.shape[1:]) for o in ((outputs,) if single else outputs))
        dims = tuple(None if o.dim() == 1 and o.numel() == 0 else 0 for o in unfolded)
        return (unfolded[0], dims[0]) if single else (unfolded, dims)

    torch.library.register_vmap(f"medssm::{name}", rule, lib=_library)


def needs_grad(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether autograd will ask this call for gradients."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def direct(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether a call may go straight to the C function: plain tensors, no gradients, nothing that traces or transforms."""
    if _is_compiling() or _modes() or _function_modes() or _transforms() is not None or forward_ad._current_level >= 0 or _tracing() is not None:
        return False
    grad = _grad_enabled()
    for t in tensors:
        kind = type(t)
        if kind is not _Tensor and kind is not _Parameter:
            if t is not None:
                return False
        elif grad and t.requires_grad:
            return False
    return True


def traced() -> bool:
    """Whether a tracer or a fake mode is at work: a tensor made now is of that trace alone, and kept it would turn up in later calls."""
    return _is_compiling() or bool(_modes())


def transformed() -> str | None:
    """Why a kernel without forward-mode and higher-order derivatives cannot serve under the torch.func transform in force, or None."""
    if torch.compiler.is_compiling():
        return None
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode derivatives (jvp) need backend='reference'"
    stack = torch._C._functorch.get_interpreter_stack()
    for level in stack or ():
        if level.key() != torch._C._functorch.TransformType.Vmap:
            return f"torch.func.{level.key().name.lower()} needs backend='reference'"
    return None


_LIBRARIES = {"native": native, "triton": triton, "cuda": cuda}


def kernels(**refusals: Callable) -> dict[str, dispatch.Backend]:
    """The backends that an op has, each with the function that says why it cannot serve a call's tensors, or None."""

    def backend(library, refuse):
        return dispatch.Backend(library.reason, lambda *args: transformed() or refuse(*args))

    return {name: backend(_LIBRARIES[name], refuse) for name, refuse in refusals.items()}


def absent(like: torch.Tensor) -> torch.Tensor:
    """What an operator returns in place of an output that the call does not have (operators cannot return None)."""
    return like.new_empty((0,))
