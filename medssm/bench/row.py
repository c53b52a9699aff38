"""What a row of the benchmark is: sides that do the same work, the first of them ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from medssm.bench.measure import Side

OURS = "medssm"
COMPILED = "the same, torch.compile"


@dataclass(frozen=True)
class Row:
    """make() gives the sides. threads: "one", "both" (one and all) or "all"; limit: seconds of a side's call beyond which it is called once;
    memory: measure it too; kept: the allocator keeps what is freed, so that no side waits for the kernel's fresh pages; tokens:
    token-channels of the work, for a time per each."""

    title: str
    make: Callable[[], dict[str, Side]]
    threads: str = "both"
    limit: float = 2.0
    memory: bool = False
    kept: bool = False
    tokens: int | None = None

    def sides(self) -> dict[str, Side]:
        return self.make()


def call(function: Callable, tensors: dict[str, torch.Tensor], **options) -> Side:
    """Forward without gradients, or forward and backward where the tensors ask for gradients."""
    leaves = list(tensors.values())

    def forward():
        with torch.no_grad():
            return function(**tensors, **options)

    def both():
        out = function(**tensors, **options)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return both if leaves[0].requires_grad else forward
