"""What a walk that begins anew here and there means for values of its tokens: the next step's, sums along it, and those at its ends."""

from __future__ import annotations

import math

import torch

_SPARE = 12  # bits of an int64 above a revolution
_REVOLUTION = 2 ** (64 - _SPARE)  # angles are added as whole numbers: this many make a revolution, and it divides what an int64 overflows at


class Steps:
    """A walk through `length` tokens, cut into segments: tokens (b, l, …) in memory's order, steps in the order of the walk.

    index, starts, sequences: as in `medssm.kernels.walks`, with `reverse` carried out; starts and sequences may be None.
    rows: the states that have tokens, None for all of them. first, last: the tokens that the walk of each of those begins and ends with.
    """

    def __init__(self, length, index, starts, reverse, sequences, device):
        self.index = index if not reverse else torch.arange(length - 1, -1, -1, device=device) if index is None else index.flip(0)
        self.starts, self.sequences = starts, sequences
        self._back = None if self.index is None else torch.empty_like(self.index).scatter_(0, self.index, torch.arange(length, device=device))
        if starts is None:
            self._begins = self._ends = None
        else:
            begins, ends = starts, torch.cat([starts[1:], starts.new_tensor([length])])
            if reverse:
                begins, ends = (length - ends).flip(0), (length - starts).flip(0)
            self.starts = begins
            segment = torch.searchsorted(begins, torch.arange(length, device=device), right=True) - 1
            self._begins, self._ends = begins[segment], ends[segment] - 1
        self.rows, first, last = None, torch.zeros(1, dtype=torch.int64, device=device), torch.full((1,), length - 1, device=device)
        if sequences is not None:
            of_segments = sequences.of_segments.flip(0) if reverse else sequences.of_segments
            self.sequences = sequences._replace(of_segments=of_segments)
            number = torch.arange(sequences.count, device=device)
            owner = of_segments[segment]  # of each step
            rising = owner.flip(0) if reverse else owner
            low, high = torch.searchsorted(rising, number), torch.searchsorted(rising, number, right=True)
            if reverse:
                low, high = length - high, length - low
            self.rows = (high > low).nonzero().flatten()
            first, last = low[self.rows], high[self.rows] - 1
        self.first, self.last = (t if self.index is None else self.index[t] for t in (first, last)) if length else (None, None)

    def micro(self, ranks):
        """(index, starts, reverse, sequences) of a walk that makes `ranks` steps at each token, all of them before the next."""
        index, starts = self.index, self.starts
        if ranks > 1 and index is not None:
            index = (index[:, None] * ranks + torch.arange(ranks, device=index.device)).flatten()
        return index, starts if starts is None else starts * ranks, False, self.sequences

    def following(self, t):
        """The value (b,l,…) of the token at the next step, 0 where none follows or the walk begins anew."""
        walked = self._along(t)
        out = torch.zeros_like(walked)
        out[:, :-1] = walked[:, 1:]
        if self._ends is not None:
            out[:, self._ends] = 0
        return self._to_tokens(out)

    def preceding(self, t):
        """The value (b,l,…) of the token at the step before: the transpose of `following`."""
        walked = self._along(t)
        out = torch.zeros_like(walked)
        out[:, 1:] = walked[:, :-1]
        if self._begins is not None:
            out[:, self._begins] = 0
        return self._to_tokens(out)

    def angles(self, rate, dt, initial):
        """(angles (b,l,h,a) from -pi to pi, at the last tokens from 0 to 2 pi): pi rate dt summed along the walk, from `initial` (rows,h,a) or 0.

        rate (b,l,h or 1,a), dt (b,l,h). Whole numbers add exactly in any order, and lose whole revolutions where they overflow.
        """
        fixed = _fixed(rate.double() * (dt.double() * 0.5 * _REVOLUTION).unsqueeze(-1))
        if initial is not None:
            self.add(fixed, self.first, _fixed(initial.double() * (_REVOLUTION / (2 * math.pi))))
        total, unit = self._sums(fixed), 2 * math.pi / _REVOLUTION
        last = torch.bitwise_and(self.at(total, self.last), _REVOLUTION - 1)
        signed = total.bitwise_left_shift_(_SPARE).bitwise_right_shift_(_SPARE)
        return signed.to(dt.dtype).mul_(unit), last.to(dt.dtype).mul_(unit)

    def remaining(self, t):
        """The sum (b,l,…) over a token's step and those that follow until the walk begins anew.

        Added as whole numbers, too: in units that leave the sum of l of the largest value below 2**62.
        """
        unit = t.detach().abs().amax(1, keepdim=True).double() * (2.0 ** (-62) * t.shape[1])
        whole = torch.where(unit > 0, t.double() / unit, 0.0).round().to(torch.int64)
        return (self._sums(whole, until_the_end=True).double() * unit).to(t.dtype)

    def at(self, t, tokens):
        """The values (rows, …) of tensors (b,l,…) at the first or the last tokens."""
        return t.index_select(1, tokens).squeeze(1) if self.rows is None else t[0].index_select(0, tokens)

    def add(self, t, tokens, values):
        """Adds values (rows, …) to t (b,l,…) at the first or the last tokens."""
        t.index_add_(1, tokens, values.unsqueeze(1) if self.rows is None else values.unsqueeze(0))

    def with_tokens(self, state):
        """The rows of a state that have tokens."""
        return state if state is None or self.rows is None else state.index_select(0, self.rows)

    def _along(self, t):
        return t if self.index is None else t.index_select(1, self.index)

    def _to_tokens(self, t):
        return t if self._back is None else t.index_select(1, self._back)

    def _sums(self, whole, until_the_end=False):
        walked = self._along(whole)
        total = torch.cumsum(walked, 1)
        if until_the_end:
            end = total[:, -1:] if self._ends is None else total.index_select(1, self._ends)
            total = end - total + walked
        elif self._begins is not None:
            total = total - (total - walked).index_select(1, self._begins)
        return self._to_tokens(total)


def _fixed(angle):
    """An angle in units of a revolution over _REVOLUTION, in float64, as a whole number without whole revolutions."""
    return torch.remainder(angle, _REVOLUTION).to(torch.int64)
