"""The memory of a training step, measured: forward, loss, backward and optimizer really run."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import psutil
import torch
from lightning.fabric import Fabric
from torch import nn

from medssm.allocator import give_memory_back
from medssm.errors import UserError
from medssm.segment import networks
from medssm.segment.train import optimizer_for

_EVERY = 0.002  # seconds between two looks at the resident memory


def step_memory(make: Callable[[], nn.Module], criterion: nn.Module, fabric: Fabric, shape: Sequence[int], classes: int) -> tuple[int | None, float]:
    """(the bytes that training takes at its peak, None where there are not enough; the seconds of a step).

    It counts the weights, gradients and state of the optimizer, feature maps and workspaces: on a GPU what PyTorch holds of its memory, on a CPU by
    how much the resident memory of this process grows.

    Args:
        make: builds the network
        criterion: (its output, label) -> a loss
        fabric: Lightning's, for the device and the precision
        shape: of the input, (b, channels, *spatial)
        classes: their number

    Raises:
        UserError: the network does not take the shape.
    """
    device, seconds = fabric.device, 0.0
    with _peak(device) as peak:
        try:
            network = networks.placed(make(), device, len(shape) - 2)
            model, optimizer = fabric.setup(network, optimizer_for("adamw", network, 1e-3, 1e-2))
            for parameter in network.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()  # so that it has its state
            optimizer.zero_grad(set_to_none=True)
            image = torch.randn(*shape, device=device).contiguous(memory_format=networks.memory_format(len(shape) - 2))
            label = torch.randint(classes, (shape[0], 1, *shape[2:]), device=device)
            begun = time.perf_counter()
            fabric.backward(criterion(model(image), label))
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - begun
        except (MemoryError, torch.OutOfMemoryError):
            return None, seconds
        except RuntimeError as error:
            if "memory" in str(error):  # of PyTorch's allocator for the CPU
                return None, seconds
            raise UserError(f"patch: the model does not take {tuple(shape[2:])}: {str(error).splitlines()[0]}") from error
        except ValueError as error:
            raise UserError(f"patch: the model does not take {tuple(shape[2:])}: {str(error).splitlines()[0]}") from error
    return peak[0], seconds


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[list[int]]:
    """Yields a list whose one number is, after the block, by how many bytes memory grew at most."""
    gc.collect()
    found = [0]
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found[0] = torch.cuda.max_memory_reserved(device) - before
        return
    give_memory_back()
    process, ended = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not ended.wait(_EVERY):
            found[0] = max(found[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
        found[0] = max(found[0], process.memory_info().rss - before)
    finally:
        ended.set()
        watcher.join()
