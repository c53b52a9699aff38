"""medssm bench --networks: every network at a stated input, inference and one training step, on our kernels, under bf16 autocast where the processor
computes in it, compiled if asked, and by upstream's arithmetic in plain PyTorch."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias
from unittest import mock

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import medssm
from medssm import machine
from medssm.bench import apart, measure, peers
from medssm.models import model_facts
from medssm.ops.op import Op

# The input of networks that take seconds, in training, and of upstream's arithmetic where that takes many of them.
SMALL = {2: (64, 64), 3: (64, 32, 32)}
NATIVE, BF16, COMPILED = "native", "native, bf16", "native, compiled"
PYTORCH = "upstream's arithmetic in PyTorch"
RECURRENT = {"selective_scan", "selective_scan_nd", "ssd", "ssd3", "bi_wkv", "delta_rule", "gated_linear_attention"}
_ONE_SIZE = "monai_unetr"  # it takes no other than the listed one
_ONCE = 6.0  # a side whose first call takes longer, in seconds, is not called again
_LONG = 15.0  # upstream's arithmetic is left out of the listed input where it would take longer, in seconds
Context: TypeAlias = Callable[[], AbstractContextManager[None]]


def network(name: str, quick: bool = False, compiled: bool = False) -> dict[str, Any]:
    """A network's figures, measured in a process of its own: {"input", "classes", "parameters", "multiply_adds", "memory", "ops", "inference",
    "training", "training_input", "small"}: seconds by side; bytes of one inference above the network's own; the ops of ours that it calls; "small":
    input, inference and training of a small input (None without scans, WKV or linear attention)."""
    return apart.run("networks", name, str(int(quick)), str(int(compiled)))


def build(name: str, quick: bool) -> tuple[nn.Module, torch.Tensor]:
    """The network with its default options, and its input (1, c, *spatial)."""
    facts = model_facts(name)
    channels, *spatial = facts.input
    if quick and name != _ONE_SIZE:
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
    name, quick, compiled = sys.argv[1], sys.argv[2] == "1", sys.argv[3] == "1"
    threads, seconds = torch.get_num_threads(), 0.1 if quick else 4.0
    model, x = build(name, quick)
    model.eval()
    with torch.no_grad(), noted() as called:
        memory = measure.peak_above(lambda: model(x))
    result: dict[str, Any] = {
        "input": list(x.shape),
        "classes": model_facts(name).classes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "memory": memory,
        "threads": threads,
        "ops": sorted(called),
        "small": _small(model, x, seconds, threads) if called & {*RECURRENT, "linear_attention"} else None,
    }
    ways: dict[str, Context] = {NATIVE: nullcontext, PYTORCH: peers.in_pytorch}
    if machine.has_bf16():
        ways[BF16] = _autocast
    if result["small"] and result["small"]["inference"][PYTORCH]["median"] * x.numel() > _LONG * math.prod(result["small"]["input"]):
        del ways[PYTORCH]
    model.eval()
    sides = {way: _infer(model, x, context) for way, context in ways.items()}
    sides |= _compiled(model, x) if compiled else {}
    result["inference"] = measure.times(sides, seconds, threads, once=_ONCE)
    taken = result["inference"][NATIVE]["median"]
    batch = x if taken < 1 or name == _ONE_SIZE else small_input(x)
    model.train()
    ways.pop(PYTORCH, None)
    if name == _ONE_SIZE:  # of which two samples do not train in the memory of the machines that this is for
        ways = {}
    steps = {way: _step(model, batch, context) for way, context in ways.items()}
    result |= {"training_input": list(batch.shape), "training": measure.times(steps, seconds, threads, once=_ONCE)}
    print(json.dumps(result | {"multiply_adds": multiply_adds(model, x)}))


@contextmanager
def noted() -> Iterator[set[str]]:
    """The names of the ops of ours that are called in this block."""
    called, call = set[str](), Op.__call__

    def noting(self: Op, *args: Any, **options: Any) -> Any:
        called.add(self.name)
        return call(self, *args, **options)

    with mock.patch.object(Op, "__call__", noting):
        yield called


def small_input(x: torch.Tensor) -> torch.Tensor:
    """An input of the same batch and channels."""
    return torch.randn(*x.shape[:2], *SMALL[x.dim() - 2])


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
    """Inference and training of a small input on our kernels and by upstream's arithmetic, the latter in inference alone where it takes seconds."""
    ways: dict[str, Context] = {NATIVE: nullcontext, PYTORCH: peers.in_pytorch}
    x = small_input(x)
    inference = measure.times({way: _infer(model, x, context) for way, context in ways.items()}, seconds, threads, once=_ONCE)
    if inference[PYTORCH]["median"] > _ONCE / 2:  # a training step takes several times as long
        del ways[PYTORCH]
    model.train()
    training = measure.times({way: _step(model, x, context) for way, context in ways.items()}, seconds, threads, once=_ONCE)
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
