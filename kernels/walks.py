"""A walk through the tokens: which token each step visits, and at which steps the state begins anew."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Sequences(NamedTuple):
    """The sequences that a walk is cut into, each with a state of its own.

    count: how many; of_segments (segments,) int64: the sequence that each segment of the walk belongs to. One that is not there is empty.
    """

    count: int  # type: ignore[assignment]  # it hides tuple.count, which nobody calls here
    of_segments: torch.Tensor


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


def over_sequences(tokens: str, states: str = "initial_state", tables: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a reference the argument `sequences`: each sequence is computed on its own, from its own initial state, and the outputs joined.

    tokens: the names of its tensors (1, l, …); states: of the initial states (count, …); tables: of tensors (l, …). It is then called by name.
    """

    def decorate(reference: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(reference)
        def packed(*args: Any, sequences: Sequences | None = None, **named: Any) -> Any:
            if sequences is None:
                return reference(*args, **named)
            return _each(reference, sequences, tokens.split(), states.split(), tables.split(), **named)

        return packed

    return decorate


def _each(reference, sequences, tokens, states, tables, *, index, starts, reverse, **named):
    length, device = named[tokens[0]].shape[1], named[tokens[0]].device
    order = torch.arange(length, device=device) if index is None else index
    ends = [*starts.tolist(), length]
    segments: list[list[int]] = [[] for _ in range(sequences.count)]
    for segment, sequence in enumerate(sequences.of_segments.tolist()):
        segments[sequence].append(segment)
    walked, outputs, finals = [], [], []
    for sequence, mine in enumerate(segments):
        begin, end = (ends[mine[0]], ends[mine[-1] + 1]) if mine else (length, length)
        steps = order[begin:end]
        one = {**named, "index": None, "starts": starts[mine] - begin if mine else None, "reverse": reverse}
        one.update({name: named[name].index_select(1, steps) for name in tokens if named.get(name) is not None})
        one.update({name: named[name].index_select(0, steps) for name in tables if named.get(name) is not None})
        one.update({name: named[name][sequence : sequence + 1] for name in states if named.get(name) is not None})
        out, *final = reference(**one)
        walked.append(steps)
        outputs.append(out)
        finals.append(final)
    back = torch.argsort(torch.cat(walked))
    return torch.cat(outputs, 1).index_select(1, back), *(torch.cat(state) for state in zip(*finals, strict=True))
