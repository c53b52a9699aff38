"""What a network costs: multiply-adds counted, milliseconds measured, and the part that each weight of it has in them."""

from __future__ import annotations

import copy
import math
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

_RUNS = 3


class Cost(NamedTuple):
    """Of one number of a weight, over all voxels of the example."""

    multiply_adds: float
    milliseconds: float


def multiply_adds(network: nn.Module, example: Tensor) -> int:
    """Of convolutions, matrix products and scans in one inference of the example (b, c, *spatial), counted without computing."""
    return sum(_counted(network, example)[""].values()) // 2


def costs(network: nn.Module, example: Tensor) -> dict[tuple[nn.Module, str], Cost]:
    """{(module, name of a weight): what each number of it costs}.

    Time is measured for each module that has parts (not for each layer: a mixer reads the weights of its layers itself), without the parts that have
    parts of their own, and divided among its weights by their multiply-adds. Those that belong to no layer are divided by the weights' sizes.
    """
    counted, measured = _counted(network, example), _measured(network, example)
    found: dict[tuple[nn.Module, str], Cost] = {}
    for name, module in network.named_modules():
        inside = {f"{name}.{child}".lstrip("."): part for child, part in module.named_children()}
        if not inside:
            continue
        wholes = [path for path, part in inside.items() if any(True for _ in part.children())]
        own = sum(counted.get(name, {}).values()) - sum(sum(counted.get(path, {}).values()) for path in wholes)
        spent = max(0.0, measured.get(name, 0.0) - sum(measured.get(path, 0.0) for path in wholes))
        parts: dict[tuple[nn.Module, str], float] = {}
        shared = [(module, key) for key, value in module.named_parameters(recurse=False) if value.dim() > 1]
        for path in inside.keys() - wholes:
            weight = getattr(inside[path], "weight", None)
            if weight is None or weight.dim() < 2:
                continue
            if flops := sum(counted.get(path, {}).values()):
                parts[inside[path], "weight"] = flops
            else:
                shared.append((inside[path], "weight"))
        left, size = max(0.0, own - sum(parts.values())), sum(getattr(*key).numel() for key in shared)
        parts |= {key: left * getattr(*key).numel() / size for key in shared}
        total = sum(parts.values())
        for key, part in parts.items():
            each = part / getattr(*key).numel()
            found[key] = Cost(each / 2, spent * each / total if total else 0.0)
    return found


def _counted(network: nn.Module, example: Tensor) -> dict[str, dict[object, int]]:
    """{path of a module: {operator: operations}}, "" for the whole network."""
    meta = copy.deepcopy(network).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        meta(example.to("meta"))
    root, counts = type(network).__name__, counter.get_flop_counts()
    return {name.removeprefix(root).lstrip("."): dict(table) for name, table in counts.items() if name != "Global"} | {"": dict(counts["Global"])}


@torch.no_grad()
def _measured(network: nn.Module, example: Tensor) -> dict[str, float]:
    """{path of a module with parts: milliseconds of one inference, parts included}: the smallest of a few runs."""
    network, fastest = network.eval(), dict[str, float]()
    begun: list[float] = []
    spent: dict[str, float] = {}

    def now() -> float:
        if example.is_cuda:
            torch.cuda.synchronize(example.device)
        return time.perf_counter() * 1e3

    def leave(name: str) -> None:
        spent[name] = spent.get(name, 0.0) + now() - begun.pop()

    handles = []
    for name, module in network.named_modules():
        if any(True for _ in module.children()):  # a layer that a kernel reads stays without hooks: see medssm.nn.inner
            handles.append(module.register_forward_pre_hook(lambda *_: begun.append(now())))
            handles.append(module.register_forward_hook(lambda *_, name=name: leave(name)))
    try:
        network(example)
        for _ in range(_RUNS):
            spent.clear()
            network(example)
            fastest = {name: min(value, fastest.get(name, math.inf)) for name, value in spent.items()}
    finally:
        for handle in handles:
            handle.remove()
    return fastest
