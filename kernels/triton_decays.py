"""Sums of log decays in Triton, of the recurrences whose chunks are matrix products.

The decay between two tokens is the exponential of a sum of log decays, all of one sign. Sums that begin or end at a chunk's or block's edge are
cumulated from that edge, and never lose accuracy. Those between any two tokens are differences of cumulated sums, which would: a decay of -100
leaves every later difference with an error of 1e-5. So `split` cuts each log decay in a multiple of 2^-11, whose sums are exact, and a small rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

STRONGEST = tl.constexpr(-128.0)  # log decay: its exponential is 0 in float32; a chunk's sum has 13 bits before the point, 11 behind it


@triton.jit
def split(values):
    """(multiples of 2^-11, the rest): both cumulated along the steps. Sums of the former are exact, those of the latter small."""
    coarse = tl.floor(values * 2048.0 + 0.5) * (1.0 / 2048.0)
    return tl.cumsum(coarse, 0), tl.cumsum(values - coarse, 0)


@triton.jit
def pair_decays(values, seen, TO_LATER: tl.constexpr):
    """(steps, steps): the decay between two steps, of log decays (steps,); 0 where not seen. TO_LATER: columns are the later step, else rows."""
    coarse, rest = split(values)
    logs = (coarse[:, None] - coarse[None, :]) + (rest[:, None] - rest[None, :])
    if TO_LATER:
        logs = -logs
    return tl.exp(tl.where(seen, logs, float("-inf")))
