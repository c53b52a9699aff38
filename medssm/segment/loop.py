"""The training loop: Lightning Fabric for devices, processes and precision, a schedule by steps or seconds, and a stop without loss.

The state of a training is the number of steps, the seconds spent and the weights: patch i and the random numbers of step i depend on
the seed and i alone. So what goes on from a checkpoint does what it would have done.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from medssm.errors import UserError
from medssm.files import write_at, write_bytes
from medssm.segment.losses import finest_first
from medssm.segment.networks import memory_format

CHECKPOINT, LOG = "checkpoint.pt", "metrics.jsonl"
_WARMUP = 20  # steps from a twentieth of the learning rate to all of it
_LOG_SECONDS = 2.0


@dataclass
class Progress:
    """How far a training is."""

    step: int = 0
    seconds: float = 0.0  # in steps alone: reading, validating and saving are not counted


@dataclass(frozen=True)
class Budget:
    """When a training ends: after `steps` or `seconds` of work, whichever comes first."""

    steps: int | None
    seconds: float | None

    def fraction(self, done: Progress) -> float:
        """0 at the start, 1 at the end."""
        parts = [done.step / self.steps if self.steps else 0.0, done.seconds / self.seconds if self.seconds else 0.0]
        return min(1.0, max(parts))


class Interrupted(KeyboardInterrupt):
    """A training that was told to stop has stopped, and is saved."""


def learning_rate(peak: float, done: Progress, budget: Budget) -> float:
    """A linear warm-up, then half a cosine from `peak` to 0 over the budget."""
    warm = min(1.0, (done.step + 1) / _WARMUP)
    return peak * warm * 0.5 * (1 + math.cos(math.pi * budget.fraction(done)))


class Loop:
    """One training: `run()` goes to the end of the budget, or raises Interrupted (saved) or UserError (a loss that is not finite)."""

    def __init__(
        self,
        fabric: Fabric,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        patches: Dataset,
        criterion: nn.Module,
        out: Path,
        *,
        batch: int,
        lr: float,
        clip: float,
        budget: Budget,
        seed: int,
        workers: int,
        save_seconds: float,
        settings: dict,
    ):
        self.fabric, self.network, self.out, self.settings = fabric, network, out, settings
        self.batch, self.lr, self.clip, self.budget, self.seed, self.workers = batch, lr, clip, budget, seed, workers
        self.patches, self.save_seconds, self.criterion = patches, save_seconds, criterion
        self.model, self.optimizer = fabric.setup(network, optimizer)
        self.done, self.log_bytes = Progress(), 0

    def run(self, show: Callable[[float, str], None], validate: Callable[[], dict], validations: int) -> dict:
        """Train to the end of the budget; validate at even parts of it. Returns the last one's result."""
        marks = [(i + 1) / validations for i in range(validations)]
        marks = [mark for mark in marks if mark > self.budget.fraction(self.done)] or marks[-1:]
        self.model.train()
        losses, saved, logged = [], self.done.seconds, self.done.seconds  # times that all processes agree on
        with _stop_signals() as stop:
            batches = iter(self._loader())
            while self.budget.fraction(self.done) < 1:
                begun = time.perf_counter()
                losses.append(self._step(next(batches)))
                stopped = self._agree(time.perf_counter() - begun, stop.is_set())
                fraction = self.budget.fraction(self.done)
                show(fraction, f"loss {losses[-1]:.3f}")
                if self.done.seconds - logged >= _LOG_SECONDS or fraction >= 1 or stopped:
                    self.log({"loss": sum(losses) / len(losses), "lr": self.optimizer.param_groups[0]["lr"]})
                    losses, logged = [], self.done.seconds
                if stopped:
                    self.save()
                    raise Interrupted(f"saved after {self.done.step} steps: go on with --resume")
                if marks and marks[0] <= fraction < 1:
                    marks = [mark for mark in marks if mark > fraction]
                    self._validate(validate)
                if self.done.seconds - saved >= self.save_seconds:
                    self.save()
                    saved = self.done.seconds
            return self._validate(validate) if marks else {}

    def log(self, record: dict) -> None:
        """Add a line to metrics.jsonl; where the disk is full the file keeps the lines it had."""
        if not self.fabric.is_global_zero:
            return
        record = {"step": self.done.step, "seconds": round(self.done.seconds, 2), **record}
        self.log_bytes = write_at(self.out / LOG, self.log_bytes, (json.dumps(record) + "\n").encode())

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        if self.fabric.is_global_zero:
            scaler = getattr(self.fabric.strategy.precision, "scaler", None)
            buffer = io.BytesIO()
            torch.save(
                {
                    "settings": self.settings,
                    "step": self.done.step,
                    "seconds": self.done.seconds,
                    "log_bytes": self.log_bytes,
                    "network": self.network.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": scaler.state_dict() if scaler else None,
                },
                buffer,
            )
            write_bytes(self.out / CHECKPOINT, buffer.getvalue())
        self.fabric.barrier()

    def resume(self) -> None:
        """Go on from the checkpoint in `out`, if there is one; UserError where it belongs to another training."""
        path = self.out / CHECKPOINT
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0]})") from error
        before = state["settings"]
        other = [f"{key} {before.get(key)!r}, now {value!r}" for key, value in self.settings.items() if before.get(key) != value]
        if other:
            raise UserError(f"resume: {path} was trained with {'; '.join(other)}")
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.fabric.strategy.precision.scaler.load_state_dict(state["scaler"])
        self.done, self.log_bytes = Progress(state["step"], state["seconds"]), state["log_bytes"]

    def _step(self, batch: dict) -> float:
        rank, world = self.fabric.global_rank, self.fabric.world_size
        torch.manual_seed((self.seed * 1_000_003 + self.done.step) * world + rank)  # dropout, the same after a stop
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.lr, self.done, self.budget)
        image = self.fabric.to_device(batch["image"]).contiguous(memory_format=memory_format(batch["image"].ndim - 2))
        label = self.fabric.to_device(batch["label"])
        self.optimizer.zero_grad(set_to_none=True)
        output = self.model(image)
        loss = self.criterion(output, label)
        value = loss.item()
        if not math.isfinite(value):
            raise self._not_finite("loss", value, output, batch)
        self.fabric.backward(loss)
        norm = self.fabric.clip_gradients(self.model, self.optimizer, max_norm=self.clip, error_if_nonfinite=False)
        if not torch.isfinite(norm) and not getattr(self.fabric.strategy.precision, "scaler", None):  # a scaler skips such a step itself
            raise self._not_finite("gradient's norm", norm.item(), output, batch)
        self.optimizer.step()
        return value

    def _not_finite(self, what: str, value: float, output, batch: dict) -> UserError:
        finest = finest_first(output, batch["label"].ndim)[0]
        guilty = [case for case, logits in zip(batch["case"], finest, strict=True) if not torch.isfinite(logits).all()] or batch["case"]
        return UserError(f"training: the {what} is {value} at step {self.done.step + 1}, case {', '.join(sorted(set(guilty)))}")

    def _agree(self, seconds: float, stop: bool) -> bool:
        """Count the step; every process goes by the slowest clock and stops with the first that was told to."""
        if self.fabric.world_size > 1:
            votes = torch.tensor([seconds, float(stop)], device=self.fabric.device)
            seconds, stop = self.fabric.all_reduce(votes, reduce_op="max").tolist()
        self.done = Progress(self.done.step + 1, self.done.seconds + seconds)
        return bool(stop)

    def _validate(self, validate: Callable[[], dict]) -> dict:
        self.model.eval()
        result = validate()
        self.model.train()
        self.log({"validation": result})
        return result

    def _loader(self) -> DataLoader:
        sampler = _FromStep(self.done.step, self.batch, self.fabric.global_rank, self.fabric.world_size)
        loader = DataLoader(
            self.patches,
            batch_size=self.batch,
            sampler=sampler,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.fabric.device.type == "cuda",
            persistent_workers=self.workers > 0,
        )
        return loader


class _FromStep(Sampler):
    """The indices of this process's patches from a step on: step s has batch * world of them, rank after rank, without end."""

    def __init__(self, step: int, batch: int, rank: int, world: int):
        self.step, self.batch, self.rank, self.world = step, batch, rank, world

    def __iter__(self) -> Iterator[int]:
        step = self.step
        while True:
            first = (step * self.world + self.rank) * self.batch
            yield from range(first, first + self.batch)
            step += 1


def _collate(samples: list[dict]) -> dict:
    return {
        "image": torch.stack([s["image"] for s in samples]),
        "label": torch.stack([s["label"] for s in samples]),
        "case": [s["case"] for s in samples],
    }


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; the second time they act as ever. Only the main thread may listen."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number, frame):
        stop.set()
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
