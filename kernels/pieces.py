"""Packed sequences on a GPU: the walk cut into pieces of at most so many steps. No piece has steps of two segments.

So a program that takes one piece has one state that enters and one that leaves. The pieces are numbered as they are walked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from medssm.kernels.walks import Sequences


class Pieces(NamedTuple):
    count: int  # type: ignore[assignment]  # it hides tuple.count, which nobody calls here
    segments: int
    sequences: int
    table: torch.Tensor  # (count, 3) int64: a piece's first step, the step after its last, its segment; steps and segments as they are walked
    bounds: torch.Tensor  # (segments + 1,) int64: the first piece of each segment, and how many there are
    filled: torch.Tensor  # (filled,) int64: the sequences that are not empty
    first: torch.Tensor  # (filled,) int64: the segment that each of them begins with
    last: torch.Tensor  # (filled,) int64: the segment that each of them ends with

    def enter(self, states: torch.Tensor | None, shape: tuple[int, ...], backward: bool = False) -> torch.Tensor:
        """(segments, *shape) float32: the state that enters each segment, of states (sequences, *shape) or zeros, whether it is the initial or
        (backward) the final one.
        """
        entries = torch.zeros((self.segments, *shape), dtype=torch.float32, device=self.table.device)
        if states is not None:
            entries.index_copy_(0, self.last if backward else self.first, states.index_select(0, self.filled).float())
        return entries

    def leave(self, of_segments: torch.Tensor, states: torch.Tensor | None, backward: bool = False) -> torch.Tensor:
        """(sequences, *shape) float32: what leaves each sequence, of what leaves the segments (segments, *shape).

        states (sequences, *shape), or zeros: what enters the sequences. It leaves those that are empty.
        """
        shape = (self.sequences, *of_segments.shape[1:])
        left = of_segments.new_zeros(shape) if states is None else states.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return left.index_copy_(0, self.filled, of_segments.index_select(0, self.first if backward else self.last))

    def edges(self, end: bool) -> torch.Tensor:
        """(segments,) the slots of the states at the segments' begins or ends: each segment has one more than pieces."""
        return (self.bounds[1:] if end else self.bounds[:-1]) + torch.arange(self.segments, device=self.bounds.device)


def cut(
    starts: torch.Tensor,  # (segments,) int64, at least one, the first 0
    sequences: Sequences,
    length: int,
    reverse: bool,
    size: int,
    grid: bool = False,
) -> Pieces:
    """Pieces of `size` steps from each segment's begin on, its last one shorter; grid: from the walk's begin on, cut where a segment ends too.

    The tables are made on the CPU: it waits for the starts, and the device does not wait for it.
    """
    begin, sequence = starts.cpu(), sequences.of_segments.cpu()
    end = torch.cat([begin[1:], begin.new_tensor([length])])
    if reverse:
        begin, end, sequence = (length - end).flip(0), (length - begin).flip(0), sequence.flip(0)
    origin = begin - begin % size if grid else begin
    pieces = (end - origin + size - 1) // size
    bounds = torch.cat([pieces.new_zeros(1), pieces.cumsum(0)])
    segment = torch.repeat_interleave(pieces)
    place = origin[segment] + (torch.arange(len(segment)) - bounds[segment]) * size
    table = torch.stack([place.maximum(begin[segment]), (place + size).minimum(end[segment]), segment], 1)
    changes = sequence[1:] != sequence[:-1]
    edge = changes.new_ones(1)
    first, last = (torch.cat(parts).nonzero().flatten() for parts in ((edge, changes), (changes, edge)))
    parts = [table.flatten(), bounds, sequence[first], first, last]
    table, *rest = torch.cat(parts).to(starts.device).split([len(part) for part in parts])
    return Pieces(len(segment), len(pieces), sequences.count, table.view(-1, 3), *rest)
