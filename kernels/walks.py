"""A walk through the tokens: which token each step visits, and at which steps the state begins anew."""

from __future__ import annotations

import torch


def walk_steps(
    length: int,
    index: torch.Tensor | None,  # (length,) int64, a permutation of the tokens; None: the order in memory
    starts: torch.Tensor | None,  # (segments,) int64, the steps at which the state begins anew
    reverse: bool,
    device: torch.device | str,
) -> tuple[torch.Tensor, set[int]]:
    """The token visited at each step, and the steps at which the state begins anew.

    Step 0 is not among them: the initial state precedes it.
    """
    steps = torch.arange(length, device=device) if index is None else index.to(device)
    fresh = set() if starts is None else {int(s) for s in starts}
    if reverse:
        steps = steps.flip(0)
        fresh = {length - s for s in fresh}
    return steps, fresh - {0, length}


def at_starts(starts: torch.Tensor | None, length: int, reverse: bool, value: float, dtype: torch.dtype) -> torch.Tensor | None:
    """(length,): `value` at each step where the state begins anew, else 0. None without starts: then no step does.

    Step 0 is 0: the initial state precedes it.
    """
    if starts is None:
        return None
    marks = torch.zeros(length + 1, dtype=dtype, device=starts.device).index_fill_(0, length - starts if reverse else starts, value)
    marks[0] = 0
    return marks[:length]
