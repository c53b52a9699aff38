"""What every Triton kernel of the matrix-state recurrences does: find a chunk's tokens, load tiles in float32, sum log decays.

The decay between two tokens is the exponential of a sum of log decays, all of one sign. Sums that begin or end at a chunk's or block's edge are
cumulated from that edge, and never lose accuracy. Those between any two tokens are differences of cumulated sums, which would: a decay of -100
leaves every later difference with an error of 1e-5. So `split` cuts each log decay in a multiple of 2^-11, whose sums are exact, and a small rest.
"""

# ruff: noqa: SIM108 (Triton does not compile every conditional expression)

from __future__ import annotations

import triton
import triton.language as tl

PRECISION = tl.constexpr("tf32x3")  # of matrix products: three on tensor cores keep 22 bits of each factor, faster than float32's own units
NONE, HEAD, KEY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # decays: none, one a head, one a head and key
BY_NOTHING, BY_STEPS, BY_GATE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what a tile is multiplied by as it is loaded
STRONGEST = tl.constexpr(-128.0)  # log decay: its exponential is 0 in float32; a chunk's sum has 13 bits before the point, 11 behind it


@triton.jit
def product(a, b):
    """a b in float32."""
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def visited(index, step, length, WALK: tl.constexpr, REVERSE: tl.constexpr):
    """The token visited at each step (int64); steps out of range give one in range."""
    step = tl.minimum(tl.maximum(step, 0), length - 1).to(tl.int64)
    if REVERSE:
        step = length - 1 - step
    if WALK:
        step = tl.load(index + step)
    return step


@triton.jit
def segment_of(segment, step, length, STARTS: tl.constexpr):
    """How often the state has begun anew up to each step; steps out of range count as the nearest in range."""
    if STARTS:
        return tl.load(segment + tl.minimum(tl.maximum(step, 0), length - 1))
    return step * 0


@triton.jit
def tile(pointer, rows, cols, live, here):
    """(rows, cols) in float32, zeros where not live or not here. rows: offsets; cols: indices of adjacent numbers."""
    return tl.load(pointer + rows[:, None] + cols[None, :], mask=live[:, None] & here[None, :], other=0.0).to(tl.float32)


@triton.jit
def log_decays(g, token, live, keys, here, g_token, DECAY: tl.constexpr):
    """(steps,), or (steps, keys) where the decay is per key; 0 where not live."""
    if DECAY == KEY:
        values = tile(g, token * g_token, keys, live, here)
    else:
        values = tl.load(g + token * g_token, mask=live, other=0.0).to(tl.float32)
    return tl.maximum(values, STRONGEST)


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


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def scaled_tile(pointer, token, step, cols, live, here, steps, of_steps, z, z_token, BY: tl.constexpr):
    """A tile times nothing, or each token's step, or silu(z)."""
    values = tile(pointer, token * step, cols, live, here)
    if BY == BY_STEPS:
        values *= tl.load(steps + of_steps, mask=live, other=0.0)[:, None]
    if BY == BY_GATE:
        values *= silu(tile(z, token * z_token, cols, live, here))
    return values
