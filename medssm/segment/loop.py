"""The training loop: Lightning Fabric for devices, processes and precision, a schedule by steps or seconds, and a stop that loses nothing.

The state of a training is the number of steps, the seconds spent, the weights and the optimizer. Patch i and the random numbers of step i depend
only on the seed and on i. So a training that is resumed from a checkpoint gives the same result as one that was never stopped.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from medssm.errors import UserError
from medssm.files import first_line, write_at, write_bytes
from medssm.segment.averaging import WeightAverage
from medssm.segment.losses import finest_first
from medssm.segment.networks import BEST, memory_format, save_weights

CHECKPOINT, LOG = "checkpoint.pt", "metrics.jsonl"
_WARMUP = 20  # steps from a twentieth of the learning rate to all of it
_LOG_SECONDS = 2.0


@dataclass
class Progress:
    """How much of a training is done."""

    step: int = 0
    seconds: float = 0.0  # of the steps alone: reading, validating and saving are not counted


@dataclass(frozen=True)
class Budget:
    """When a training ends: after `steps`, or after `seconds` of steps, whichever comes first; None sets no limit."""

    steps: int | None
    seconds: float | None

    def fraction(self, done: Progress) -> float:
        """0 at the start, 1 at the end."""
        parts = [done.step / self.steps if self.steps else 0.0, done.seconds / self.seconds if self.seconds else 0.0]
        return min(1.0, max(parts))


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM stopped a training; it is saved."""


def learning_rate(peak: float, done: Progress, budget: Budget) -> float:
    """The learning rate of the next step: half a cosine from `peak` to 0 over the budget, times a linear warm-up over 20 steps."""
    warm = min(1.0, (done.step + 1) / _WARMUP)
    return peak * warm * 0.5 * (1 + math.cos(math.pi * budget.fraction(done)))


