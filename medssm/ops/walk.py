"""What an op's `order` means: tokens flattened to (b, l, …) and the walk as (index, starts, reverse).

An Order travels through torch.compile and torch.export as its `spec` string; the operator looks its tables up, cached per
shape and device. A LongTensor order travels as a tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from medssm import orders
from medssm.ops import modes

AnyOrder = orders.Order | torch.Tensor | None  # the `order` of an op


class Walk(NamedTuple):
    """index: the token visited at each step, None for raster; starts: steps at which state and taps begin anew, None where only step 0."""

    index: torch.Tensor | None  # type: ignore[assignment]  # it hides tuple.index, which nobody calls here
    starts: torch.Tensor | None
    reverse: bool


@functools.lru_cache(maxsize=512)
def _tables(spec: str, spatial: tuple[int, ...], device: str) -> Walk:
    order = orders.parse(spec)
    if order == orders.raster():
        return Walk(None, None, False)
    if order == orders.raster(reverse=True):
        return Walk(None, None, True)
    starts = order.starts(spatial)
    return Walk(order.index(spatial).to(device), starts.to(device) if starts.numel() > 1 else None, False)


def resolve(spec: str, spatial: tuple[int, ...], index: torch.Tensor | None, reverse: bool, device: torch.device) -> Walk:
    """The walk of one operator call: `index` if given, else the order's table for this spatial shape; `reverse` turns it round."""
    if index is not None:
        return Walk(index, None, reverse)
    if not spec:
        return Walk(None, None, reverse)
    tables = _tables.__wrapped__ if modes.traced() else _tables
    found = tables(spec, tuple(int(n) for n in spatial), str(device))
    return Walk(found.index, found.starts, found.reverse != reverse)


def check_index(order: torch.Tensor, length: int) -> torch.Tensor:
    """A LongTensor order is a permutation of range(length)."""
    if order.dtype is not torch.int64 or order.dim() != 1 or order.shape[0] != length:
        raise ValueError(f"order: expected an int64 tensor ({length},), got {str(order.dtype).removeprefix('torch.')} {tuple(order.shape)}")
    known = not torch.compiler.is_compiling()  # its values are not, while tracing
    if known and length and not torch.equal(order.sort().values, torch.arange(length, device=order.device)):
        raise ValueError(f"order: expected a permutation of 0..{length - 1}, got repeated or out-of-range positions")
    return order.contiguous()


def parse(order: object, spatial: tuple[int, ...]) -> tuple[str, torch.Tensor | None]:
    """(spec, index) of an Order, a LongTensor or None, checked against the spatial shape."""
    if order is None:
        return "", None
    if isinstance(order, orders.Order):
        order.check(spatial)
        return order.spec, None
    if isinstance(order, torch.Tensor):
        return "", check_index(order, spatial[0])  # the shapes of its call were checked as those of a sequence
    raise TypeError(f"order: expected an Order, a LongTensor or None, got {type(order).__name__}")


def parse_many(given: Sequence[object], spatial: tuple[int, ...]) -> str:
    """The specs of Orders as one text, each checked against the spatial shape."""
    specs = []
    for k, order in enumerate(given):
        if not isinstance(order, orders.Order):
            raise TypeError(f"orders[{k}]: expected an Order, got {type(order).__name__}")
        order.check(spatial)
        specs.append(order.spec)
    return ";".join(specs)
