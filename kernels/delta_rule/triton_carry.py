"""The delta rule on a GPU: the state from chunk to chunk, forward and backward, and from segment to segment. `triton.py` launches them.

A program has a tile of value channels, whose columns of the state are independent, and walks the chunks of a segment. Where that would leave a GPU
idle, the walk is cut into many segments, carried in two levels. A segment turns the state S that enters it into M S + N, where M (dk, dk) and
N (dk, dv) do not depend on S:

    1. `carry` ACROSS all segments in parallel: the columns of N start from zeros, those of M from the identity and without values
    2. `compose` from segment to segment: the state that enters each
    3. `carry` within all segments in parallel

`carry_back` does the same with gradients, and M transposed. Where |k| is at most 1 and beta in [0, 2], no M enlarges a state, so composing is stable.
With longer keys states grow, and rounding errors grow alike in one level and in two; an M beyond float32's range gives NaN even if all values are 0.
"""

# ruff: noqa: RUF005 (Triton compiles no starred tuples)

from __future__ import annotations

import triton
import triton.language as tl

from medssm.kernels.delta_rule.triton_chunks import edge_decays, log_decays, state_tiles, state_times, store, store_tiles
from medssm.kernels.triton_tiles import product, span_of, tile, visited


@triton.jit
def carry(
    k,
    v,
    beta,
    g,
    fresh,
    index,
    pieces,
    bounds,
    inverses,
    recalled,
    states,
    length,
    heads,
    dk,
    dv,
    chunks,
    slots,
    segment,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    beta_batch,
    beta_token,
    beta_head,
    g_batch,
    g_token,
    g_head,
    KNOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    GATED: tl.constexpr,
    FRESH: tl.constexpr,
    PACKED: tl.constexpr,
    WALK: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """states (b*h, slots, dk, dv): the state that enters each chunk, and the state that leaves the last. The first of each segment is given.

    recalled (b,l,h,dv): exp(g_t) S_{t-1}^T k_t, written; KNOWN: read instead. PARTS: tiles of keys of a state in registers; 0: it stays in memory.
    ACROSS: states (b*h, segments - 1, dk, dv + dk), given as [0, I], become the [N, M] of all segments but the last; recalled is not written.
    """
    segments = tl.cdiv(chunks, segment)
    if PACKED:
        segments = slots - chunks
    width, walks = (dv + dk if ACROSS else dv), (segments - 1 if ACROSS else segments)
    tiles = tl.cdiv(width, BV)
    row, shift = (tl.program_id(0) // tiles // walks).to(tl.int64), tl.program_id(0) // tiles % walks
    first = shift * segment
    stop = tl.minimum(first + segment, chunks)
    if PACKED:
        first, stop = tl.load(bounds + shift).to(tl.int32), tl.load(bounds + shift + 1).to(tl.int32)
    else:
        shift = 0
    b, h = row // heads, row % heads
    inside, values = tl.arange(0, CHUNK), tl.program_id(0) % tiles * BV + tl.arange(0, BV)
    here, valued = values < width, values < dv
    square = inside[:, None] * CHUNK + inside[None, :]
    k += b * k_batch + h * k_head
    v += b * v_batch + h * v_head
    beta += b * beta_batch + h * beta_head
    g += b * g_batch + h * g_head
    recalled += b * length * heads * dv + h * dv
    entry = states + ((tl.program_id(0) // tiles).to(tl.int64) if ACROSS else row * slots + first + shift) * dk * width
    state = state_tiles(entry, dk, width, values, here, PARTS, BK)
    for chunk in range(first, stop):
        begin, end, _ = span_of(chunk, pieces, length, CHUNK, PACKED)
        step = begin + inside
        live = step < end
        token = visited(index, step, length, WALK, REVERSE)
        v_t = tile(v, token * v_token, values, live, valued)
        shares = tl.load(beta + token * beta_token, mask=live, other=0.0).to(tl.float32)
        from_begin, to_end, through = edge_decays(log_decays(g, fresh, token, step, live, g_token, GATED, FRESH), GATED or FRESH)
        if KNOWN:
            w = v_t - tile(recalled, token * heads * dv, values, live, valued)
        else:
            entered = state_times(k, token * k_token, live, state, entry, dk, width, values, here, CHUNK, PARTS, BK, BV)
            solve = tl.load(inverses + (row * chunks + chunk) * CHUNK * CHUNK + square)
            w = product(solve, v_t - from_begin[:, None] * entered)
            if not ACROSS:
                tl.store(recalled + (token * heads * dv)[:, None] + values[None, :], v_t - w, mask=live[:, None] & here[None, :])
        u = w * (to_end * shares)[:, None]
        leaving = entry if ACROSS else entry + dk * dv
        written = (chunk + 1 < stop) | (stop == chunks)  # the state that enters the next segment is written already
        if PACKED:
            written = stop > first
        if PARTS > 0:
            after = ()
            for part in tl.static_range(PARTS):
                keys = part * BK + tl.arange(0, BK)
                after = after + (state[part] * through + product(tl.trans(tile(k, token * k_token, keys, live, keys < dk)), u),)
            state = after
            if not ACROSS and written:
                store_tiles(leaving, state, dk, width, values, here, PARTS, BK)
        elif ACROSS or written:
            if ACROSS:
                tl.debug_barrier()  # other threads have read what is overwritten
            for part in range(0, dk, BK):
                keys = part + tl.arange(0, BK)
                k_t = tl.trans(tile(k, token * k_token, keys, live, keys < dk))
                store(leaving, tile(entry, keys * width, values, keys < dk, here) * through + product(k_t, u), keys, dk, width, values, here)
            tl.debug_barrier()  # other threads read it
        entry = leaving
    if ACROSS and PARTS > 0:
        store_tiles(entry, state, dk, width, values, here, PARTS, BK)


@triton.jit
def compose(ends, states, dk, dv, chunks, segment, BACK: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """states (b*h, chunks + 1, dk, dv): the state that enters each segment, M S + N of the segment before it. ends (b*h, segments - 1, dk, dv + dk):
    [N, M]. BACK: from the last segment to the first.
    """
    tiles, segments, width = tl.cdiv(dv, BV), tl.cdiv(chunks, segment), dv + dk
    row = (tl.program_id(0) // tiles).to(tl.int64)
    values = tl.program_id(0) % tiles * BV + tl.arange(0, BV)
    here = values < dv
    for i in range(1, segments):
        if BACK:
            end = segments - 1 - i
            source, target = tl.minimum((end + 2) * segment, chunks), (end + 1) * segment
        else:
            end = i - 1
            source, target = end * segment, i * segment
        entry, leaving = states + (row * (chunks + 1) + source) * dk * dv, states + (row * (chunks + 1) + target) * dk * dv
        through = ends + (row * (segments - 1) + end) * dk * width
        for first in range(0, dk, BK):
            to = first + tl.arange(0, BK)
            state = tile(through, to * width, values, to < dk, here)
            for part in range(0, dk, BK):
                keys = part + tl.arange(0, BK)
                m = tile(through + dv, to * width, keys, to < dk, keys < dk)
                state += product(m, tile(entry, keys * dv, values, keys < dk, here))
            store(leaving, state, to, dk, dv, values, here)
        tl.debug_barrier()  # other threads read it


@triton.jit
def carry_back(
    k,
    beta,
    g,
    fresh,
    index,
    pieces,
    bounds,
    inverses,
    r,
    exits,
    states,
    length,
    heads,
    dk,
    dv,
    chunks,
    slots,
    segment,
    k_batch,
    k_token,
    k_head,
    beta_batch,
    beta_token,
    beta_head,
    g_batch,
    g_token,
    g_head,
    ACROSS: tl.constexpr,
    GATED: tl.constexpr,
    FRESH: tl.constexpr,
    PACKED: tl.constexpr,
    WALK: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """r and exits (b*h, slots, dk, dv), as `outer` wrote them, become R and the gradients of the states that enter the chunks. The gradient of
    the state that leaves the last chunk of each segment is given. states is exits; PARTS as in `carry`.

    ACROSS: states (b*h, segments - 1, dk, dv + dk), given as [0, I], become the [N, M] of all segments but the first; r and exits are only read.
    """
    segments = tl.cdiv(chunks, segment)
    if PACKED:
        segments = slots - chunks
    width, walks = (dv + dk if ACROSS else dv), (segments - 1 if ACROSS else segments)
    tiles = tl.cdiv(width, BV)
    row, shift = (tl.program_id(0) // tiles // walks).to(tl.int64), tl.program_id(0) // tiles % walks
    first = (shift + segments - walks) * segment
    stop = tl.minimum(first + segment, chunks)
    if PACKED:
        first, stop = tl.load(bounds + shift).to(tl.int32), tl.load(bounds + shift + 1).to(tl.int32)
    else:
        shift = 0
    b, h = row // heads, row % heads
    inside, values = tl.arange(0, CHUNK), tl.program_id(0) % tiles * BV + tl.arange(0, BV)
    here, valued = values < width, values < dv
    square = inside[None, :] * CHUNK + inside[:, None]  # transposed
    k += b * k_batch + h * k_head
    beta += b * beta_batch + h * beta_head
    g += b * g_batch + h * g_head
    r += b * length * heads * dv + h * dv
    own = exits + (row * slots + stop + shift) * dk * dv
    leaving = states + ((tl.program_id(0) // tiles).to(tl.int64) if ACROSS else row * slots + stop + shift) * dk * width
    ds = state_tiles(leaving, dk, width, values, here, PARTS, BK)
    for i in range(first, stop):
        chunk = first + stop - 1 - i
        begin, end, _ = span_of(chunk, pieces, length, CHUNK, PACKED)
        step = begin + inside
        live = step < end
        token = visited(index, step, length, WALK, REVERSE)
        shares = tl.load(beta + token * beta_token, mask=live, other=0.0).to(tl.float32)
        from_begin, to_end, through = edge_decays(log_decays(g, fresh, token, step, live, g_token, GATED, FRESH), GATED or FRESH)
        left = state_times(k, token * k_token, live, ds, leaving, dk, width, values, here, CHUNK, PARTS, BK, BV)
        solve = tl.load(inverses + (row * chunks + chunk) * CHUNK * CHUNK + square)
        behind = product(solve, tile(r, token * heads * dv, values, live, valued) + to_end[:, None] * left)
        if not ACROSS:
            tl.store(r + (token * heads * dv)[:, None] + values[None, :], behind, mask=live[:, None] & here[None, :])
        behind *= (shares * from_begin)[:, None]
        own -= dk * dv
        entry = leaving if ACROSS else own
        written = (chunk > first) | (first == 0)  # the gradient of what leaves the segment before is written already
        if PACKED:
            written = stop > first
        if PARTS > 0:
            before = ()
            for part in tl.static_range(PARTS):
                keys = part * BK + tl.arange(0, BK)
                fed = tile(own, keys * dv, values, keys < dk, valued)
                before = before + (ds[part] * through + (fed - product(tl.trans(tile(k, token * k_token, keys, live, keys < dk)), behind)),)
            ds = before
            if not ACROSS and written:
                store_tiles(entry, ds, dk, width, values, here, PARTS, BK)
        elif ACROSS or written:
            if ACROSS:
                tl.debug_barrier()  # other threads have read what is overwritten
            for part in range(0, dk, BK):
                keys = part + tl.arange(0, BK)
                fed = tile(own, keys * dv, values, keys < dk, valued)
                fed -= product(tl.trans(tile(k, token * k_token, keys, live, keys < dk)), behind)
                store(entry, tile(leaving, keys * width, values, keys < dk, here) * through + fed, keys, dk, width, values, here)
            tl.debug_barrier()  # other threads read it
        leaving = entry
    if ACROSS and PARTS > 0:
        store_tiles(leaving, ds, dk, width, values, here, PARTS, BK)
