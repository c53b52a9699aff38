"""Class probabilities of a whole volume at once, without windows: the network runs over slabs, in bounded memory (medssm.nn.streaming)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from medssm.errors import UserError
from medssm.nn.streaming import WORK, Needs, View, needs, streamed
from medssm.scratch import Scratch, Store
from medssm.segment.inference import activated, mirrorings, stored_scaling
from medssm.segment.preprocess import Fitted

_SLAB = (2**16, 2**25)  # the fewest and the most bytes of a slab


@torch.inference_mode()
def streamed_probabilities(
    network: nn.Module,
    image: Store,
    fitted: Fitted,
    scratch: Scratch,
    *,
    device: torch.device,
    half: torch.dtype | None = None,
    mirror: bool | tuple[int, ...] = False,
    say: Callable[[str], None] = lambda line: None,
    show: Callable[[float], None] = lambda fraction: None,
) -> Store:
    """Probabilities (x, outputs, y, z) of an image, as the network gives them for the whole volume; arguments as `stored_probabilities`.

    say: is called with a line on what is needed, before it starts

    Raises UserError where the network cannot be streamed, or where memory and the disk have no room for its maps.
    """
    x, channels, y, z = image.shape
    slab = int(min(max(scratch.memory / WORK, _SLAB[0]), _SLAB[1]))
    needed = check_streamed(network, fitted, (x, y, z), slab)
    mirrored, outputs = mirrorings(fitted, mirror), len(fitted.outputs)
    room = needed.maps + 4 * outputs * x * y * z
    scratch.check(room)
    where = "memory" if room <= scratch.memory else f"memory and files in {scratch.folder}"
    size = f"{x} x {y} x {z} voxels"
    say(f"{scratch.name}: streams {size}: {room / 2**30:.2g} GiB of maps in {where}, beside them at most {needed.memory / 2**30:.2g} GiB of memory")
    scale, sums = stored_scaling(image, fitted), scratch.store(x, outputs, y, z)
    for i, (axes, order) in enumerate(mirrored):

        def read(rows: slice, axes: tuple[int, ...] = axes) -> Tensor:
            return scale(image[_turned(rows, x, axes)].movedim(1, 0).flip([1 + axis for axis in axes])).movedim(0, -1)

        def show_written(written: int, i: int = i) -> None:
            show((i + written / needed.written) / len(mirrored))

        with _refused_by_name(), torch.autocast(device.type, dtype=half, enabled=half is not None):
            logits = streamed(network, View((x, y, z, channels), read), scratch, slab=slab, show=show_written)
        for rows in sums.slabs():
            found = activated(logits[_turned(rows, x, axes)].float(), fitted, -1).flip(axes)
            sums.add((rows,), found.movedim(-1, 1)[:, order] / len(mirrored))
        logits.close()
    return sums


def check_streamed(network: nn.Module, fitted: Fitted, spatial: tuple[int, ...], slab: int = _SLAB[1]) -> Needs:
    """What streaming a volume needs. Raises UserError where the network cannot be streamed."""
    if fitted.slice_axis is not None:
        raise UserError("stream: a network in two dimensions sees one slice at a time: leave --stream out")
    with _refused_by_name():
        return needs(network, spatial, len(fitted.channels), slab)


@contextlib.contextmanager
def _refused_by_name() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UserError(f"stream: {error}: leave --stream out") from error


def _turned(rows: slice, length: int, axes: tuple[int, ...]) -> slice:
    """The rows that a mirroring of these axes brings to `rows`."""
    return slice(length - rows.stop, length - rows.start) if 0 in axes else rows
