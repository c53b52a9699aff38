"""What the ranks of a torch.distributed group give each other: parts of tensors, and sums. Gradients go the way back."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from medssm.files import first_line

_ROLL_CALL = 5.0  # seconds in which ranks that wait for the same one give up


class RankError(RuntimeError):
    """Another rank has ended, or was late. first: whether this rank is the first of those that say so, where one line is enough."""

    def __init__(self, message: str, first: bool = True) -> None:
        super().__init__(message)
        self.first = first


def is_of_ranks(error: BaseException) -> bool:
    """Whether an error says that another rank has ended, or was late."""
    return isinstance(error, (RankError, dist.DistError)) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def absent() -> tuple[list[int], bool]:
    """(the ranks that have ended or are late, whether this one is the first of those that are there). To be called where an exchange has failed.

    Every rank that gives up says so in the store of the group. Those that do not say it within some seconds are the ones that the others wait for.
    """
    rank, count = dist.get_rank(), dist.get_world_size()
    there, failed = {rank}, threading.Event()
    store = dist.distributed_c10d._get_default_store()

    def call() -> None:
        try:
            store.set(f"medssm/there/{rank}", "")
            until = time.monotonic() + _ROLL_CALL
            while len(there) < count - 1 and time.monotonic() < until:
                time.sleep(0.05)
                there.update(q for q in range(count) if q not in there and store.check([f"medssm/there/{q}"]))
        except RuntimeError:  # rank 0 holds the store
            failed.set()

    asking = threading.Thread(target=call, daemon=True)  # where rank 0 is stopped its store does not answer
    asking.start()
    asking.join(_ROLL_CALL + 1)
    missing = [0] if rank and (failed.is_set() or asking.is_alive()) else [q for q in range(count) if q not in there]
    return missing, min(there) == rank


def start(timeout: float = 600.0, backend: str | None = None) -> None:
    """Join the processes that torchrun started; without torchrun, begin a group of this process alone. docs/guides/ranks.md has the lines to start.

    Args:
        timeout: seconds after which a rank that waits for another one gives up with RankError
        backend: gloo or nccl (default: nccl where there is a GPU; it has not been run yet)
    """
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except (RuntimeError, dist.DistError) as error:
        raise RankError(f"joining the group: another rank has ended, or did not come in time ({_reason(error)})") from error


class Ranks:
    """The processes of a group, as `Slabs` uses them."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_initialized():
            raise ValueError("group: expected an initialized torch.distributed, got none: call medssm.parallel.start() under torchrun")
        self.group: Any = dist.group.WORLD if group is None else group
        self.rank, self.count = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError("group: expected one that this process belongs to, got another one")

    def exchange(self, sends: Sequence[Tensor], shapes: Sequence[Sequence[int]], through: Sequence[Tensor] = ()) -> tuple[list[Tensor], list[Tensor]]:
        """(received, through): sends[q] goes to rank q, what comes from it has shapes[q]; sends[own rank] stays. All are of one type.

        through: tensors that only pass. Backward sends gradients to where the tensors came from, so it must run on every rank. A rank that sends
        nothing with a gradient must pass a tensor that has one; a rank that receives nothing must compute its result from one that passed.
        """
        found = _Exchange.apply(self, [tuple(shape) for shape in shapes], len(sends), *sends, *through)
        return list(found[: self.count]), list(found[self.count :])

    def total(self, x: Tensor) -> Tensor:
        """The sum over the ranks; its gradient is the sum of their gradients."""
        y: Tensor = _Total.apply(self, x)
        return y

    def swapped(self, sends: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """`exchange` without gradients."""
        like = sends[self.rank]
        received = [sends[q] if q == self.rank else like.new_empty(shape) for q, shape in enumerate(shapes)]
        messages = []
        for q in range(self.count):
            if q == self.rank:
                continue
            peer = dist.get_global_rank(self.group, q)
            if sends[q].numel():
                messages.append(dist.P2POp(dist.isend, sends[q].contiguous(), peer, self.group))
            if received[q].numel():
                messages.append(dist.P2POp(dist.irecv, received[q], peer, self.group))
        if messages:
            with said():
                for work in dist.batch_isend_irecv(messages):
                    work.wait()
        return received

    def add(self, x: Tensor) -> Tensor:
        """The sum over the ranks in place, without gradients."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def largest(self, x: Tensor) -> Tensor:
        """The largest values over the ranks in place, without gradients."""
        return self._reduced(x, dist.ReduceOp.MAX)

    def _reduced(self, x: Tensor, how: Any) -> Tensor:
        with said():
            dist.all_reduce(x, how, self.group)
        return x


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, shapes: list[tuple[int, ...]], count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        sends, through = tensors[:count], tensors[count:]
        ctx.ranks, ctx.shapes, ctx.like = ranks, [tuple(t.shape) for t in sends], sends[ranks.rank].new_empty(0)
        ctx.taken = shapes
        ctx.set_materialize_grads(False)
        received = ranks.swapped(sends, shapes)
        received[ranks.rank] = received[ranks.rank].view_as(received[ranks.rank])
        return *received, *(t.view_as(t) for t in through)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        count = ctx.ranks.count
        back = [ctx.like.new_zeros(shape) if g is None else g for g, shape in zip(gradients, ctx.taken, strict=False)]
        return None, None, None, *ctx.ranks.swapped(back, ctx.shapes), *gradients[count:]


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, x: Tensor) -> Tensor:
        ctx.ranks = ranks
        return ranks.add(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, ctx.ranks.add(gradient.clone(memory_format=torch.contiguous_format))


@contextlib.contextmanager
def said() -> Iterator[None]:
    """torch.distributed's errors as RankError, one clear line."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        if isinstance(error, RankError) or not is_of_ranks(error):
            raise
        raise of_absent(error) from error


def of_absent(error: BaseException) -> RankError:
    """The RankError that says which rank an error of torch.distributed comes from."""
    missing, first = absent()
    return RankError(f"rank {dist.get_rank()}: {named(missing)} ended, or did not answer in time ({_reason(error)})", first)


def named(ranks: Sequence[int]) -> str:
    """The subject of a sentence: "rank 1 of 4 has", "ranks 1, 3 of 4 have"."""
    numbers, count = ", ".join(map(str, ranks)), dist.get_world_size()
    return f"rank {numbers} of {count} has" if len(ranks) == 1 else f"ranks {numbers} of {count} have" if ranks else f"one of {count} ranks has"


def _reason(error: BaseException) -> str:
    """Of gloo's message what went wrong, without the place in its source and its advice."""
    return re.sub(r"^\[[^]]*\] ", "", first_line(error)).split(". ")[0]
