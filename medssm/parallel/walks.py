"""How the ranks walk a scan order of the whole volume together."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medssm import orders
from medssm.orders import Order

if TYPE_CHECKING:
    from medssm.parallel.slabs import Slabs

Ints = npt.NDArray[np.int64]


class Part(NamedTuple):
    """This rank's part of a walk, which the ranks walk one after the other.

    order   how it walks its tokens: an Order of its slab, or a LongTensor (l,) of the tokens as a sequence, None for one after the other
    ranks   in the order of the walk; none where every segment of the walk lies in one rank, so that no state is carried
    starts  where there are several segments: the steps of this part at which they begin
    give    where the slabs are no parts of the walk: of each rank the tokens of this slab, in the walk's order, that it is to hold meanwhile
    take    how many tokens come from each rank
    """

    order: Order | Tensor | None
    ranks: Sequence[int]
    starts: Tensor | None = None
    give: Sequence[Tensor] | None = None
    take: Sequence[int] = ()


def part(slabs: Slabs, order: Order, spatial: Sequence[int]) -> Part:
    """This rank's part of an order that is not reversed, (*spatial) the slab.

    - The slowest axis of a raster is the cut one, or the slabs are runs of the walk for another reason: each rank walks its slab.
    - Every segment of the walk (a window, a phase) lies in one slab: each rank walks its slab, no state is carried.
    - Else the tokens are shared out anew, for this scan alone, each rank holding a run of the walk, or whole segments of it.
    """
    axis, _ = slabs.first_row(spatial)
    whole, rank, count = slabs.whole(spatial), slabs.ranks.rank, slabs.ranks.count
    order.check(whole)
    if order.kind == "raster" and (order.parameters["axes"] or range(len(whole)))[0] == axis:
        return Part(order, range(count))
    with torch.inference_mode(False):  # what is kept serves training too
        return _part(order.spec, whole, axis, tuple(slabs.place(spatial[axis])), rank)


@functools.lru_cache(maxsize=128)
def _part(spec: str, whole: tuple[int, ...], axis: int, begins: tuple[int, ...], rank: int) -> Part:
    order, count = orders.parse(spec), len(begins) - 1
    index, starts = order.index(whole).numpy(), order.starts(whole).numpy()
    inner = int(np.prod(whole[axis + 1 :], dtype=np.int64))
    outside, row, inside = index // (inner * whole[axis]), index // inner % whole[axis], index % inner
    bounds = np.array(begins)
    owner = np.searchsorted(bounds, row, side="right") - 1  # of the token at each step
    local = (outside * (bounds[1:] - bounds[:-1])[owner] + row - bounds[owner]) * inner + inside  # where it is in its owner's slab
    if len(starts) > 1:
        if np.array_equal(np.minimum.reduceat(owner, starts), np.maximum.reduceat(owner, starts)):
            mine = owner == rank
            segment = np.zeros(len(index), np.int64)
            segment[starts] = 1
            found = segment.cumsum()[mine]
            return Part(_index(local[mine]), (), _starts(found))
        cuts = [0, *(int(starts[np.searchsorted(starts, len(index) * r // count)]) if r < count else 0 for r in range(1, count)), len(index)]
    else:
        changes = np.flatnonzero(np.diff(owner)) + 1
        if len(changes) + 1 == count:
            return Part(_index(local[owner == rank]), [int(owner[first]) for first in (0, *changes)])
        cuts = [len(index) * r // count for r in range(count + 1)]
    give = [torch.from_numpy(local[low:high][owner[low:high] == rank]) for low, high in itertools.pairwise(cuts)]
    low, high = cuts[rank], cuts[rank + 1]
    sources = [np.flatnonzero(owner[low:high] == q) for q in range(count)]
    held = np.concatenate(sources)  # the step of each token in this part, in the order in which they come
    walk = np.empty_like(held)
    walk[held] = np.arange(len(held))
    if len(starts) > 1:
        return Part(_index(walk), (), torch.from_numpy(starts[(starts >= low) & (starts < high)] - low), give, [len(s) for s in sources])
    return Part(_index(walk), range(count), None, give, [len(s) for s in sources])


def _index(walk: Ints) -> Tensor | None:
    return None if np.array_equal(walk, np.arange(len(walk))) else torch.from_numpy(np.ascontiguousarray(walk))


def _starts(segment: Ints) -> Tensor:
    """The steps at which the segment changes."""
    return torch.from_numpy(np.flatnonzero(np.diff(segment, prepend=-1)))
