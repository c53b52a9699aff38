"""medssm bench --networks: every network at a stated input, inference and one training step, on our kernels, under bf16 autocast, compiled, and by
upstream's arithmetic in plain PyTorch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import medssm
from medssm.bench import apart, measure, peers
from medssm.models import model_facts

# The input for the reference backend, and for both peers in training: a full one takes minutes, and more memory than there is.
SMALL = {2: (64, 64), 3: (64, 32, 32)}
NATIVE, BF16, COMPILED = "native", "native, bf16", "native, compiled"
REFERENCE, PYTORCH = "reference backend", "upstream's arithmetic in PyTorch"
_LIMIT = 3.0  # a side whose call takes longer, in seconds, is timed once
Context: TypeAlias = Callable[[], AbstractContextManager[None]]


def network(name: str, quick: bool = False) -> dict[str, Any]:
    """A network's figures, measured in a process of its own: {"input", "classes", "parameters", "multiply_adds", "inference", "training",
    "memory", "small"}: seconds by side; bytes of one inference above the network's own; input, inference and training of a small input, on the
    reference backend too (None without scans)."""
    return apart.run("networks", name, str(int(quick)))


def build(name: str, quick: bool) -> tuple[nn.Module, torch.Tensor]:
    """The network with its default options, and its input (1, c, *spatial)."""
    facts = model_facts(name)
    channels, *spatial = facts.input
    if quick and name != "monai_unetr":
        spatial = [64] * len(spatial)
    torch.manual_seed(0)
    return medssm.create_model(name, len(spatial), channels, facts.classes), torch.randn(1, channels, *spatial)


def multiply_adds(model: nn.Module, x: torch.Tensor) -> int:
    """Of convolutions, matrix products and scans in one inference, counted without computing. The model loses its values."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval().to("meta")(x.to("meta"))
    return counter.get_total_flops() // 2


def main() -> None:
    """The other process: print the figures of the network that the command line names."""
    name, quick = sys.argv[1], sys.argv[2] == "1"
    threads = torch.get_num_threads()
    model, x = build(name, quick)
    scans = any(isinstance(part, (medssm.nn.Mamba, medssm.nn.SSND)) for part in model.modules())
    ways: dict[str, Context] = {NATIVE: nullcontext, BF16: _autocast, PYTORCH: peers.in_pytorch}
    model.eval()
    with torch.no_grad():
        memory = measure.peak_above(lambda: model(x))
    seconds = 0.1 if quick else 2.0
    sides = {way: _infer(model, x, context) for way, context in ways.items()} | _compiled(model, x)
    result = {
        "input": list(x.shape),
        "classes": model_facts(name).classes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "memory": memory,
        "threads": threads,
        "inference": measure.times(sides, seconds, threads, _LIMIT),
    }
    result["small"] = _small(model, x, seconds, threads) if scans else None
    model.train()
    ways.pop(PYTORCH)
    if x[0, 0].numel() > 64**3:  # two samples of these do not train in the memory of the machines that this is for
        ways = {}
    result["training"] = measure.times({way: _step(model, x, context) for way, context in ways.items()}, seconds, threads, _LIMIT)
    print(json.dumps(result | {"multiply_adds": multiply_adds(model, x)}))


def _compiled(model: nn.Module, x: torch.Tensor) -> dict[str, measure.Side]:
    """The compiled network's inference, its compilation done; nothing where it cannot be compiled, with the reason on standard error."""
    compiled = _infer(torch.compile(model), x, nullcontext)
    try:
        compiled()
    except Exception as error:  # whatever the compiler raises: the other ways are measured all the same
        print(f"not compiled: {error}", file=sys.stderr)
        return {}
    return {COMPILED: compiled}


def _small(model: nn.Module, x: torch.Tensor, seconds: float, threads: int) -> dict[str, Any]:
    """Inference and training of a small input, on both peers too: a full one would take them minutes."""
    ways: dict[str, Context] = {NATIVE: nullcontext, PYTORCH: peers.in_pytorch, REFERENCE: _reference}
    x = torch.randn(*x.shape[:2], *SMALL[x.dim() - 2])
    model.eval()
    inference = measure.times({way: _infer(model, x, context) for way, context in ways.items()}, seconds, threads, _LIMIT)
    model.train()
    training = measure.times({way: _step(model, x, context) for way, context in ways.items()}, seconds, threads, _LIMIT)
    return {"input": list(x.shape), "inference": inference, "training": training}


def _infer(model: Callable[[torch.Tensor], Any], x: torch.Tensor, context: Context) -> measure.Side:
    def run() -> None:
        with torch.no_grad(), context():
            model(x)

    return run


def _step(model: nn.Module, x: torch.Tensor, context: Context) -> measure.Side:
    """Forward, cross-entropy, backward, a step of SGD that changes nothing."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batch = torch.cat((x, x.flip(-1)))  # two samples: batch norms of a single voxel have no statistics

    def run() -> None:
        with context():
            y = model(batch)
            loss = nn.functional.cross_entropy(y.float(), torch.zeros_like(y[:, 0], dtype=torch.long))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


@contextmanager
def _autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


@contextmanager
def _reference() -> Iterator[None]:
    with medssm.use_backend("reference", strict=True):
        yield
