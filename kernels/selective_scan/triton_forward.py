"""Selective scan forward on a GPU: the kernels. `triton.py` launches them.

A program is one warp. Its lanes are channels (TILE of them, one or two in a lane), and the N <= 16 states of a channel are N vectors that stay in
registers through the whole walk. So a step exchanges nothing between lanes, any walk through a volume reads whole rows, and B_t and C_t, which are
the same for all lanes, are read once for the tile.

Where batch and channels alone would leave the GPU idle, the walk is cut into chunks:

    1. `local`  scans each chunk from a zero state: its end state, and the sum of its steps (the decay through a whole chunk is exp(A sum s_t))
    2. `carry`  goes over the chunks: the state that enters each
    3. `apply`  scans each chunk from its entry state and writes the outputs

With one chunk there is only `apply`.
"""

# ruff: noqa: RUF005 (Triton does not compile starred tuples)

from __future__ import annotations

import triton
import triton.language as tl

from medssm.kernels.selective_scan.triton_steps import (
    decay,
    drives,
    numbers,
    offsets,
    positive,
    rates,
    raw_steps,
    rows,
    sigmoid,
    tile_of,
    vectors,
    visits,
)
from medssm.kernels.triton_tiles import span_of, where_live


@triton.jit
def local_steps(
    h,
    total,
    a,
    shift,
    u,
    delta,
    B,
    proj,
    index,
    keep,
    first,
    length,
    d,
    here,
    channels,
    u_token,
    delta_token,
    delta_channel,
    B_token,
    B_state,
    N: tl.constexpr,
    K: tl.constexpr,
    BYTES: tl.constexpr,
    RANK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    WALK: tl.constexpr,
    KEEP: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """h and the sum of the steps after K steps from `first`."""
    NEXT: tl.constexpr = 0 if WALK else (-1 if REVERSE else 1)
    tokens, live, fades = visits(index, keep, first, length, K, WALK, KEEP, REVERSE)
    raw = raw_steps(delta, proj, shift, tokens, d, here, channels, delta_token, delta_channel, K, RANK, NEXT)
    inputs = rows(u, tokens, here, u_token, K, NEXT)
    s = positive(raw, live, K, SOFTPLUS)
    su = drives(s, inputs, live, K)
    B_at = offsets(tokens, B_token, K, NEXT)
    for k in tl.static_range(K):
        total += s[k]
        B_t = numbers(B + B_at[k], B_state, N, BYTES)
        after = ()
        for n in tl.static_range(N):
            after = after + (decay(s[k], a[n], fades[k], KEEP) * h[n] + su[k] * B_t[n],)
        h = after
    return h, total


@triton.jit
def local(
    u,
    delta,
    A,
    B,
    bias,
    proj,
    index,
    keep,
    pieces,
    ends,
    sums,
    length,
    channels,
    groups,
    steps,
    chunks,
    u_batch,
    u_token,
    u_channel,
    delta_batch,
    delta_token,
    delta_channel,
    A_channel,
    A_state,
    B_batch,
    B_token,
    B_group,
    B_state,
    ends_batch,
    ends_chunk,
    N: tl.constexpr,
    K: tl.constexpr,
    BYTES: tl.constexpr,
    TILE: tl.constexpr,
    RANK: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    WALK: tl.constexpr,
    KEEP: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """ends (b,chunks,n,d): the state after each chunk, from zero; sums (b,chunks,d): of its steps."""
    tiles = groups * tl.cdiv(channels // groups, TILE)
    program = tl.program_id(0)
    chunk, b = program // tiles % chunks, (program // tiles // chunks).to(tl.int64)
    B_state, delta_channel = tl.cast(B_state, tl.int64), tl.cast(delta_channel, tl.int64)
    group, d, here = tile_of(program % tiles, channels, groups, TILE)
    a = rates(A, d, here, A_channel, A_state, N)
    shift = tl.zeros((TILE,), tl.float32)
    if BIAS:
        shift = tl.load(bias + d, mask=here, other=0.0)
    u += b * u_batch + d * u_channel
    delta += b * delta_batch
    B += b * B_batch + group * B_group
    h = vectors(ends, here, 0, N, False, shift)
    total = tl.zeros((TILE,), tl.float32)
    begin, end, _segment = span_of(chunk, pieces, length, steps, PACKED)
    end = tl.minimum(begin + steps, end)
    whole = end - (end - begin) % K
    for first in range(begin, whole, K):
        h, total = local_steps(
            h, total, a, shift, u, delta, B, proj, index, keep, first, length, d, here, channels,
            u_token, delta_token, delta_channel, B_token, B_state, N, K, BYTES, RANK, SOFTPLUS, WALK, KEEP, REVERSE,
        )  # fmt: skip
    for first in range(whole, end):
        h, total = local_steps(
            h, total, a, shift, u, delta, B, proj, index, keep, first, length, d, here, channels,
            u_token, delta_token, delta_channel, B_token, B_state, N, 1, BYTES, RANK, SOFTPLUS, WALK, KEEP, REVERSE,
        )  # fmt: skip
    for n in tl.static_range(N):
        tl.store(ends + b * ends_batch + chunk.to(tl.int64) * ends_chunk + n * channels + d, h[n], mask=here)
    tl.store(sums + (b * chunks + chunk) * channels + d, total, mask=here)


@triton.jit
def _group(values, sums, first, chunks, here, channels, values_chunk, GROUP: tl.constexpr, BACKWARD: tl.constexpr):
    """GROUP chunks' values and sums from the first on; zeros past the last."""
    v, s = (), ()
    for i in tl.static_range(GROUP):
        at = first + i
        live = where_live(here, at < chunks)
        if BACKWARD:
            at = chunks - 1 - at
        v = v + (tl.load(values + at * values_chunk, mask=live, other=0.0),)
        s = s + (tl.load(sums + at * channels, mask=live, other=0.0),)
    return v, s


@triton.jit
def carry(
    values,
    sums,
    A,
    entry,
    fades,
    bounds,
    channels,
    states,
    chunks,
    values_batch,
    values_chunk,
    A_channel,
    A_state,
    entry_batch,
    entry_state,
    entry_channel,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    ENTRY: tl.constexpr,
    KEEP: tl.constexpr,
    PACKED: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """values (b,chunks,n,d): each chunk's end state from a zero state becomes the state that enters it; BACKWARD: from the last chunk to the first.

    entry (b,d,n) enters the first chunk that is walked; fades (chunks,): -inf where the state begins anew within the chunk. A program has one state
    and a tile of channels. A chunk is one multiply-add, so the time is that of memory: each group of chunks is read while the one before is used.
    PACKED: each segment's chunks, from bounds on, are walked by programs of their own, and entry has a row for each.
    """
    tiles = tl.cdiv(channels, TILE)
    program = tl.program_id(0).to(tl.int64)
    n, b = program // tiles % states, program // tiles // states
    d = program % tiles * TILE + tl.arange(0, TILE)
    here = d < channels
    a = tl.load(A + d * A_channel + n * A_state, mask=here, other=0.0) * 1.4426950408889634
    h = tl.zeros((TILE,), tl.float32)
    if ENTRY:
        h = tl.load(entry + b * entry_batch + n * entry_state + d * entry_channel, mask=here, other=0.0).to(tl.float32)
    if PACKED:
        place = tl.load(bounds + b)
        chunks = (tl.load(bounds + b + 1) - place).to(tl.int32)
        values += place * values_chunk + n * channels + d
        sums += place * channels + d
    else:
        values += b * values_batch + n * channels + d
        sums += b * chunks * channels + d
    chunk = tl.zeros((), tl.int64)
    v, s = _group(values, sums, chunk, chunks, here, channels, values_chunk, GROUP, BACKWARD)
    for first in range(chunk, chunks, GROUP):
        next_v, next_s = _group(values, sums, first + GROUP, chunks, here, channels, values_chunk, GROUP, BACKWARD)
        for i in tl.static_range(GROUP):
            at = first + i
            live = at < chunks
            if BACKWARD:
                at = chunks - 1 - at
            fade = 0.0
            if KEEP:
                fade = tl.load(fades + at, mask=live, other=0.0)
            tl.store(values + at * values_chunk, h, mask=where_live(here, live))
            h = decay(s[i], a, fade, KEEP) * h + v[i]
        v, s = next_v, next_s


@triton.jit
def apply_steps(
    h,
    a,
    shift,
    skip,
    u,
    delta,
    B,
    C,
    z,
    proj,
    index,
    keep,
    earlier,
    out,
    scale,
    first,
    length,
    d,
    here,
    channels,
    u_token,
    delta_token,
    delta_channel,
    B_token,
    B_state,
    C_token,
    C_state,
    z_token,
    out_token,
    earlier_token,
    N: tl.constexpr,
    K: tl.constexpr,
    BYTES: tl.constexpr,
    RANK: tl.constexpr,
    SKIP: tl.constexpr,
    GATE: tl.constexpr,
    EARLIER: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    WALK: tl.constexpr,
    KEEP: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """h after K steps from `first`, whose outputs it writes."""
    NEXT: tl.constexpr = 0 if WALK else (-1 if REVERSE else 1)
    tokens, live, fades = visits(index, keep, first, length, K, WALK, KEEP, REVERSE)
    raw = raw_steps(delta, proj, shift, tokens, d, here, channels, delta_token, delta_channel, K, RANK, NEXT)
    inputs = rows(u, tokens, here, u_token, K, NEXT)
    if GATE:
        gates = rows(z, tokens, here, z_token, K, NEXT)
    if EARLIER:
        y = rows(earlier, tokens, here, earlier_token, K, NEXT)
    s = positive(raw, live, K, SOFTPLUS)
    su = drives(s, inputs, live, K)
    B_at, C_at = offsets(tokens, B_token, K, NEXT), offsets(tokens, C_token, K, NEXT)
    # Stores come after all loads: a store that might alias a load would delay it.
    results = ()
    for k in tl.static_range(K):
        B_t = numbers(B + B_at[k], B_state, N, BYTES)
        C_t = numbers(C + C_at[k], C_state, N, BYTES)
        after = ()
        result = tl.zeros_like(s[k])
        for n in tl.static_range(N):
            v = decay(s[k], a[n], fades[k], KEEP) * h[n] + su[k] * B_t[n]
            result += v * C_t[n]
            after = after + (v,)
        h = after
        if SKIP:
            result += skip * inputs[k]
        if EARLIER:
            result += y[k]
        result *= scale
        if GATE:
            result *= gates[k] * sigmoid(gates[k])
        results = results + (result,)
    out_at = offsets(tokens, out_token, K, NEXT)
    for k in tl.static_range(K):
        tl.store(out + out_at[k], results[k].to(out.dtype.element_ty), mask=here)
    return h


@triton.jit
def apply(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    bias,
    proj,
    index,
    keep,
    pieces,
    bounds,
    entry,
    out,
    earlier,
    checkpoints,
    state,
    scale,
    length,
    channels,
    groups,
    steps,
    chunks,
    u_batch,
    u_token,
    u_channel,
    delta_batch,
    delta_token,
    delta_channel,
    A_channel,
    A_state,
    B_batch,
    B_token,
    B_group,
    B_state,
    C_batch,
    C_token,
    C_group,
    C_state,
    z_batch,
    z_token,
    z_channel,
    entry_batch,
    entry_chunk,
    entry_state,
    entry_channel,
    out_batch,
    out_token,
    earlier_batch,
    earlier_token,
    checkpoints_batch,
    checkpoints_chunk,
    state_batch,
    state_channel,
    state_state,
    N: tl.constexpr,
    K: tl.constexpr,
    BYTES: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    RANK: tl.constexpr,
    BIAS: tl.constexpr,
    SKIP: tl.constexpr,
    GATE: tl.constexpr,
    ENTRY: tl.constexpr,
    EARLIER: tl.constexpr,
    SAVE: tl.constexpr,
    FINAL: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    WALK: tl.constexpr,
    KEEP: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """out = scale (y + D u + earlier) silu(z) along each chunk from its entry state (b,chunks,n,d).

    checkpoints (b,.,n,d): the state before every CHUNK steps (SAVE); state (b,d,n): after the last (FINAL). PACKED: a chunk may begin between two
    checkpoints, where its segment begins; state (segments,d,n): after the last chunk of each segment, as bounds tell.
    """
    tiles = groups * tl.cdiv(channels // groups, TILE)
    program = tl.program_id(0)
    chunk, b = program // tiles % chunks, (program // tiles // chunks).to(tl.int64)
    B_state, C_state, delta_channel = tl.cast(B_state, tl.int64), tl.cast(C_state, tl.int64), tl.cast(delta_channel, tl.int64)
    group, d, here = tile_of(program % tiles, channels, groups, TILE)
    a = rates(A, d, here, A_channel, A_state, N)
    shift = tl.zeros((TILE,), tl.float32)
    if BIAS:
        shift = tl.load(bias + d, mask=here, other=0.0)
    skip = shift
    if SKIP:
        skip = tl.load(D + d, mask=here, other=0.0)
    u += b * u_batch + d * u_channel
    delta += b * delta_batch
    z += b * z_batch + d * z_channel
    B += b * B_batch + group * B_group
    C += b * C_batch + group * C_group
    out += b * out_batch + d
    earlier += b * earlier_batch + d
    h = vectors(entry + b * entry_batch + chunk.to(tl.int64) * entry_chunk + d * entry_channel, here, entry_state, N, ENTRY, shift)
    begin, end, segment = span_of(chunk, pieces, length, steps, PACKED)
    end = tl.minimum(begin + steps, end)
    origin = begin
    if PACKED:
        origin -= begin % CHUNK
    for run in range(origin, end, CHUNK):
        if SAVE:
            saved = checkpoints + b * checkpoints_batch + tl.cast(run // CHUNK, tl.int64) * checkpoints_chunk + d
            for n in tl.static_range(N):
                tl.store(saved + n * channels, h[n], mask=where_live(here, run >= begin))
        start, stop = tl.maximum(run, begin), tl.minimum(run + CHUNK, end)
        whole = stop - (stop - start) % K
        for first in range(start, whole, K):
            h = apply_steps(
                h, a, shift, skip, u, delta, B, C, z, proj, index, keep, earlier, out, scale, first, length, d, here, channels,
                u_token, delta_token, delta_channel, B_token, B_state, C_token, C_state, z_token, out_token, earlier_token,
                N, K, BYTES, RANK, SKIP, GATE, EARLIER, SOFTPLUS, WALK, KEEP, REVERSE,
            )  # fmt: skip
        for first in range(whole, stop):
            h = apply_steps(
                h, a, shift, skip, u, delta, B, C, z, proj, index, keep, earlier, out, scale, first, length, d, here, channels,
                u_token, delta_token, delta_channel, B_token, B_state, C_token, C_state, z_token, out_token, earlier_token,
                N, 1, BYTES, RANK, SKIP, GATE, EARLIER, SOFTPLUS, WALK, KEEP, REVERSE,
            )  # fmt: skip
    if FINAL:
        closes, row = chunk == chunks - 1, b
        if PACKED:
            closes, row = chunk + 1 == tl.load(bounds + segment + 1), segment.to(tl.int64)
        if closes:
            for n in tl.static_range(N):
                tl.store(state + row * state_batch + d * state_channel + n * state_state, h[n], mask=here)