class Loop:
    """One training.

    Args:
        fabric: Lightning's, for devices, processes and precision
        network: gives logits (b, classes, *spatial), or a list of them with the finest first
        optimizer: of the network's parameters
        patches: patches[i] as `Patches` gives them
        criterion: (the network's output, label) -> a scalar loss
        out: folder for the checkpoint and the log
        batch: patches in a step, for each process
        lr: the learning rate at its peak
        clip: the gradients' largest norm
        budget: when the training ends
        seed: of dropout
        workers: processes that cut patches; 0 cuts them in this one
        save_seconds: seconds of steps between checkpoints
        ema: decay of the moving average of the weights, which is then what is validated and kept; None averages nothing
        settings: what a checkpoint must have been trained with to be resumed
    """

    def __init__(
        self,
        fabric: Fabric,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        patches: Dataset[dict[str, Any]],
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
        ema: float | None,
        settings: dict[str, Any],
    ):
        self.fabric, self.network, self.out, self.settings = fabric, network, out, settings
        self.batch, self.lr, self.clip, self.budget, self.seed, self.workers = batch, lr, clip, budget, seed, workers
        self.patches, self.save_seconds, self.criterion = patches, save_seconds, criterion
        self.average = None if ema is None else WeightAverage(network, ema)
        self.model, self.optimizer = fabric.setup(network, optimizer)
        self.done, self.log_bytes = Progress(), 0
        self.best: dict[str, float] = {}  # of the validations: the step and the mean Dice
        self.due = False  # whether a stop came before the validation of its step

    @property
    def trained(self) -> nn.Module:
        """The network with the weights that are validated and kept: the moving average's, where there is one."""
        return self.network if self.average is None else self.average.module

    def run(self, show: Callable[[float, str], None], validate: Callable[[], dict[str, float]], validations: int) -> dict[str, float]:
        """Train to the end of the budget.

        Args:
            show: is called after each step with the part of the budget that is spent, 0 to 1, and a text
            validate: gives the mean Dice of each class on the held-out cases
            validations: how often it is called, evenly over the budget and the last time at the end

        Returns:
            The last validation's result; {} without any.

        Raises:
            Interrupted: Ctrl-C or SIGTERM came; the training is saved.
            UserError: the loss or the gradient is not finite, or a file cannot be written.
        """
        marks = [(i + 1) / validations for i in range(validations)]
        marks = [mark for mark in marks if mark > self.budget.fraction(self.done)] or marks[-1:]
        self.model.train()
        if self.due and validations:
            self._validate(validate)
        losses: list[float] = []
        saved = logged = self.done.seconds  # times that all processes agree on
        with _stop_signals() as stop:
            batches = iter(self._loader())
            while self.budget.fraction(self.done) < 1:
                begun = time.perf_counter()
                losses.append(self._step(next(batches)))
                stopped = self._agree(time.perf_counter() - begun, stop.is_set())
                fraction = self.budget.fraction(self.done)
                show(fraction, f"step {self.done.step:,}, loss {losses[-1]:.3f}")
                if self.done.seconds - logged >= _LOG_SECONDS or fraction >= 1 or stopped:
                    self.log({"loss": sum(losses) / len(losses), "lr": self.optimizer.param_groups[0]["lr"]})
                    losses, logged = [], self.done.seconds
                self.due = bool(marks) and marks[0] <= fraction < 1
                if stopped:
                    self.save()
                    raise Interrupted(f"saved after {self.done.step} steps: go on with --resume")
                if self.due:
                    marks = [mark for mark in marks if mark > fraction]
                    self._validate(validate)
                if self.done.seconds - saved >= self.save_seconds:
                    self.save()
                    saved = self.done.seconds
            return self._validate(validate) if marks else {}

    def log(self, record: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl. Raises UserError if that fails; the file then keeps the lines that it had."""
        if not self.fabric.is_global_zero:
            return
        record = {"step": self.done.step, "seconds": round(self.done.seconds, 2), **record}
        self.log_bytes = write_at(self.out / LOG, self.log_bytes, (json.dumps(record) + "\n").encode())

    def save(self) -> None:
        """Write the checkpoint, whole or not at all. Raises UserError if that fails."""
        if self.fabric.is_global_zero:
            scaler = self._scaler()
            buffer = io.BytesIO()
            torch.save(
                {
                    "settings": self.settings,
                    "step": self.done.step,
                    "seconds": self.done.seconds,
                    "log_bytes": self.log_bytes,
                    "best": self.best,
                    "due": self.due,
                    "average": self.average.state_dict() if self.average else None,
                    "network": self.network.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": scaler.state_dict() if scaler else None,
                },
                buffer,
            )
            write_bytes(self.out / CHECKPOINT, buffer.getvalue())
        self.fabric.barrier()

    def resume(self) -> None:
        """Take up the state of the checkpoint in `out`, if there is one. Raises UserError if it is damaged or of another training."""
        path = self.out / CHECKPOINT
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0]})") from error
        try:
            before = state["settings"]
            other = [f"{key} {before.get(key)!r}, now {value!r}" for key, value in self.settings.items() if before.get(key) != value]
            if other:
                raise UserError(f"resume: {path} was trained with {'; '.join(other)}")
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average:
                self.average.load_state_dict(state["average"])
            if state["scaler"]:
                self._scaler().load_state_dict(state["scaler"])
            self.done, self.log_bytes, self.best = Progress(state["step"], state["seconds"]), state["log_bytes"], state["best"]
            self.due = state["due"]
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:  # RuntimeError: a network of other weights
            raise UserError(
                f"resume: {path} was not written by this version of medssm train ({first_line(error)}): train anew with --overwrite"
            ) from error

    def _scaler(self) -> Any:
        """The GradScaler of half precision; None without one."""
        return getattr(self.fabric.strategy.precision, "scaler", None)

    def _step(self, batch: dict[str, Any]) -> float:
        """One step of the optimizer; returns its loss."""
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
        norm: Any = self.fabric.clip_gradients(self.model, self.optimizer, max_norm=self.clip, error_if_nonfinite=False)
        if not math.isfinite(norm.item()) and not self._scaler():  # a scaler skips such a step itself
            raise self._not_finite("gradient's norm", norm.item(), output, batch)
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.network)
        return value

    def _not_finite(self, what: str, value: float, output: Tensor | Sequence[Tensor], batch: dict[str, Any]) -> UserError:
        finest = finest_first(output, batch["label"].ndim)[0]
        guilty = [case for case, logits in zip(batch["case"], finest, strict=True) if not torch.isfinite(logits).all()] or batch["case"]
        return UserError(f"training: the {what} is {value} at step {self.done.step + 1}, case {', '.join(sorted(set(guilty)))}")

    def _agree(self, seconds: float, stop: bool) -> bool:
        """Count the step and return whether to stop. All processes use the slowest one's time, and all stop if one was told to."""
        if self.fabric.world_size > 1:
            votes: Any = self.fabric.all_reduce(torch.tensor([seconds, float(stop)], device=self.fabric.device), reduce_op="max")
            seconds, stop = votes.tolist()
        self.done = Progress(self.done.step + 1, self.done.seconds + seconds)
        return bool(stop)

    def _validate(self, validate: Callable[[], dict[str, float]]) -> dict[str, float]:
        self.trained.eval()
        result = validate()
        self.model.train()
        self.due = False
        self.log({"validation": result})
        if not self.best or result["mean"] > self.best["mean"]:
            self.best = {"step": self.done.step, "mean": result["mean"]}
            if self.fabric.is_global_zero:
                save_weights(self.out / BEST, self.trained)
        return result

    def _loader(self) -> DataLoader[dict[str, Any]]:
        sampler = _FromStep(self.done.step, self.batch, self.fabric.global_rank, self.fabric.world_size)
        return DataLoader(
            self.patches,
            batch_size=self.batch,
            sampler=sampler,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.fabric.device.type == "cuda",
            persistent_workers=self.workers > 0,
        )


class _FromStep(Sampler[int]):
    """The indices of this process's patches from a step on, without end: each step has batch * world indices, rank after rank."""

    def __init__(self, step: int, batch: int, rank: int, world: int):
        self.step, self.batch, self.rank, self.world = step, batch, rank, world

    def __iter__(self) -> Iterator[int]:
        step = self.step
        while True:
            first = (step * self.world + self.rank) * self.batch
            yield from range(first, first + self.batch)
            step += 1


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "image": torch.stack([s["image"] for s in samples]),
        "label": torch.stack([s["label"] for s in samples]),
        "case": [s["case"] for s in samples],
    }


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; a second one acts as usual. Only the main thread can receive signals."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
