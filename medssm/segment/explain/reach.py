"""What the scans of a network carry to a voxel, on the grid of the network's window, with the distances within which it lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from medssm.nn.blocks import LINEAR
from medssm.nn.reach import Reach, reach, share_by_distance, within

SHARES = (0.5, 0.9)


class Layer(NamedTuple):
    """A layer with one entry of `reach` for each order."""

    name: str
    orders: list[Reach]


def layers_of(network: nn.Module, x: Tensor, target: Sequence[int]) -> list[Layer]:
    """The layers of `reach`, in the order in which they are called. x: (c, *patch)."""
    found: dict[str, list[Reach]] = {}
    for one in reach(network, x[None], target):
        found.setdefault(one.layer, []).append(one)
    return [Layer(name, orders) for name, orders in found.items()]


def on_patch(one: Reach, patch: Sequence[int]) -> Tensor:
    """(*patch): the share of the influence that each voxel of the network's window has; over all voxels it is 1, but for what lies on the padding."""
    total = one.influence.sum()
    share = (one.influence / torch.where(total > 0, total, 1.0)).float()
    for stride in one.stride:
        share = share / stride
    whole = [round(n * s) for n, s in zip(share.shape, one.stride, strict=True)]
    if whole == list(share.shape):
        return share
    fine = functional.interpolate(share[None, None], whole, mode=LINEAR[share.dim()], align_corners=False)[0, 0]
    return fine[tuple(slice(n) for n in patch)]


def figures(layer: Layer, spacing: Sequence[float]) -> dict[str, Any]:
    """A layer's distances, for each order.

    Returns:
        {"layer", "op", "shape", "voxel_mm": the edges of one of the layer's voxels, "orders": [{"order", "within_mm": {"0.5": …, "0.9": …},
        "even_mm": the same, had all voxels that the order may see the same influence, "within_steps": …, "even_steps": …}]}. Steps are those of the
        walk; None without an order.
    """
    first = layer.orders[0]
    edges = [s * mm for s, mm in zip(first.stride, spacing, strict=True)]
    return {
        "layer": layer.name,
        "op": first.op,
        "shape": list(first.influence.shape),
        "voxel_mm": edges,
        "orders": [_order(one, spacing) for one in layer.orders],
    }


def _order(one: Reach, spacing: Sequence[float]) -> dict[str, Any]:
    even = (one.influence > 0).to(one.influence)
    found: dict[str, Any] = {"order": one.order or "all voxels at once"}
    for unit, distance in (("mm", one.distance(spacing)), ("steps", one.steps)):
        for kind, values in (("within", one.influence), ("even", even)):
            found[f"{kind}_{unit}"] = None if distance is None else {str(share): _finite(within(values, distance, share)) for share in SHARES}
    return found


def curves(layer: Layer, spacing: Sequence[float]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """{"mm" and "steps": for each order (distances, shares of the influence within them)}; no steps without an order."""
    return {
        "mm": [share_by_distance(one.influence, one.distance(spacing)) for one in layer.orders],
        "steps": [share_by_distance(one.influence, one.steps) for one in layer.orders if one.steps is not None],
    }


def _finite(value: float) -> float | None:
    return value if value == value else None
