"""What the GPU kernels of causal_conv1d share in PyTorch: the earliest step that each step sees, packed sequences, and the final state."""

from __future__ import annotations

from typing import NamedTuple

import torch

from medssm.kernels.walks import Sequences


class Packed(NamedTuple):
    """Packed sequences; steps and segments as they are walked."""

    count: int  # type: ignore[assignment]  # of sequences; it hides tuple.count, which nobody calls here
    segment: torch.Tensor  # (l,) int64: of each step
    table: torch.Tensor  # (segments, 4) int64: the first step, the step after the last, the sequence that begins and the one that ends there, or -1


def pack(starts: torch.Tensor, sequences: Sequences, length: int, reverse: bool) -> Packed:
    begin, sequence = starts, sequences.of_segments
    end = torch.cat([begin[1:], begin.new_full((len(begin[:1]),), length)])
    if reverse:
        begin, end, sequence = (length - end).flip(0), (length - begin).flip(0), sequence.flip(0)
    edge = torch.cat([sequence.new_full((1,), -1), sequence, sequence.new_full((1,), -1)])
    opening, closing = sequence.where(sequence != edge[:-2], -1), sequence.where(sequence != edge[2:], -1)
    segment = torch.bucketize(torch.arange(length, device=begin.device), begin, right=True) - 1
    return Packed(sequences.count, segment, torch.stack([begin, end, opening, closing], 1))


def begins(starts: torch.Tensor | None, length: int, width: int, reverse: bool) -> torch.Tensor | None:
    """(l,) the earliest step that each step sees; 1 - width is the initial state's oldest token. None if that is so for all steps."""
    if starts is None or not length:
        return None
    fresh = length - starts if reverse else starts
    begin = torch.full((length + 1,), 1 - width, dtype=torch.int64, device=starts.device).scatter_(0, fresh, fresh)
    begin[0] = 1 - width  # the initial state precedes step 0
    return begin[:length].cummax(0).values


def state(
    x: torch.Tensor,  # (b,l,d)
    width: int,
    index: torch.Tensor | None,  # (l,)
    begin: torch.Tensor | None,  # (l,), from `begins`
    reverse: bool,
    initial_state: torch.Tensor | None,  # (b,d,w-1)
) -> torch.Tensor:
    """(b,d,w-1): the last w - 1 steps before the walk's end, oldest first; zeros for steps before the last new beginning."""
    batch, length, channels = x.shape
    last = x.new_zeros((batch, channels, width - 1))
    for tap in range(width - 1):
        step = length - (width - 1) + tap
        if step >= 0:
            token = length - 1 - step if reverse else step
            kept = x[:, token] if index is None else x.index_select(1, index[token : token + 1])[:, 0]
        elif initial_state is not None:
            kept = initial_state[:, :, step + width - 1]
        else:
            continue
        last[:, :, tap] = kept if begin is None else torch.where(begin[-1] <= step, kept, 0)
    return last


def packed_states(
    x: torch.Tensor,  # (1,l,d)
    width: int,
    index: torch.Tensor | None,  # (l,)
    packed: Packed,
    reverse: bool,
    initial_state: torch.Tensor | None,  # (n,d,w-1)
) -> torch.Tensor:
    """(n,d,w-1): of each sequence what `state` gives; an empty one's is its initial state."""
    _, length, channels = x.shape
    past = width - 1
    last = x.new_zeros((packed.count + 1, channels, past))  # the last row takes the segments at which no sequence ends
    if initial_state is not None:
        last[:-1] = initial_state
    begin, end, opening, closing = packed.table.unbind(1)
    step = end[:, None] - past + torch.arange(past, device=x.device)  # (segments, w-1)
    token = step.clamp(min=0)
    token = length - 1 - token if reverse else token
    token = token if index is None else index[token]
    kept = x[0, token].transpose(1, 2)
    early = last[opening.clamp(min=0)].gather(2, (step - begin[:, None] + past).clamp(max=past - 1)[:, None].expand_as(kept)) if past else kept
    early = early.where((opening >= 0)[:, None, None], 0)
    last[closing.where(closing >= 0, packed.count)] = kept.where((step >= begin[:, None])[:, None], early)
    return last[:-1]
