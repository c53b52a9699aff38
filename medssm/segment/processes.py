"""The processes of a training: where one of them ends or is late, the others end with one clear line, and the last checkpoint stays.

Lightning starts them. A process that waits for another one in an exchange gets an error of torch.distributed. One that is far from its next exchange,
as in a validation, is ended by a thread that watches the others.
"""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment

from medssm.errors import UserError
from medssm.parallel.group import is_of_ranks, of_absent
from medssm.segment.loop import CHECKPOINT

_GRACE = 5.0  # seconds in which a process finds by itself that another one has ended
Given = ParamSpec("Given")
Found = TypeVar("Found")


def over_processes(train: Callable[Given, Found]) -> Callable[Given, Found]:
    """A function that trains into its argument `out`; UserError ends it where another process has ended or is late."""

    @functools.wraps(train)
    def trained(*args: Given.args, **kwargs: Given.kwargs) -> Found:
        try:
            found = train(*args, **kwargs)
            if _watches():
                dist.barrier()  # the watch of another process must not take the end of this one for an early one
            return found
        except RuntimeError as error:
            if not (dist.is_initialized() and is_of_ranks(error)):
                raise
            absent = of_absent(error)
            if not absent.first:
                raise SystemExit(2) from error
            raise UserError(f"{absent}{_further(Path(inspect.signature(train).bind(*args, **kwargs).arguments['out']))}") from error
        finally:
            for watch in _watches():
                watch.end(sys.exc_info()[1])

    return trained


def launch(fabric: Fabric, out: Path, timeout: float) -> None:
    """Start the other processes, and watch them. timeout: seconds that one waits for another one in an exchange."""
    fabric.launch()
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout))
    if fabric.world_size > 1 and isinstance(getattr(fabric.strategy, "cluster_environment", None), LightningEnvironment):
        for thread in threading.enumerate():
            if thread.name == "child-process-observer":  # Lightning's, which kills this process before it can say anything
                thread._terminate_all = lambda: None  # type: ignore[attr-defined]
        _Watch(getattr(fabric.strategy.launcher, "procs", []), fabric.global_rank, fabric.world_size, out).start()


class _Watch(threading.Thread):
    """Ends this process when another one on this machine has ended some seconds ago. others: those that this one started, as rank 0."""

    def __init__(self, others: Sequence[subprocess.Popen[bytes]], rank: int, count: int, out: Path) -> None:
        super().__init__(daemon=True)
        self.others, self.rank, self.count, self.out, self.parent = others, rank, count, out, os.getppid()
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.5):
            gone = next((i + 1 for i, other in enumerate(self.others) if other.poll()), None)
            if self.rank and os.getppid() != self.parent:
                gone = 0
            if gone is not None and not self.over.wait(_GRACE):
                print(f"rank {self.rank}: rank {gone} of {self.count} has ended{_further(self.out)}", file=sys.stderr, flush=True)
                self._end_others()
                os._exit(2)

    def end(self, error: BaseException | None) -> None:
        """The training is over, or an error has ended it: then the others wait in vain."""
        self.over.set()
        if isinstance(error, Exception):
            self._end_others()

    def _end_others(self) -> None:
        for other in self.others:
            other.kill()  # it may be stopped


def _watches() -> list[_Watch]:
    return [thread for thread in threading.enumerate() if isinstance(thread, _Watch)]


def _further(out: Path) -> str:
    """What to do."""
    checkpoint = out / CHECKPOINT
    return f": go on with --resume from {checkpoint}" if checkpoint.exists() else ": no checkpoint was written yet, train again"
