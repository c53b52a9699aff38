"""The kernels of bi_wkv's forward pass, which the backward pass makes too. `triton.py` launches them.

A program is one warp; its lanes are channels. The walk is cut into chunks:

    1. `local`    sums each chunk's tokens twice: as seen from its end, and as seen from its start
    2. `carry`    goes over the chunks in both directions: the sums over all tokens before each chunk, and over all tokens after it
    3. `outputs`  goes through each chunk from its end, to save the sum over the later tokens once every K steps; then from its start, where
                  for K steps at a time the sums over the later tokens are computed from the saved one, in registers
"""

# ruff: noqa: RUF005, SIM108 (Triton compiles neither starred tuples nor every conditional expression)

from __future__ import annotations

import triton
import triton.language as tl

from medssm.kernels.bi_wkv.triton_steps import (
    EPS,
    LOWEST,
    add,
    both,
    empty,
    exp,
    further,
    lanes,
    later,
    load_sum,
    places,
    program,
    rows,
    seen,
    store_sum,
    taken,
)


@triton.jit
def local(
    k,
    v,
    y,
    w,
    index,
    begins,
    sums,
    length,
    channels,
    chunks,
    k_batch,
    k_token,
    k_channel,
    v_batch,
    v_token,
    v_channel,
    sums_direction,
    sums_field,
    K: tl.constexpr,
    TILE: tl.constexpr,
    ONES: tl.constexpr,
    SLOPE: tl.constexpr,
    WALK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """sums (2 directions, fields, b, chunks, d): of the chunk's tokens, as seen from the step after the chunk, and from the step before it.

    A token's a is v; its b is 1 (ONES), or y, which has v's strides.
    """
    b, chunk, begin, end, d, here = program(begins, channels, chunks, TILE)
    rate = tl.load(w + d, mask=here, other=0.0)
    k += b * k_batch + d * k_channel
    v += b * v_batch + d * v_channel
    y += b * v_batch + d * v_channel
    forth, back = empty(rate), empty(rate)
    for first in range(begin, end, K):
        tokens, live = places(index, first, end, length, K, WALK, REVERSE)
        keys, values = rows(k, tokens, live, here, k_token, K), rows(v, tokens, live, here, v_token, K)
        if ONES:
            ones = live
        else:
            ones = rows(y, tokens, live, here, v_token, K)
        for j in tl.static_range(K):
            forth = add(forth, rate, live[j], keys[j], values[j], ones[j], SLOPE)
            steps = (first + j - begin).to(tl.float32)
            back = both(back, _one(keys[j], steps, live[j], values[j], ones[j]), rate)
    at = sums + (b * chunks + chunk) * channels + d
    store_sum(at, sums_field, here, forth, SLOPE)
    store_sum(at + sums_direction, sums_field, here, back, SLOPE)


@triton.jit
def _one(key, age, live, a, b):
    """The sum of one token, seen from a distance."""
    zero = tl.zeros_like(key)
    return tl.where(zero + live > 0, key, LOWEST), zero + age, a, zero + b, -age * a, zero - age * b


@triton.jit
def _group(at, field, first, chunks, here, step, begins, GROUP: tl.constexpr, BACK: tl.constexpr, SLOPE: tl.constexpr):
    """The sums and lengths of GROUP chunks from the first on; BACK: counted from the last."""
    s, steps = (), ()
    for i in tl.static_range(GROUP):
        c = tl.minimum(first + i, chunks - 1)
        if BACK:
            c = chunks - 1 - c
        s = s + (load_sum(at + c * step, field, here, SLOPE),)
        steps = steps + ((tl.load(begins + c + 1) - tl.load(begins + c)).to(tl.float32),)
    return s, steps


@triton.jit
def _unless(condition, s, r):
    """The sum s, or r where the condition holds."""
    return (
        tl.where(condition, r[0], s[0]),
        tl.where(condition, r[1], s[1]),
        tl.where(condition, r[2], s[2]),
        tl.where(condition, r[3], s[3]),
        tl.where(condition, r[4], s[4]),
        tl.where(condition, r[5], s[5]),
    )


@triton.jit
def carry(sums, w, begins, fresh, channels, chunks, sums_field, GROUP: tl.constexpr, TILE: tl.constexpr, SLOPE: tl.constexpr, BACK: tl.constexpr):
    """sums (fields, b, chunks, d): each chunk's sum becomes the sum over all chunks before it; BACK: after it.

    fresh (chunks,): 1 where a segment begins.
    """
    tiles = tl.cdiv(channels, TILE)
    i = tl.program_id(0).to(tl.int64)
    d, b = i % tiles * TILE + tl.arange(0, TILE), i // tiles
    here = d < channels
    rate = tl.load(w + d, mask=here, other=0.0)
    at = sums + b * chunks * channels + d
    s = empty(rate)
    zero = tl.zeros((), tl.int64)
    group, steps = _group(at, sums_field, zero, chunks, here, channels, begins, GROUP, BACK, SLOPE)
    for first in range(zero, chunks, GROUP):
        next_group, next_steps = _group(
            at, sums_field, first + GROUP, chunks, here, channels, begins, GROUP, BACK, SLOPE
        )  # read while this group is used
        for j in tl.static_range(GROUP):
            c = first + j
            live = c < chunks
            if BACK:
                c = chunks - 1 - c
                anew = tl.load(fresh + c + 1, mask=live & (c + 1 < chunks), other=1)
            else:
                anew = tl.load(fresh + c, mask=live, other=1)
            s = _unless(anew > 0, s, empty(rate))
            store_sum(at + c * channels, sums_field, lanes(here, live.to(tl.float32)), s, SLOPE)
            s = both(later(s, steps[j]), group[j], rate)
        group, steps = next_group, next_steps


@triton.jit
def outputs(
    k,
    v,
    w,
    u,
    dout,
    index,
    begins,
    entry,
    kept,
    out,
    top,
    weights,
    length,
    channels,
    chunks,
    k_batch,
    k_token,
    k_channel,
    v_batch,
    v_token,
    v_channel,
    dout_batch,
    dout_token,
    dout_channel,
    entry_direction,
    entry_field,
    kept_batch,
    kept_field,
    top_field,
    weights_field,
    K: tl.constexpr,
    TILE: tl.constexpr,
    UPSTREAM: tl.constexpr,
    ENTRY: tl.constexpr,
    ADJOINT: tl.constexpr,
    WALK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """entry (2 directions, fields, b, chunks, d): the sums over the tokens before each chunk and after it. kept: memory for the saved sums.

    Writes out (b,l,d). ADJOINT, for the backward pass, writes instead top (3,b,l,d), for each output -shift, x = dout / denominator and y = x out, in
    the order of the walk; and weights (2,b,chunks,d), each chunk's parts of dw and du.
    """
    b, chunk, begin, end, d, here = program(begins, channels, chunks, TILE)
    rate, bonus = tl.load(w + d, mask=here, other=0.0), tl.load(u + d, mask=here, other=0.0)
    top_field = tl.cast(top_field, tl.int64)
    k += b * k_batch + d * k_channel
    v += b * v_batch + d * v_channel
    dout += b * dout_batch + d * dout_channel
    out += b * length * channels + d
    top += b * length * channels + d
    # Slots of the chunks before: at most one for each whole group of K steps, and one more for each chunk.
    kept += b * kept_batch + (begin // K + chunk) * channels + d
    past, future = empty(rate), empty(rate)
    if ENTRY:
        at = entry + (b * chunks + chunk) * channels + d
        past, future = load_sum(at, entry_field, here, ADJOINT), load_sum(at + entry_direction, entry_field, here, ADJOINT)
    groups = tl.cdiv(end - begin, K)
    for i in range(groups):
        first = begin + (groups - 1 - i) * K
        store_sum(kept + (groups - 1 - i) * channels, kept_field, here, future, ADJOINT)
        tokens, live = places(index, first, end, length, K, WALK, REVERSE)
        keys, values = rows(k, tokens, live, here, k_token, K), rows(v, tokens, live, here, v_token, K)
        for j in tl.static_range(K):
            future = add(future, rate, live[K - 1 - j], keys[K - 1 - j], values[K - 1 - j], live[K - 1 - j], ADJOINT)

    # Mode "exact" has one sum over earlier tokens. "upstream" has three: earlier chunks, this chunk, and what was subtracted with the wrong weight.
    before, left, origin = past, empty(rate), rate
    if UPSTREAM:
        past = empty(rate)
    dw, du = tl.zeros_like(rate), tl.zeros_like(rate)
    for i in range(groups):
        first = begin + i * K
        tokens, live = places(index, first, end, length, K, WALK, REVERSE)
        keys, values = rows(k, tokens, live, here, k_token, K), rows(v, tokens, live, here, v_token, K)
        if ADJOINT:
            gradients = rows(dout, tokens, live, here, dout_token, K)
        future = load_sum(kept + i * channels, kept_field, here, ADJOINT)
        ahead = ()
        for j in tl.static_range(K):
            ahead = ahead + (seen(future, rate),)
            future = add(future, rate, live[K - 1 - j], keys[K - 1 - j], values[K - 1 - j], live[K - 1 - j], ADJOINT)
        results = ()
        for j in tl.static_range(K):
            own = bonus + keys[j]
            if UPSTREAM:
                steps = (first + j - begin).to(tl.float32)
                origin = tl.where(first + j == begin, keys[j], origin)
                takes = tl.where(first + j == begin, 0.0, live[j])  # 0 for a chunk's first token
                left = add(left, -rate, takes, keys[j], takes * values[j], takes, ADJOINT)
                p, f = seen(past, rate), further(ahead[K - 1 - j], rate)
                q, r = further(seen(later(before, steps), rate), rate), taken(left, rate, ADJOINT)
                high = tl.maximum(tl.maximum(tl.maximum(own, origin + steps * rate), tl.maximum(p[0], f[0])), tl.maximum(q[0], r[0]))
                scale_q, scale_r = exp(q[0] - high), exp(r[0] - high)
            else:
                p, f = seen(past, rate), ahead[K - 1 - j]
                high = tl.maximum(own, tl.maximum(p[0], f[0]))
            scale_own, scale_p, scale_f = exp(own - high), exp(p[0] - high), exp(f[0] - high)
            a, c = scale_own * values[j] + scale_p * p[1] + scale_f * f[1], scale_own + scale_p * p[2] + scale_f * f[2]
            if UPSTREAM:
                a, c = a + scale_q * q[1] + scale_r * r[1], c + scale_q * q[2] + scale_r * r[2] + EPS
            inverse = 1 / c
            result = a * inverse
            if ADJOINT:
                x = gradients[j] * inverse
                y = x * result
                slope_a, slope_b = scale_p * p[3] + scale_f * f[3], scale_p * p[4] + scale_f * f[4]
                if UPSTREAM:
                    slope_a, slope_b = slope_a + scale_q * q[3] + scale_r * r[3], slope_b + scale_q * q[4] + scale_r * r[4]
                dw += live[j] * (x * slope_a - y * slope_b)
                du += live[j] * scale_own * (x * values[j] - y)
                results = results + ((-high, x, y),)
            else:
                results = results + (result,)
            past = add(past, rate, live[j], keys[j], values[j], live[j], ADJOINT)
        for j in tl.static_range(K):
            there = lanes(here, live[j])
            if ADJOINT:
                step = (first + j).to(tl.int64) * channels
                for field in tl.static_range(3):
                    tl.store(top + field * top_field + step, results[j][field], mask=there)
            else:
                tl.store(out + tokens[j] * channels, results[j].to(out.dtype.element_ty), mask=there)
    if ADJOINT:
        at = weights + (b * chunks + chunk) * channels + d
        tl.store(at, dw, mask=here)
        tl.store(at + weights_field, du, mask=here)
