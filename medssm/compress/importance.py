"""How much a channel, a head or a state counts: by its weights, by the loss's gradient, and for states by what they bring to the output."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from medssm import ops
from medssm.compress.groups import Group, Groups
from medssm.nn.reach import observed

Batches = Iterable[tuple[Tensor, Tensor]]  # images (b, c, *spatial) and what the loss compares their outputs with
Loss = Callable[[Any, Tensor], Tensor]
# {op with a state that adds up over its dimensions: the tensors that have the dimension last}
_STATES = {"selective_scan": ("A", "B", "C"), "selective_scan_nd": ("A", "B", "C"), "ssd": ("B", "C"), "gated_linear_attention": ("q", "k")}


def scores(network: nn.Module, groups: Groups, example: Tensor, batches: Batches = (), loss: Loss | None = None) -> dict[Group, Tensor]:
    """{group: (size,), how much each of its units counts}.

    With a loss it is the sum over the unit's weights w of |w dL/dw|, over the batches (first order: Molchanov et al., arXiv 1906.10771). Without one
    it is the sum of w^2 over that of the units of the group that count no less (Lee et al., arXiv 2010.07611), so that groups compare. For the states
    of a mixer that sum over all of them is divided by the energy that each brings to the mixer's output for the example.
    """
    weights = _squares(network) if loss is None else _first_order(network, batches, loss)
    brought = states(network, example)
    found = {}
    for group in groups.all:
        if group.kind == "fixed" or not group.slices:
            continue
        each = torch.zeros(group.size)
        for module, name, axis, index in group.slices:
            value = weights.get((module, name))
            if value is not None:
                each += value.transpose(0, axis).flatten(1).sum(1)[index].sum(1) if value.dim() > 1 else value[index].sum(1)
        if loss is None:
            ascending = each.sort()
            from_here = ascending.values.flip(0).cumsum(0).flip(0)
            each = torch.zeros_like(each).scatter(0, ascending.indices, ascending.values / from_here.clamp(min=1e-30))
        mixer = group.name.rpartition(".")[0]
        if group.kind == "states" and mixer in brought:
            energy = brought[mixer]
            each = energy / energy.sum().clamp(min=1e-30) * each.sum()
        found[group] = each
    return found


@torch.no_grad()
def states(network: nn.Module, example: Tensor) -> dict[str, Tensor]:
    """{path of a mixer: the energy of what each of its states alone brings to its output}, (states,), or (heads keys,) for gated linear attention."""
    found: dict[str, Tensor] = {}
    with observed(network) as seen:
        network.eval()(example)
    for layer, op, call, _ in seen:
        if op not in _STATES:
            continue
        named, by_heads = _STATES[op], op == "gated_linear_attention"
        arguments = {key: value for key, value in call.items() if key not in ("D", "z", "return_final_state")}
        if by_heads:
            arguments["scale"] = 1.0
            if call["g"].dim() == call["q"].dim():
                named = (*named, "g")
        energies = []
        for i in range(call[named[0]].shape[-1]):
            y = getattr(ops, op)(**arguments | {key: call[key][..., i : i + 1].contiguous() for key in named}).float().square()
            energies.append(y.flatten(0, -3).sum((0, 2)) if by_heads else y.sum())
        found[layer] = found.get(layer, 0) + torch.stack(energies, -1).flatten().cpu()
    return found


def _squares(network: nn.Module) -> dict[tuple[nn.Module, str], Tensor]:
    """w^2 of each weight, over the sum of it in its tensor."""
    return {key: value.detach().float().cpu().square() / value.detach().float().square().sum().clamp(min=1e-30).cpu() for key, value in _all(network)}


def _first_order(network: nn.Module, batches: Batches, loss: Loss) -> dict[tuple[nn.Module, str], Tensor]:
    """|w dL/dw|, added over the batches. Norms keep their statistics."""
    network.eval()
    added = {key: torch.zeros(value.shape) for key, value in _all(network)}
    for image, label in batches:
        network.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss(network(image), label).backward()
        for key, value in _all(network):
            if value.grad is not None:
                added[key] += (value.detach() * value.grad).abs().float().cpu()
    network.zero_grad(set_to_none=True)
    return added


def _all(network: nn.Module) -> list[tuple[tuple[nn.Module, str], nn.Parameter]]:
    return [((module, name), value) for module in network.modules() for name, value in module.named_parameters(recurse=False)]
