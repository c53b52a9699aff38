"""A volume of which this process holds a slab: what ops and layers ask where their result depends on more than the slab.

medssm.parallel sets it while its block is open. Without it a slab is the whole volume.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class Cut(Protocol):
    """One axis of all maps is cut; every process has a slab of each."""

    def whole(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """The shape of the volume of which this process has a slab (*spatial)."""

    def first_row(self, spatial: Sequence[int]) -> tuple[int, int]:
        """(the cut axis, the row of the volume at which the slab (*spatial) begins)."""

    def around(self, x: Tensor, dim: int, margin: int) -> Tensor | None:
        """The slab (b, *spatial, c) with `margin` more rows of the volume on both sides along dimension `dim`, zeros outside of the volume; None
        where that dimension is not cut."""

    def call(self, op: Any, tensors: tuple[Tensor | None, ...], **call: Any) -> tuple[Tensor, ...]:
        """(output, states…) of an op on slabs: what Op.__call__ would compute of the whole volume, this process's rows of it."""


_open: dict[int, Cut] = {}  # by thread


def current() -> Cut | None:
    """The cut of this thread."""
    return _open.get(threading.get_ident()) if _open else None


def set_current(cut: Cut | None) -> None:
    """Begin or, with None, end a cut in this thread."""
    if cut is None:
        _open.pop(threading.get_ident(), None)
    else:
        _open[threading.get_ident()] = cut


def whole(spatial: Sequence[int]) -> Sequence[int]:
    """The shape of the volume of which (*spatial) is this process's slab."""
    cut = current()
    return spatial if cut is None else cut.whole(spatial)
