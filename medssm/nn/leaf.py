"""Layers that torch.fx records as one call, and torch.jit.script refuses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Proxy


class Leaf(nn.Module):
    """A module that torch.fx.symbolic_trace leaves whole, as it does those of torch.nn: its Python code depends on shapes, types or devices, which a
    symbolic trace does not know."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__:
            cls.forward = _recorded(cls.forward)

    def __prepare_scriptable__(self) -> Any:
        """torch.jit.script asks every module for what it should compile in its place."""
        raise TypeError(f"{type(self).__name__} cannot be scripted: use torch.jit.trace, whose result takes any size, or torch.export")


def _recorded(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def recorded(self: Leaf, *args: Any, **kwargs: Any) -> Any:
        x = args if isinstance(args, Proxy) else args[0] if args else None  # of a root, fx replaces *args
        x = x[0] if isinstance(x, list) and x else x
        if isinstance(x, Proxy):
            tracer: Any = x.tracer
            if tracer.root is self:
                raise TypeError(f"torch.fx leaves a {type(self).__name__} whole: expected a module that contains it to trace, got it alone")
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        return forward(self, *args, **kwargs)

    return recorded
