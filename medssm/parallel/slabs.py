"""One volume over several ranks: each computes a slab of every map, and gives the others the rows, states and sums that they need."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Self

from medssm.ops import cut
from medssm.parallel import functions, scans
from medssm.parallel.group import Ranks
from medssm.parallel.layers import check

Maps = TypeVar("Maps", Tensor, "list[Tensor]")


class Slabs:
    """A volume (*spatial) cut along one axis, a slab for every rank of a group.

        slabs = Slabs(network, volume.shape[2:])
        with slabs:
            logits = network(slabs.split(volume))      # this rank's rows
        loss(slabs.crop(logits), labels[:, :, slabs.rows]).backward()
        slabs.add_gradients(network)

    Inside the block the network computes on slabs what it computes on the whole volume, in training too: convolutions and pooling get the rows around
    their slab, norms the statistics of all, scans the state that the slab before theirs ends with. Each rank holds its slab of every map, no other.

    Args:
        network: a network whose layers are known: see `layers.KNOWN`. All ranks have the same weights.
        shape: (*spatial), of the whole volume.
        axis: the one that is cut, 0 for the first of `shape`.
        group: of torch.distributed; None is all ranks.
        multiple: rows in the smallest part that a rank can have, a multiple of all strides along the axis; None is what the network says
            (`size_divisor`). Slabs differ by at most one such part; zeros fill the last one.
        also: further classes of modules that compute every voxel by itself, or out of the layers that are known.

    Raises:
        ValueError: a layer is not known, or the volume has fewer parts than there are ranks.
    """

    def __init__(
        self,
        network: nn.Module,
        shape: Sequence[int],
        axis: int = 0,
        group: dist.ProcessGroup | None = None,
        *,
        multiple: int | None = None,
        also: Sequence[type[nn.Module]] = (),
    ) -> None:
        check(network, also)
        self.ranks, self.shape, self.dims, self.axis = Ranks(group), tuple(shape), len(shape), axis
        if not 0 <= axis < self.dims:
            raise ValueError(f"axis: expected 0 to {self.dims - 1}, got {axis}")
        divisor = getattr(network, "size_divisor", None)
        part = multiple or (1 if divisor is None else divisor[axis])
        parts, count = -(-self.shape[axis] // part), self.ranks.count
        if parts < count:
            raise ValueError(
                f"shape: expected more than {(count - 1) * part} voxels along axis {axis}, a part of {part} for each of {count} ranks, "
                f"got {self.shape}"
            )
        each, more = divmod(parts, count)
        self.bounds = [part * (rank * each + min(rank, more)) for rank in range(count + 1)]
        self._places: dict[int, list[int]] = {}
        self._mode = functions.Mode(self)

    # -- what a caller does --------------------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> slice:
        """This rank's rows of the volume."""
        rank = self.ranks.rank
        return slice(self.bounds[rank], min(self.bounds[rank + 1], self.shape[self.axis]))

    def split(self, volume: Tensor) -> Tensor:
        """This rank's slab of a volume (b, c, *spatial), with zeros behind the last rank's, for the network."""
        if tuple(volume.shape[2:]) != self.shape:
            raise ValueError(f"volume: expected (b, c, {', '.join(map(str, self.shape))}), got {tuple(volume.shape)}")
        return self.padded(volume.narrow(2 + self.axis, self.rows.start, self.rows.stop - self.rows.start))

    def padded(self, slab: Tensor) -> Tensor:
        """(b, c, *spatial) of this rank's `rows` alone, as `split` gives it: for who reads no more than a slab."""
        missing = self._own - slab.shape[2 + self.axis]
        if missing == 0:
            return slab
        return nn.functional.pad(slab, [0, 0] * (self.dims - 1 - self.axis) + [0, missing])

    def crop(self, slab: Maps) -> Maps:
        """A map (b, c, *spatial) of this rank, of any resolution, without the rows behind the volume; of a list each one."""
        return [self._cropped(one) for one in slab] if isinstance(slab, list) else self._cropped(slab)

    def _cropped(self, slab: Tensor) -> Tensor:
        begin, kept = self.place(slab.shape[2 + self.axis])[self.ranks.rank], self._kept(slab)
        return slab.narrow(2 + self.axis, 0, min(max(kept - begin, 0), slab.shape[2 + self.axis]))

    def gather(self, slab: Maps) -> Maps:
        """The whole map on every rank, (b, c, *spatial), from the slabs that the network gave.

        Differentiable: each slab's gradient is the sum of those that the ranks have for it. A loss that every rank computes alike from the whole is
        to be divided by the number of ranks.
        """
        return [self._gathered(one) for one in slab] if isinstance(slab, list) else self._gathered(slab)

    def _gathered(self, slab: Tensor) -> Tensor:
        dim = 2 + self.axis
        begins = self.place(slab.shape[dim])
        shapes = [(*slab.shape[:dim], b - a, *slab.shape[dim + 1 :]) for a, b in itertools.pairwise(begins)]
        received, _ = self.ranks.exchange([slab] * self.ranks.count, shapes)
        return torch.cat(received, dim).narrow(dim, 0, self._kept(slab))

    def total(self, x: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, as of the sums that make a loss. Differentiable, as `gather`."""
        return self.ranks.total(x)

    @torch.no_grad()
    def add_gradients(self, network: nn.Module) -> None:
        """Make every weight's gradient the sum over the ranks: that of the whole volume, where each rank's loss is its part of a sum."""
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        for dtype in dict.fromkeys(g.dtype for g in gradients):
            some = [g for g in gradients if g.dtype == dtype]
            flat = self.ranks.add(torch.cat([g.flatten() for g in some]))
            for gradient, found in zip(some, flat.split([g.numel() for g in some]), strict=True):
                gradient.copy_(found.view(gradient.shape))

    def __enter__(self) -> Self:
        if cut.current() is not None:
            raise ValueError("slabs: a block inside another one is not possible: leave the first")
        cut.set_current(self)
        self._mode.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._mode.__exit__(*exception)
        cut.set_current(None)

    # -- what layers and ops ask (medssm.ops.cut.Cut) --------------------------------------------------------------------------------------

    def whole(self, spatial: Sequence[int]) -> tuple[int, ...]:
        axis = self._axis(spatial)
        return *spatial[:axis], self.place(spatial[axis])[-1], *spatial[axis + 1 :]

    def first_row(self, spatial: Sequence[int]) -> tuple[int, int]:
        axis = self._axis(spatial)
        return axis, self.place(spatial[axis])[self.ranks.rank]

    def around(self, x: Tensor, dim: int, margin: int) -> Tensor | None:
        return None if dim - 1 != self._axis(x.shape[1:-1]) else self.margins(x, dim, margin, margin)

    def call(self, op: Any, tensors: tuple[Tensor | None, ...], **call: Any) -> tuple[Tensor, ...]:
        with self.closed():
            return scans.over_ranks(self, op, tensors, **call)

    # -- what functions and scans use ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Ops and functions on this rank's tensors alone."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def place(self, rows: int) -> list[int]:
        """The first row of every rank, and the number of all rows, of a map of which this rank has `rows`."""
        found = self._places.get(rows)
        if found is None:
            if any(bound * rows % self._own for bound in self.bounds):
                raise ValueError(f"x: expected rows that the ranks share as they share the input, {self._own} of {self.bounds[-1]}, got {rows}")
            found = self._places[rows] = [bound * rows // self._own for bound in self.bounds]
        return found

    def margins(self, x: Tensor, dim: int, before: int, after: int, fill: float = 0.0) -> Tensor:
        """The slab x with rows of the others around it, `fill` outside of the volume."""
        y: Tensor = _Margins.apply(self, x, dim, before, after, fill)
        return y

    @property
    def _own(self) -> int:
        """Rows of this rank's input."""
        return self.bounds[self.ranks.rank + 1] - self.bounds[self.ranks.rank]

    def _kept(self, slab: Tensor) -> int:
        """Rows of the whole map that lie over the volume."""
        return -(-self.shape[self.axis] * self.place(slab.shape[2 + self.axis])[-1] // self.bounds[-1])

    def _axis(self, spatial: Sequence[int]) -> int:
        """The cut axis of tokens: those of a map, or, where the first axis is cut, its voxels as a sequence."""
        if len(spatial) == self.dims:
            return self.axis
        if len(spatial) == 1 and self.axis == 0:
            return 0
        raise ValueError(f"axis: expected tokens (b, *spatial, …) with {self.dims} spatial axes, got {tuple(spatial)}, whose cut axis is not known")


class _Margins(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slabs: Slabs, x: Tensor, dim: int, before: int, after: int, fill: float) -> Tensor:
        ctx.slabs, ctx.dim, ctx.margins = slabs, dim, (before, after)
        begins = slabs.place(x.shape[dim])
        begin, end = begins[slabs.ranks.rank], begins[slabs.ranks.rank + 1]
        low, high = begin - before, end + after
        ctx.give, ctx.take = _overlaps(slabs, begins, before, after)
        received = slabs.ranks.swapped([x.narrow(dim, first, count) for first, count in ctx.give], [_resized(x, dim, count) for _, count in ctx.take])
        y = _empty_like(x, dim, high - low)
        y.narrow(dim, before, end - begin).copy_(x)
        for q, (first, count) in enumerate(ctx.take):
            if count and q != slabs.ranks.rank:
                y.narrow(dim, first, count).copy_(received[q])
        if low < 0:
            y.narrow(dim, 0, -low).fill_(fill)
        if high > begins[-1]:
            y.narrow(dim, begins[-1] - low, high - begins[-1]).fill_(fill)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        dim, rank, (before, after) = ctx.dim, ctx.slabs.ranks.rank, ctx.margins
        dx = dy.narrow(dim, before, dy.shape[dim] - before - after).clone()
        back = [dy.narrow(dim, first, count) for first, count in ctx.take]
        received = ctx.slabs.ranks.swapped(back, [_resized(dy, dim, count) for _, count in ctx.give])
        for q, (first, count) in enumerate(ctx.give):
            if count and q != rank:
                dx.narrow(dim, first, count).add_(received[q])
        return None, dx, None, None, None, None


def _overlaps(slabs: Slabs, begins: Sequence[int], before: int, after: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """For every rank (first row of this slab, how many) that it needs, and (first row of the slab with its margins, how many) that it gives."""
    rank = slabs.ranks.rank
    begin, end = begins[rank], begins[rank + 1]
    give, take = [], []
    for q, (a, b) in enumerate(itertools.pairwise(begins)):
        none = q == rank
        low, high = max(begin, a - before), min(end, b + after)
        give.append((low - begin, high - low) if high > low and not none else (0, 0))
        low, high = max(a, begin - before), min(b, end + after)
        take.append((low - (begin - before), high - low) if high > low and not none else (0, 0))
    return give, take


def _resized(x: Tensor, dim: int, count: int) -> tuple[int, ...]:
    return *x.shape[:dim], count, *x.shape[dim + 1 :]


def _empty_like(x: Tensor, dim: int, count: int) -> Tensor:
    """Of another size along `dim`, with channels last where x has them so."""
    shape = _resized(x, dim, count)
    if dim < 2 or x.stride(1) != 1 or math.prod(x.shape[2:]) == 1:
        return x.new_empty(shape)
    return x.new_empty(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
