"""What every Triton kernel of bi_wkv does at a step: find tokens, and keep sums over the tokens passed so far.

A sum of e^{key_i - (|t-i|-1) w} (a_i, b_i) over the tokens i passed, seen from the next step t, is stored scaled, as a tuple of vectors of channels:

    key, age          of the token with about the largest weight; age: the steps between it and t
    a, b              the sum divided by e^{key - age w}, the largest weight
    slope_a, slope_b  the derivatives of a and b by w, in a sum with slopes

So exp never overflows, and rounding errors do not add up over the distance.
"""

# ruff: noqa: RUF005 (Triton compiles no starred tuples)

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)
EPS = tl.constexpr(1e-6)  # of mode "upstream"
# A token replaces the sum's own token only if its exponent is larger by more than this. With keys about equal every token would replace it, and every
# step would multiply the sum by a number just below 1 that is rounded the same way each time.
MARGIN = tl.constexpr(0.125)


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2_E)


@triton.jit
def empty(like):
    zero = tl.zeros_like(like)
    return zero + LOWEST, zero, zero, zero, zero, zero


@triton.jit
def seen(s, w):
    """The sum as step t sees it: shift, a, b and the derivatives of a and b; the sum is e^shift times a and b."""
    return s[0] - s[1] * w, s[2], s[3], s[4], s[5]


@triton.jit
def weights(apart):
    """Two weights, the larger scaled to 1, whose exponents differ by `apart` = second - first. Returns whether the second is the larger, and both."""
    heavier = apart > MARGIN
    e = exp(tl.where(heavier, -apart, apart))
    return heavier, tl.where(heavier, e, 1.0), tl.where(heavier, 1.0, e)


@triton.jit
def add(s, w, live, key, a, b, SLOPE: tl.constexpr):
    """The sum after one more token. live: 1, or 0 past the end; there (a, b) is 0 too, and the sum does not change."""
    older = s[1] + live
    aged = s[0] - older * w
    key = tl.where(live > 0, key, LOWEST)
    heavier, kept, fresh = weights(key - aged)
    slope_a, slope_b = s[4], s[5]
    if SLOPE:
        slope_a, slope_b = kept * (slope_a - live * s[2]), kept * (slope_b - live * s[3])
    return tl.where(heavier, key, s[0]), tl.where(heavier, 0.0, older), kept * s[2] + fresh * a, kept * s[3] + fresh * b, slope_a, slope_b


@triton.jit
def later(s, steps):
    """The sum, seen `steps` steps later."""
    return s[0], s[1] + steps, s[2], s[3], s[4] - steps * s[2], s[5] - steps * s[3]


@triton.jit
def both(s, r, w):
    """The sum of two sums that are seen from the same step."""
    s_shift, r_shift = s[0] - s[1] * w, r[0] - r[1] * w
    heavier, kept, fresh = weights(r_shift - s_shift)
    return (
        tl.where(heavier, r[0], s[0]),
        tl.where(heavier, r[1], s[1]),
        kept * s[2] + fresh * r[2],
        kept * s[3] + fresh * r[3],
        kept * s[4] + fresh * r[4],
        kept * s[5] + fresh * r[5],
    )


@triton.jit
def taken(s, w, SLOPE: tl.constexpr):
    """Mode "upstream": a sum whose weights grow by w at each step, times 1 - e^w; in the form of `seen`."""
    high, small = tl.maximum(w, 0.0), tl.abs(w)
    # 1 - e^-|w|; for a small w by its series, since the difference would lose its digits
    series = small * (1 - small * (1 / 2 - small * (1 / 6 - small * (1 / 24 - small * (1 / 120 - small / 720)))))
    fall = tl.where(small < 0.25, series, 1 - exp(-small))
    factor = tl.where(w > 0, -fall, fall)
    slope_a, slope_b = s[4], s[5]
    if SLOPE:
        slope = exp(w - high)
        slope_a, slope_b = -(factor * slope_a + slope * s[2]), -(factor * slope_b + slope * s[3])
    return s[0] + s[1] * w + high, factor * s[2], factor * s[3], slope_a, slope_b


@triton.jit
def further(t, w):
    """A result of `seen`, from one step further away."""
    return t[0] - w, t[1], t[2], t[3] - t[1], t[4] - t[2]


@triton.jit
def load_sum(at, field, here, SLOPE: tl.constexpr):
    """at: pointers to the keys; field: from one of a sum's numbers to the next."""
    field = tl.cast(field, tl.int64)
    key = tl.load(at, mask=here, other=LOWEST)
    age, a = tl.load(at + field, mask=here, other=0.0), tl.load(at + 2 * field, mask=here, other=0.0)
    b = tl.load(at + 3 * field, mask=here, other=0.0)
    slope_a, slope_b = tl.zeros_like(key), tl.zeros_like(key)
    if SLOPE:
        slope_a, slope_b = tl.load(at + 4 * field, mask=here, other=0.0), tl.load(at + 5 * field, mask=here, other=0.0)
    return key, age, a, b, slope_a, slope_b


@triton.jit
def store_sum(at, field, here, s, SLOPE: tl.constexpr):
    field = tl.cast(field, tl.int64)
    for i in tl.static_range(6 if SLOPE else 4):
        tl.store(at + i * field, s[i], mask=here)


@triton.jit
def places(index, first, end, length, K: tl.constexpr, WALK: tl.constexpr, REVERSE: tl.constexpr):
    """The tokens of K steps from `first`, as 64-bit numbers, and 1 where the step is before `end`, else 0."""
    tokens, live = (), ()
    for j in tl.static_range(K):
        token = tl.minimum(first + j, end - 1)
        if REVERSE:
            token = length - 1 - token
        if WALK:
            token = tl.load(index + token)
        tokens = tokens + (token.to(tl.int64),)
        live = live + ((first + j < end).to(tl.float32),)
    return tokens, live


@triton.jit
def rows(values, tokens, live, here, step, K: tl.constexpr):
    """K tokens' channels in float32, 0 where not live. values: pointers to token 0's."""
    v = ()
    for j in tl.static_range(K):
        v = v + (tl.load(values + tokens[j] * step, mask=lanes(here, live[j]), other=0.0).to(tl.float32),)
    return v


@triton.jit
def lanes(here, live):
    """here & live, of a vector and a scalar."""
    return here & (tl.full(here.shape, 0.0, tl.float32) + live > 0)


@triton.jit
def program(begins, channels, chunks, TILE: tl.constexpr):
    """Batch element, chunk, its first step and the one after its last, the channels and which of them exist."""
    tiles = tl.cdiv(channels, TILE)
    i = tl.program_id(0)
    chunk, b = i // tiles % chunks, (i // tiles // chunks).to(tl.int64)
    d = (i % tiles * TILE + tl.arange(0, TILE)).to(tl.int64)
    begin, end = tl.load(begins + chunk).to(tl.int32), tl.load(begins + chunk + 1).to(tl.int32)
    return b, chunk.to(tl.int64), begin, end, d, d < channels
