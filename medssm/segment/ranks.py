"""Class probabilities of a whole volume over several processes: each runs the network on a slab (medssm.parallel)."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from medssm.errors import UserError
from medssm.parallel import RankError, Slabs, layers, start
from medssm.parallel.group import is_of_ranks, said
from medssm.scratch import Scratch, Store
from medssm.segment.inference import activated, mirrorings, stored_scaling
from medssm.segment.losses import finest_first
from medssm.segment.preprocess import Fitted

_IDLE = timedelta(days=7)  # how long a rank waits for the next volume


@dataclass(frozen=True)
class _Volume:
    """What rank 0 says of a volume before it sends the slabs. network: which one. None in its place is the end."""

    network: int
    shape: tuple[int, int, int, int]  # (channels, x, y, z)
    half: torch.dtype | None


class Ranks:
    """The processes that run networks on slabs of the volumes that rank 0 has.

    Args:
        networks: the same on all ranks, in eval mode
        device: where they are
    """

    def __init__(self, networks: Sequence[nn.Module], device: torch.device) -> None:
        self.networks, self.device = list(networks), device
        with said():
            self._words = dist.new_group(backend="gloo", timeout=_IDLE)

    @torch.inference_mode()
    def probabilities(
        self,
        network: nn.Module,
        image: Store,
        fitted: Fitted,
        scratch: Scratch,
        *,
        half: torch.dtype | None = None,
        mirror: bool | tuple[int, ...] = False,
        show: Callable[[float], None] = lambda fraction: None,
    ) -> Store:
        """Rank 0: probabilities (x, outputs, y, z) of an image, as the network gives them for the whole volume; as `streamed_probabilities`."""
        x, channels, y, z = image.shape
        mirrored, scale = mirrorings(fitted, mirror), stored_scaling(image, fitted)
        sums = scratch.store(x, len(fitted.outputs), y, z)
        volume = _Volume(next(i for i, one in enumerate(self.networks) if one is network), (channels, x, y, z), half)
        for i, (axes, order) in enumerate(mirrored):

            def read(rows: slice, axes: tuple[int, ...] = axes) -> Tensor:
                return scale(image[_turned(rows, x, axes)].movedim(1, 0).flip([1 + axis for axis in axes]))[None]

            for rows, logits in self._run(volume, read):
                found = activated(logits[0].float(), fitted, 0).flip([1 + axis for axis in axes])
                sums.add((_turned(rows, x, axes),), found.movedim(0, 1)[:, order] / len(mirrored))
            show((i + 1) / len(mirrored))
        return sums

    def serve(self) -> None:
        """The other ranks: compute what rank 0 asks for, until it says that this is the end."""
        while (volume := self._told()) is not None:
            with torch.inference_mode():
                for _ in self._run(volume, None):
                    pass

    def end(self) -> None:
        """Rank 0: no more volumes."""
        self._told()

    def _told(self, volume: _Volume | None = None) -> _Volume | None:
        """What rank 0 says."""
        word = [volume]
        with said():
            dist.broadcast_object_list(word, 0, self._words)
        return word[0]

    def _run(self, volume: _Volume, read: Callable[[slice], Tensor] | None) -> Iterator[tuple[slice, Tensor]]:
        """On rank 0 the rows and the logits (1, classes, rows, y, z) of every slab; on the others nothing."""
        network, (channels, *spatial) = self.networks[volume.network], volume.shape
        try:
            slabs = Slabs(network, spatial)
        except ValueError as error:  # on rank 0, before the others know of the volume
            raise UserError(f"ranks: {error}") from error
        ranks = slabs.ranks
        rows = [slice(low, min(high, spatial[0])) for low, high in zip(slabs.bounds, slabs.bounds[1:], strict=False)]
        empty = torch.empty(0, device=self.device)
        if read is not None:
            self._told(volume)
            sends = [read(some).to(self.device) for some in rows]
        else:
            sends = [empty] * ranks.count
        sizes = [(1, channels, rows[ranks.rank].stop - rows[ranks.rank].start, *spatial[1:]) if q == 0 else (0,) for q in range(ranks.count)]
        slab = ranks.swapped(sends, sizes)[0]
        with slabs, torch.autocast(self.device.type, dtype=volume.half, enabled=volume.half is not None):
            logits = slabs.crop(finest_first(network(slabs.padded(slab)), slab.ndim)[0])
        sends = [logits if q == 0 else logits.new_empty(0) for q in range(ranks.count)]
        sizes = [(*logits.shape[:2], some.stop - some.start, *logits.shape[3:]) if ranks.rank == 0 else (0,) for some in rows]
        received = ranks.swapped(sends, sizes)
        if ranks.rank == 0:
            yield from zip(rows, received, strict=True)


def check(network: nn.Module, fitted: Fitted) -> None:
    """Raise UserError where a network cannot run over ranks."""
    if fitted.slice_axis is not None:
        raise UserError("ranks: a network in two dimensions sees one slice at a time: leave --ranks out")
    try:
        layers.check(network)
    except ValueError as error:
        raise UserError(f"ranks: {error}: leave --ranks out") from error


@contextlib.contextmanager
def ranks(
    count: int, load: Callable[..., list[nn.Module]], arguments: tuple[Any, ...], networks: Sequence[nn.Module], timeout: float
) -> Iterator[Ranks]:
    """Rank 0's `Ranks` of `count` processes: this one, and others on this machine, which load(*arguments) the networks themselves.

    Under torchrun the processes are its own, and this is rank 0 of them. Raises UserError where a rank ends or is late.
    """
    device = next(networks[0].parameters()).device
    threads = torch.get_num_threads()
    others: list[Any] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            if "WORLD_SIZE" in os.environ:
                start(timeout)
                if dist.get_world_size() != count:
                    raise UserError(f"ranks: expected {dist.get_world_size()}, as torchrun started, got {count}")
            else:
                torch.set_num_threads(max(1, threads // count))
                given = (count, folder, timeout, torch.get_num_threads(), load, arguments, os.getpid())
                others = mp.start_processes(_serve, given, nprocs=count - 1, join=False, start_method="spawn").processes
                _join(folder, 0, count, timeout, lambda: next((i + 1 for i, other in enumerate(others) if not other.is_alive()), None))
            every = Ranks(networks, device)
            yield every
            every.end()
            for other in others:
                other.join(timeout)
    except RuntimeError as error:
        if not is_of_ranks(error):
            raise
        raise UserError(f"ranks: {error}: the cases that were written stay, --skip-existing goes on after them") from error
    finally:
        for other in others:
            other.kill()  # it may be stopped
        torch.set_num_threads(threads)
        if dist.is_initialized():
            dist.destroy_process_group()


def joined(load: Callable[..., list[nn.Module]], arguments: tuple[Any, ...], timeout: float) -> bool:
    """Whether this process is another rank than 0 of torchrun's; it has then served rank 0 to the end.

    Raises UserError, or where another rank says it SystemExit, if a rank ends or is late.
    """
    if int(os.environ.get("RANK", 0)) == 0:
        return False
    start(timeout)
    try:
        _serve_all(load(*arguments))
    except RankError as error:
        if not error.first:
            raise SystemExit(2) from error
        raise UserError(f"ranks: {error}") from error
    return True


def _serve(
    index: int, count: int, folder: str, timeout: float, threads: int, load: Callable[..., list[nn.Module]], arguments: tuple[Any, ...], first: int
) -> None:
    """Another process of this machine. first: the process of rank 0, which ends this one where it fails itself."""
    torch.set_num_threads(threads)
    try:
        networks = load(*arguments)
        _join(folder, index + 1, count, timeout, lambda: None if os.getppid() == first else 0)
        _serve_all(networks)
    except (RankError, KeyboardInterrupt) as error:  # torch.multiprocessing interrupts it when rank 0 has ended
        if isinstance(error, RankError) and error.first:
            print(f"ranks: {error}", file=sys.stderr)
        elif os.getppid() != first:
            print(f"ranks: rank {index + 1}: rank 0 of {count} has ended", file=sys.stderr)
        os._exit(2)


def _join(folder: str, rank: int, count: int, timeout: float, ended: Callable[[], int | None]) -> None:
    """Begin the group when all ranks have loaded their networks. ended: a rank whose process has ended, or None."""
    Path(folder, f"ready-{rank}").touch()
    while not all(Path(folder, f"ready-{q}").exists() for q in range(count)):
        gone = ended()
        if gone is not None:
            raise RankError(f"rank {rank}: rank {gone} of {count} has ended")
        time.sleep(0.02)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count, timeout=timedelta(seconds=timeout))


def _serve_all(networks: list[nn.Module]) -> None:
    Ranks(networks, next(networks[0].parameters()).device).serve()
    dist.destroy_process_group()


def _turned(rows: slice, length: int, axes: tuple[int, ...]) -> slice:
    """The rows that a mirroring of these axes brings to `rows`."""
    return slice(length - rows.stop, length - rows.start) if 0 in axes else rows
