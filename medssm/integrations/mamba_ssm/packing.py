"""Packed sequences as upstream tells them, by seq_idx or cu_seqlens, for medssm's ops: a batch's rows one behind the other, and where each begins."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """The sequences of b rows of l tokens: of all b l tokens, one row behind the other, sequence i is the tokens bounds[i] to bounds[i + 1].

    bounds: (n + 1,) int64, strictly rising from 0 to b l. cu_seqlens: the caller's, or None.
    """

    bounds: Tensor
    rows: int
    length: int
    cu_seqlens: Tensor | None

    def flat(self, t: Tensor) -> Tensor:
        """(b, l, …) as (1, b l, …)."""
        return t.flatten(0, 1).unsqueeze(0)

    def back(self, t: Tensor) -> Tensor:
        """(1, b l, …) as (b, l, …)."""
        return t.unflatten(1, (self.rows, self.length)).squeeze(0)

    def entering(self, states: Tensor | None) -> Tensor | None:
        """(n, …) of (b, …): each row's initial state enters its first sequence, zeros the others."""
        if states is None:
            return None
        first = torch.searchsorted(self.bounds, self._row_ends() - self.length)
        return states.new_zeros(len(self.bounds) - 1, *states.shape[1:]).index_copy(0, first, states)

    def leaving(self, states: Tensor) -> Tensor:
        """(b, …) of (n, …): the states that leave each row's last sequence."""
        return states[torch.searchsorted(self.bounds, self._row_ends()) - 1]

    def final(self, states: Tensor) -> Tensor:
        """The states (n, …) that leave the caller's sequences by cu_seqlens, zeros for an empty one; without cu_seqlens each row's last."""
        if self.cu_seqlens is None:
            return self.leaving(states)
        starts, ends = self.cu_seqlens[:-1].long(), self.cu_seqlens[1:].long()
        empty = (ends == starts).view(-1, *[1] * (states.dim() - 1))
        return states[(torch.searchsorted(self.bounds, ends) - 1).clamp(min=0)].masked_fill(empty, 0)

    def _row_ends(self) -> Tensor:
        return torch.arange(1, self.rows + 1, device=self.bounds.device) * self.length


def packing(seq_idx: Tensor | None, cu_seqlens: Tensor | None, rows: int, length: int) -> Packing | None:
    """How `rows` rows of `length` tokens are packed; None where each row is one sequence.

    Args:
        seq_idx: (b, l), a number per token: a new sequence begins where it changes, and in every row.
        cu_seqlens: (n + 1,), of one row: sequence i is the tokens cu_seqlens[i] to cu_seqlens[i + 1]; what follows the last is padding.
        With both, a sequence begins where either says so.

    Raises ValueError for a wrong shape.
    """
    if seq_idx is not None and tuple(seq_idx.shape) != (rows, length):
        raise ValueError(f"seq_idx: expected ({rows}, {length}), a number per token, got {tuple(seq_idx.shape)}")
    begins = []
    if seq_idx is not None and length:
        changes = torch.ones_like(seq_idx, dtype=torch.bool)
        changes[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        begins.append(changes.flatten().nonzero().flatten())
    if cu_seqlens is not None:
        if rows != 1:
            raise ValueError(f"cu_seqlens: expected a batch of 1, sequences one behind the other, got a batch of {rows}")
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens[0] != 0 or cu_seqlens[-1] > length or (cu_seqlens.diff() < 0).any():
            raise ValueError(f"cu_seqlens: expected (n + 1,), rising from 0 to at most {length}, the number of tokens, got {cu_seqlens.tolist()}")
        begins.append(cu_seqlens.long())
    if not begins or (cu_seqlens is None and len(begins[0]) == rows):
        return None
    ends = torch.arange(rows + 1, device=begins[0].device) * length
    return Packing(torch.cat([*begins, ends]).unique(), rows, length, cu_seqlens)
