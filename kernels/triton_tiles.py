"""What Triton kernels of the recurrences share: matrix products, a walk's tokens, tiles loaded in float32, masks of a vector and a scalar."""

from __future__ import annotations

import triton
import triton.language as tl

PRECISION = tl.constexpr("tf32x3")  # three products on tensor cores keep 22 bits of each factor, faster than float32's own units


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
def tile(pointer, rows, cols, live, here):
    """(rows, cols) in float32, zeros where not live or not here. rows: offsets; cols: indices of adjacent numbers."""
    return tl.load(pointer + rows[:, None] + cols[None, :], mask=live[:, None] & here[None, :], other=0.0).to(tl.float32)


@triton.jit
def where_live(lanes, live):
    """lanes & live, of a vector and a scalar: the interpreter makes integers of the scalar, and no mask of them."""
    return lanes & (tl.full(lanes.shape, live, tl.int32) != 0)
