"""Shared by the Triton kernels of the recurrences: matrix products, the tokens of a walk, tiles in float32, masks, and decays.

The decay between two tokens is the exponential of a sum of log decays, none of them positive. A sum that begins or ends at the edge of a chunk or
block is cumulated from that edge and stays accurate. A sum between any two tokens is a difference of two cumulated sums: after one log decay of -100,
every later difference would have an error of 1e-5. So `split` cuts each log decay into a multiple of 2^-11, whose sums are exact, and a small rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

PRECISION = tl.constexpr("tf32x3")  # three products on tensor cores keep 22 bits of each factor, faster than float32's own units
# The lowest log decay: its exponential is 0 in float32, and a chunk's sum needs 13 bits before the point and 11 behind it.
STRONGEST = tl.constexpr(-128.0)


@triton.jit
def product(a, b):
    """a b in float32."""
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def visited(index, step, length, WALK: tl.constexpr, REVERSE: tl.constexpr):
    """The token (int64) that each step visits. A step out of range gives some token in range."""
    step = tl.minimum(tl.maximum(step, 0), length - 1).to(tl.int64)
    if REVERSE:
        step = length - 1 - step
    if WALK:
        step = tl.load(index + step)
    return step


@triton.jit
def chunk_of(parts, chunks, heads):
    """What this program works on, of programs that count parts, then chunks, then rows of (batch, head): part, chunk, row, batch entry, head."""
    program = tl.program_id(0)
    row = (program // parts // chunks).to(tl.int64)
    return program % parts, program // parts % chunks, row, row // heads, row % heads


@triton.jit
def span_of(chunk, pieces, length, steps, PACKED: tl.constexpr):
    """A chunk's first step, a step that none of its steps reaches, and its segment; PACKED: of pieces.py's table, else all chunks are of one."""
    if PACKED:
        pieces += tl.cast(chunk, tl.int64) * 3
        return tl.load(pieces).to(tl.int32), tl.load(pieces + 1).to(tl.int32), tl.load(pieces + 2).to(tl.int32)
    return chunk * steps, length, chunk * 0


@triton.jit
def tokens_of(begin, end, index, length, CHUNK: tl.constexpr, WALK: tl.constexpr, REVERSE: tl.constexpr):
    """A chunk's steps, counted from its begin and from the walk's, which of them exist, and their tokens."""
    inside = tl.arange(0, CHUNK)
    step = begin + inside
    return inside, step, step < end, visited(index, step, length, WALK, REVERSE)


@triton.jit
def tile(pointer, rows, cols, live, here):
    """(rows, cols) in float32, zeros where not live or not here. rows: offsets; cols: indices of adjacent numbers."""
    return tl.load(pointer + rows[:, None] + cols[None, :], mask=live[:, None] & here[None, :], other=0.0).to(tl.float32)


@triton.jit
def where_live(lanes, live):
    """lanes & live, of a vector and a scalar. The interpreter turns the scalar into an integer, which `&` alone would not accept as a mask."""
    return lanes & (tl.full(lanes.shape, live, tl.int32) != 0)


@triton.jit
def split(logs):
    """(multiples of 2^-11, the rest) of log decays, both cumulated along the steps. Sums of the first are exact, sums of the second are small."""
    coarse = tl.floor(logs * 2048.0 + 0.5) * (1.0 / 2048.0)
    return tl.cumsum(coarse, 0), tl.cumsum(logs - coarse, 0)


@triton.jit
def pair_decays(logs, seen, TO_LATER: tl.constexpr):
    """(steps, steps): the decay between two steps, of log decays (steps,); 0 where not seen. The later step is the row, with TO_LATER the column."""
    coarse, rest = split(logs)
    sums = (coarse[:, None] - coarse[None, :]) + (rest[:, None] - rest[None, :])
    if TO_LATER:
        sums = -sums
    return tl.exp(tl.where(seen, sums, float("-inf")))
