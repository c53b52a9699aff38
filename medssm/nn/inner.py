"""Layers inside a mixer whose weights a kernel reads: when that equals calling the layer, and what is done where it does not."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from medssm.nn.convolution import Conv3d

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv3d)


def plain(layer: nn.Module, kinds: tuple[type[nn.Module], ...] = _KINDS) -> bool:
    """Whether the layer, one of the kinds, is its weight and bias and no more, so that a kernel may read them; any other layer is called.

    Not plain: another class, also a subclass (adapters such as LoRA, quantized and parametrized layers, wrappers); a layer with hooks (pruning, the
    older weight_norm and spectral_norm, fully_shard) or a `forward` of its own; a weight that is a tensor subclass (torchao, DTensor).
    """
    if type(layer) not in kinds or "forward" in layer.__dict__ or is_traceable_wrapper_subclass(layer.weight):
        return False
    return not (layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks)


def steps(
    project: nn.Module,  # (*, r) -> (*, d)
    dt: Tensor,  # (*, r)
) -> dict[str, Tensor | None]:
    """delta, delta_bias and delta_proj of a scan whose steps are project(dt); the kernel expands dt itself where `project` is plain."""
    if plain(project):
        assert isinstance(project, nn.Linear)
        return {"delta": dt, "delta_bias": project.bias, "delta_proj": project.weight}
    return {"delta": project(dt)}


def weight_dtype(layer: nn.Module, x: Tensor) -> torch.dtype:
    """The type of the layer's parameters, x's where it has none."""
    return next((p.dtype for p in layer.parameters()), x.dtype)
