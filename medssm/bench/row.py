"""What a row of the benchmark is: sides that do the same work, the first of them ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from medssm.bench.measure import Side

OURS = "medssm"
COMPILED = "the same, torch.compile"


@dataclass(frozen=True)
class Row:
    """A comparison.

    Args:
        title: what is compared
        make: gives the sides by name
        threads: "one", "all", or "both": once with one thread and once with all
        limit: another side than the first, ours, whose calls take longer, in seconds, is called in one round only
        memory: measure the memory of each side too
        kept: the allocator keeps freed memory, so that no side waits for new pages of the system
        tokens: tokens times channels of the work, for a time per each
    """

    title: str
    make: Callable[[], dict[str, Side]]
    threads: str = "both"
    limit: float = 2.0
    memory: bool = False
    kept: bool = False
    tokens: int | None = None

    def sides(self) -> dict[str, Side]:
        """The sides with fresh inputs."""
        return self.make()


def call(function: Callable[..., torch.Tensor], tensors: dict[str, torch.Tensor], **options: Any) -> Side:
    """A call without gradients, or with its backward if the tensors require gradients."""
    leaves = list(tensors.values())

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return function(**tensors, **options)

    def both() -> tuple[torch.Tensor, ...]:
        out = function(**tensors, **options)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return both if leaves[0].requires_grad else forward
