"""What a row of the table is, and how it is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import medssm
from gpu_parts.timing import DEVICE, Floor, peak_memory, times

OURS = ("cuda", "triton")


@dataclass(frozen=True)
class Row:
    """make(rehearse) gives (sides by name, {"floor": seconds of it, …}); the sides take the number of the call. goals: {what: (ratio, text)}."""

    title: str
    make: Callable[[Floor, bool], tuple[dict, dict]]
    peer: str | None = None  # the side that ours is held against
    ratio: float | None = None  # the goal: peer / best of ours, at least
    share: float | None = None  # the goal: floor / best of ours, at least
    memory: bool = False


def measure(row: Row, floor: Floor, rehearse: bool) -> dict:
    """The row's figures; a side that fails says why."""
    sides, facts = row.make(floor, rehearse)
    failed = {}
    for name in list(sides):
        try:
            sides[name](0)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            del sides[name]
    seconds = times(sides, 0.05 if rehearse else 1.5) if sides else {}
    figures = {
        "title": row.title,
        "seconds": seconds,
        "failed": failed,
        "floor": facts.get("floor"),
        "absent": facts.get("absent"),
        "goals": {"peer": row.peer, "ratio": row.ratio, "share": row.share},
    }
    if row.memory:
        figures["memory"] = {name: peak_memory(side) for name, side in sides.items()}
        figures["memory_expected"] = facts.get("memory")
    best = min((seconds[name] for name in OURS if name in seconds), default=None)
    if best:
        figures["best"] = min((name for name in OURS if name in seconds), key=seconds.get)
        figures["share"] = facts["floor"] / best if facts.get("floor") else None
        figures["ratio"] = seconds[row.peer] / best if row.peer in seconds else None
    return figures


def served(op: str) -> list[str]:
    return [name for name in OURS if medssm.backends()[op][name] == "ok"]


def both_ways(call, tensors: list[list[torch.Tensor]], backward: bool):
    """side(i): call(*the i-th inputs), and its gradients."""

    def forward(i):
        with torch.no_grad():
            return call(*tensors[i % len(tensors)])

    def train(i):
        given = tensors[i % len(tensors)]
        out = call(*given)
        return torch.autograd.grad(out, [t for t in given if t.requires_grad], out)

    return train if backward else forward


def normal(seed: int, *shape: int, dtype=torch.bfloat16, scale: float = 1.0, shift: float = 0.0, grad: bool = False) -> torch.Tensor:
    g = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=g, device=DEVICE).mul_(scale).add_(shift).to(dtype).requires_grad_(grad)
