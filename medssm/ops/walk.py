"""What an op's `order` and `cu_seqlens` mean: tokens flattened to (b, l, …) and the walk as (index, starts, reverse, sequences).

An Order travels through torch.compile and torch.export as its `spec` string; the operator looks its tables up, cached per
shape and device. A LongTensor order travels as a tensor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from medssm import orders
from medssm.kernels.walks import Sequences
from medssm.ops import modes

AnyOrder = orders.Order | torch.Tensor | None  # the `order` of an op


class Walk(NamedTuple):
    """index: the token visited at each step, None for raster. starts: steps at which state and taps begin anew, None where only step 0.
    sequences: those of packed tokens, None for one.
    """

    index: torch.Tensor | None  # type: ignore[assignment]  # it hides tuple.index, which nobody calls here
    starts: torch.Tensor | None
    reverse: bool
    sequences: Sequences | None = None


@functools.lru_cache(maxsize=512)
def _kept_tables(spec: str, spatial: tuple[int, ...], device: str) -> Walk:
    """Tables that later calls take, too: made outside of inference mode, whose tensors no call with gradients can save."""
    with torch.inference_mode(False):
        return _tables(spec, spatial, device)


def _tables(spec: str, spatial: tuple[int, ...], device: str) -> Walk:
    order = orders.parse(spec)
    if order == orders.raster():
        return Walk(None, None, False)
    if order == orders.raster(reverse=True):
        return Walk(None, None, True)
    starts = order.starts(spatial)
    return Walk(order.index(spatial).to(device), starts.to(device) if starts.numel() > 1 else None, False)


def resolve(
    spec: str, spatial: tuple[int, ...], index: torch.Tensor | None, reverse: bool, cu_seqlens: torch.Tensor | None, device: torch.device
) -> Walk:
    """The walk of one operator call: `index` if given, else the order's table for this spatial shape; `reverse` turns it round."""
    if index is not None or not spec:
        found = Walk(index, None, reverse)
    else:
        tables = _tables if modes.traced() else _kept_tables
        found = tables(spec, tuple(int(n) for n in spatial), str(device))
        found = found._replace(reverse=found.reverse != reverse)
    return found if cu_seqlens is None else packed(found, cu_seqlens, math.prod(spatial))


def packed(path: Walk, cu_seqlens: torch.Tensor, length: int) -> Walk:
    """The walk of packed sequences: state and taps begin anew where a sequence does, too."""
    bounds = cu_seqlens.to(torch.int64).contiguous()
    if path.starts is None and not modes.traced():
        values = bounds.tolist()
        if len(set(values)) == len(values):  # no empty sequences: each is one segment
            return path._replace(starts=bounds[:-1], sequences=Sequences(len(values) - 1, _numbers(len(values) - 1, bounds.device)))
    filled = (bounds[1:] > bounds[:-1]).nonzero().flatten()
    begins = bounds[filled]
    starts = begins if path.starts is None or not length else torch.cat([path.starts, begins]).unique()
    return path._replace(starts=starts, sequences=Sequences(len(bounds) - 1, filled[torch.searchsorted(begins, starts, right=True) - 1]))


def packed_on_cpu(cu_seqlens: object, length: int) -> tuple[torch.Tensor, torch.Tensor, int] | None:
    """(starts, their sequences, how many) for the CPU kernel, which may read less than all of them; None where `packed` has more to do.

    After a call that went through memory every first use of something costs: so this uses little.
    """
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype is not torch.int64 or cu_seqlens.dim() != 1 or not cu_seqlens.is_cpu:
        return None
    values = cu_seqlens.tolist()
    sequences = len(values) - 1
    if sequences < 1 or values[0] != 0 or values[-1] != length or sorted(set(values)) != values or not cu_seqlens.is_contiguous():
        return None
    return cu_seqlens, _numbers(sequences, cu_seqlens.device), sequences


@functools.lru_cache(maxsize=64)
def _numbers(count: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # later calls take them, too
        return torch.arange(count, device=device)


def count(cu_seqlens: object) -> int | None:
    """How many sequences are packed: cu_seqlens is None, or whole numbers (n + 1,)."""
    if cu_seqlens is None:
        return None
    if not isinstance(cu_seqlens, torch.Tensor):
        raise TypeError(f"cu_seqlens: expected an int32 or int64 tensor (n + 1,), got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        dtype = str(cu_seqlens.dtype).removeprefix("torch.")
        raise ValueError(f"cu_seqlens: expected an int32 or int64 tensor (n + 1,) with n at least 1, got {dtype} {tuple(cu_seqlens.shape)}")
    return cu_seqlens.shape[0] - 1


def check_bounds(cu_seqlens: torch.Tensor, length: int, device: torch.device) -> None:
    """cu_seqlens rises from 0 to the length."""
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens: expected device {device}, where the tokens are, got {cu_seqlens.device}")
    if torch.compiler.is_compiling() or cu_seqlens.is_meta:  # its values are not known then
        return
    bounds = cu_seqlens.tolist()  # the one look at its values: on a GPU each look waits
    if bounds[0] != 0 or bounds[-1] != length or sorted(bounds) != bounds:
        first, *_, last = bounds
        got = str(bounds) if len(bounds) <= 9 else f"{first} … {last}{', which falls on its way' if sorted(bounds) != bounds else ''}"
        raise ValueError(f"cu_seqlens: expected to rise from 0 to {length}, the number of tokens, got {got}")


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
