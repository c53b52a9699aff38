"""medssm bench --mixers: every mixer of medssm_unet on one volume at equal channels: time and memory of inference and of forward and backward."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from medssm.bench import apart, measure
from medssm.nn.mixers import MIXERS, make_mixer

SIZE, CHANNELS = (64, 64, 64), 48
_QUICK = (8, 8, 8), 16
EXPAND = 1  # inner channels divided by outer ones, as in medssm_unet's sizes tiny and small
_LIMIT = 3.0  # a call that takes longer, in seconds, is timed once, after a first call


def mixer(name: str, quick: bool = False) -> dict[str, Any]:
    """A mixer's figures: {"size", "channels", "parameters", "threads", "inference", "training", "memory", "training_memory"}: seconds, and bytes
    above the mixer's own and its input's. Inference and training are each measured in a process of their own."""
    return apart.run("mixers", name, "inference", str(int(quick))) | apart.run("mixers", name, "training", str(int(quick)))


def main() -> None:
    """The other process: print the figures of the mixer that the command line names, of inference or of training."""
    name, kind, quick = sys.argv[1], sys.argv[2], sys.argv[3] == "1"
    size, channels = _QUICK if quick else (SIZE, CHANNELS)
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    module = make_mixer(name, channels, len(size), expand=EXPAND if "expand" in MIXERS[name].options else None)
    x = torch.randn(1, *size, channels)

    def inference() -> None:
        with torch.no_grad():
            module(x)

    def training() -> None:
        leaves = [x.requires_grad_(), *module.parameters()]
        torch.autograd.grad(module(x).sum(), leaves)

    side = inference if kind == "inference" else training
    memory = measure.peak_above(side)
    seconds = measure.times({name: side}, 0.1 if quick else 4.0, threads, _LIMIT)[name]
    about = {"size": list(size), "channels": channels, "parameters": sum(p.numel() for p in module.parameters()), "threads": threads}
    print(json.dumps(about | {kind: seconds, "memory" if kind == "inference" else "training_memory": memory}))
