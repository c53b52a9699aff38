"""Batch norms folded into the convolutions before them, for inference: the same values with fewer passes over the maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from medssm.nn import convolution

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_STRAIGHT = (nn.Conv1d, nn.Conv2d, nn.Conv3d, convolution.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, convolution.ConvTranspose2d, convolution.ConvTranspose3d)


def fold(network: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """Fold every batch norm that follows a convolution into its weights, in place:

        norm(W x + b) = (a W) x + a (b - mean) + beta,   a = gamma / sqrt(var + eps)

    with the norm's stored statistics: for inference alone. A norm is folded where its block can be traced by torch.fx and shows that the norm
    alone takes the convolution's output. It becomes an nn.Identity, and the convolution has a bias afterwards.

    Returns the network, and the step {"kind": "fold", "pairs": [[convolution, norm], ...]} by which `restructure` does the same.
    """
    step = {"kind": "fold", "pairs": [list(pair) for pair in _pairs(network)]}
    return restructure(network, step), step


@torch.no_grad()
def restructure(network: nn.Module, step: Mapping[str, Any]) -> nn.Module:
    """The network with the norms that the step names folded, in place."""
    for name, norm_name in step["pairs"]:
        conv: Any = network.get_submodule(name)
        norm: Any = network.get_submodule(norm_name)
        if type(conv) not in _STRAIGHT + _TRANSPOSED or type(norm) not in _NORMS:
            raise ValueError(f"expected a convolution and its batch norm, got {name} ({type(conv).__name__}), {norm_name} ({type(norm).__name__})")
        statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics, transpose=type(conv) in _TRANSPOSED)
        parent, _, child = norm_name.rpartition(".")
        setattr(network.get_submodule(parent), child, nn.Identity())
    return network


def _pairs(network: nn.Module) -> Iterator[tuple[str, str]]:
    """The names of each convolution and the batch norm that can be folded into it."""
    modules = dict(network.named_modules())
    names = Counter(id(module) for _, module in network.named_modules(remove_duplicate=False))
    for name, norm_name in _followed(network, ""):
        conv, norm = modules.get(name), modules.get(norm_name)
        if conv is None or norm is None or names[id(conv)] > 1 or names[id(norm)] > 1 or norm.running_mean is None:
            continue
        hooked = conv._forward_hooks or norm._forward_hooks or norm._forward_pre_hooks
        if not hooked and (type(conv) in _STRAIGHT or (type(conv) in _TRANSPOSED and conv.groups == 1)):
            yield name, norm_name


def _followed(module: nn.Module, prefix: str) -> Iterator[tuple[str, str]]:
    """(layer, batch norm) wherever the norm is the only one that takes the layer's output; in parts of a module that cannot be traced as a whole."""
    if isinstance(module, _NORMS) or not _has_norm(module):
        return
    try:
        graph = _Tracer().trace(module)
    except Exception:  # whatever the Python code of a module does with a symbol
        for name, child in module.named_children():
            yield from _followed(child, f"{prefix}{name}.")
        return
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        if node.op == "call_module" and type(module.get_submodule(node.target)) in _NORMS:
            before = node.args[0] if node.args else None
            if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
                continue
            if calls[node.target] == calls[before.target] == 1:
                yield f"{prefix}{before.target}", f"{prefix}{node.target}"


class _Tracer(fx.Tracer):
    """Follows modules that contain batch norms, and leaves the others whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _NORMS) or not _has_norm(m)


def _has_norm(module: nn.Module) -> bool:
    return any(isinstance(part, _NORMS) for part in module.modules())
