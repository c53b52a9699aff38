"""Selective scan backward on a GPU: the kernels. `triton.py` launches them.

With g_t the gradient of h_t that comes from later steps, e_t = exp(s_t A) and dy_t = dout_t silu(z_t) scale:

    dh_t = g_t + dy_t C_t                 dC_t = sum over channels of dy_t h_t
    g_{t-1} = e_t dh_t                    dB_t = sum over channels of dh_t s_t u_t
    w_t = g_{t-1} h_{t-1}                 dA = sum over t of w_t s_t
    ds_t = u_t sum_n dh_t B_t + sum_n w_t A,    du_t = s_t sum_n dh_t B_t + D dy_t

As in the forward pass, a program is a warp with channels in its lanes, here one in a lane, and N <= 16 states in registers. g goes over the chunks as
the state does, but from the last chunk (`local_adjoint`, `carry`, `adjoint`); its decay through a chunk is the same.

`adjoint` takes the runs between two checkpoints, the last run first. It walks a run twice:

    forwards   from the checkpoint: dC, and what dz needs; it saves the state before every K steps (`saved_states`)
    backwards  in blocks of K steps: it computes e_t and h_{t-1} of a block again, from the saved state, and keeps them in registers

With K = 2 and 16 states that is 64 registers, beside 48 for the rates, g and dA. K = 4 would spill, and gain nothing: these kernels are bound by the
instructions they issue, not by the saved states (2 x 64 bytes for each token and channel if every step were saved, half of that with K = 2). The
memory for saved states belongs to the program, not to the chunk: the number of programs is fixed, and each takes one chunk after another.

Sums over channels are made for 32 values at a time: lanes exchange halves (`sums`), 31 shuffles in place of 160. The sums of K steps are one store.
"""

# ruff: noqa: RUF005 (Triton compiles neither starred tuples nor every conditional expression)

from __future__ import annotations

import triton
import triton.language as tl

from medssm.kernels.selective_scan.triton_steps import (
    LN_2,
    decay,
    drives,
    numbers,
    offsets,
    places,
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
def sums(values):
    """The sums over 32 lanes of up to 32 vectors (32,): lane i gets that of value i.

    Two vectors are folded into one: an even lane adds its neighbour's part of the first vector to its own, an odd lane likewise for the second. Then
    pairs are folded, and so on. Once one vector remains, the rest is an ordinary butterfly.
    """
    lane = tl.arange(0, 32)
    for level in tl.static_range(5):
        odd = (lane >> level & 1) != 0
        neighbour = lane ^ (1 << level)
        folded = ()
        for i in tl.static_range(len(values) // 2):
            kept = tl.where(odd, values[2 * i + 1], values[2 * i])
            given = tl.where(odd, values[2 * i], values[2 * i + 1])
            folded = folded + (kept + tl.gather(given, neighbour, 0),)
        if len(values) % 2 == 1:
            folded = folded + (values[len(values) - 1] + tl.gather(values[len(values) - 1], neighbour, 0),)
        values = folded
    return values[0]


@triton.jit
def upstream(dout, z, tokens, here, live, scale, dout_token, z_token, K: tl.constexpr, GATE: tl.constexpr, NEXT: tl.constexpr = 0):
    """dy of K tokens, and the gradient of z over y (zeros without a gate); both 0 past the end."""
    dy, dgate = (), ()
    dout_at, z_at = offsets(tokens, dout_token, K, NEXT), offsets(tokens, z_token, K, NEXT)
    for k in tl.static_range(K):
        g = tl.load(dout + dout_at[k], mask=where_live(here, live[k]), other=0.0).to(tl.float32) * scale
        if GATE:
            gate = tl.load(z + z_at[k], mask=here, other=0.0).to(tl.float32)
            open = sigmoid(gate)
            dgate = dgate + (g * open * (1.0 + gate * (1.0 - open)),)
            g *= gate * open
        else:
            dgate = dgate + (0.0,)
        dy = dy + (g,)
    return dy, dgate


@triton.jit
def store_rows(to, values, tokens, live, token_step, K: tl.constexpr):
    """Stores K rows of sums over lanes, one a token; values: those of the first token, then those of the second, …"""
    width: tl.constexpr = len(values) // K
    lane = tl.arange(0, 32)
    at = tl.zeros((32,), tl.int64)
    there = lane < 0
    for k in tl.static_range(K):
        mine = lane // width == k
        at = tl.where(mine, tokens[k] * token_step, at)
        there = there | where_live(mine, live[k])
    tl.store(to + at + lane % width, sums(values), mask=there)


@triton.jit
def walk_forwards(
    h,
    a,
    s,
    su,
    dy,
    fades,
    tokens,
    B,
    C,
    B_token,
    B_state,
    C_token,
    C_state,
    N: tl.constexpr,
    K: tl.constexpr,
    BYTES: tl.constexpr,
    GATE: tl.constexpr,
    KEEP: tl.constexpr,
):
    """K steps: (h after them, dC's products, y without D u, zero where no gate needs it)."""
    products, outputs = (), ()
    for k in tl.static_range(K):
        B_t = numbers(B + tokens[k] * B_token, B_state, N, BYTES)
        if GATE:
            C_t = numbers(C + tokens[k] * C_token, C_state, N, BYTES)
        after = ()
        y = tl.zeros_like(s[k])
        for n in tl.static_range(N):
            v = decay(s[k], a[n], fades[k], KEEP) * h[n] + su[k] * B_t[n]
            if GATE:
                y += v * C_t[n]
            products = products + (dy[k] * v,)
            after = after + (v,)
        h = after
        outputs = outputs + (y,)
    return h, products, outputs


@triton.jit
def walk_backwards(
    g,
    A_sums,
    h,
    a,
    s,
    su,
    dy,
    fades,
    tokens,
    B,
    C,
    B_token,
    B_state,
    C_token,
    C_state,
    N: tl.constexpr,
    K: tl.constexpr,
    BYTES: tl.constexpr,
    KEEP: tl.constexpr,
):
    """K steps from the last, h the state before them: (g before them, A_sums, dB's products, sum_n dh_t B_t, sum_n w_t A log2 e)."""
    before, decays = (), ()  # h_{t-1} and e_t, N of each token
    for k in tl.static_range(K):
        B_t = numbers(B + tokens[k] * B_token, B_state, N, BYTES)
        after = ()
        for n in tl.static_range(N):
            e = decay(s[k], a[n], fades[k], KEEP)
            before = before + (h[n],)
            decays = decays + (e,)
            after = after + (e * h[n] + su[k] * B_t[n],)
        h = after
    products, along_B, along_A = (), (), ()
    for k in tl.static_range(K - 1, -1, -1):
        by_B = tl.zeros_like(s[k])
        by_A = tl.zeros_like(s[k])
        B_t = numbers(B + tokens[k] * B_token, B_state, N, BYTES)
        C_t = numbers(C + tokens[k] * C_token, C_state, N, BYTES)
        earlier, totals, row = (), (), ()
        for n in tl.static_range(N):
            dh = g[n] + dy[k] * C_t[n]
            row = row + (dh * su[k],)
            by_B += dh * B_t[n]
            dh *= decays[k * N + n]
            w = dh * before[k * N + n]
            by_A += w * a[n]
            totals = totals + (A_sums[n] + w * s[k],)
            earlier = earlier + (dh,)
        g, A_sums = earlier, totals
        products, along_B, along_A = row + products, (by_B,) + along_B, (by_A,) + along_A
    return g, A_sums, products, along_B, along_A


@triton.jit
def local_steps_back(
    g,
    total,
    a,
    shift,
    dout,
    delta,
    C,
    z,
    proj,
    index,
    keep,
    scale,
    first,
    length,
    d,
    here,
    channels,
    dout_token,
    delta_token,
    delta_channel,
    C_token,
    C_state,
    z_token,
    N: tl.constexpr,
    K: tl.constexpr,
    BYTES: tl.constexpr,
    RANK: tl.constexpr,
    GATE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    WALK: tl.constexpr,
    KEEP: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """g and the sum of the steps before K steps from `first`."""
    NEXT: tl.constexpr = 0 if WALK else (-1 if REVERSE else 1)
    tokens, live, fades = visits(index, keep, first, length, K, WALK, KEEP, REVERSE)
    raw = raw_steps(delta, proj, shift, tokens, d, here, channels, delta_token, delta_channel, K, RANK, NEXT)
    dy, _ = upstream(dout, z, tokens, here, live, scale, dout_token, z_token, K, GATE, NEXT)
    s = positive(raw, live, K, SOFTPLUS)
    C_at = offsets(tokens, C_token, K, NEXT)
    for k in tl.static_range(K - 1, -1, -1):
        total += s[k]
        C_t = numbers(C + C_at[k], C_state, N, BYTES)
        before = ()
        for n in tl.static_range(N):
            before = before + (decay(s[k], a[n], fades[k], KEEP) * (g[n] + dy[k] * C_t[n]),)
        g = before
    return g, total


@triton.jit
def local_adjoint(
    dout,
    delta,
    A,
    C,
    z,
    bias,
    proj,
    index,
    keep,
    pieces,
    ends,
    totals,
    scale,
    length,
    channels,
    groups,
    steps,
    chunks,
    dout_batch,
    dout_token,
    dout_channel,
    delta_batch,
    delta_token,
    delta_channel,
    A_channel,
    A_state,
    C_batch,
    C_token,
    C_group,
    C_state,
    z_batch,
    z_token,
    z_channel,
    ends_batch,
    ends_chunk,
    N: tl.constexpr,
    K: tl.constexpr,
    BYTES: tl.constexpr,
    TILE: tl.constexpr,
    RANK: tl.constexpr,
    BIAS: tl.constexpr,
    GATE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    WALK: tl.constexpr,
    KEEP: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """ends (b,chunks,n,d): g before each chunk, from none after it; totals (b,chunks,d): of its steps."""
    tiles = groups * tl.cdiv(channels // groups, TILE)
    program = tl.program_id(0)
    chunk, b = program // tiles % chunks, (program // tiles // chunks).to(tl.int64)
    C_state, delta_channel = tl.cast(C_state, tl.int64), tl.cast(delta_channel, tl.int64)
    group, d, here = tile_of(program % tiles, channels, groups, TILE)
    a = rates(A, d, here, A_channel, A_state, N)
    shift = tl.zeros((TILE,), tl.float32)
    if BIAS:
        shift = tl.load(bias + d, mask=here, other=0.0)
    dout += b * dout_batch + d * dout_channel
    delta += b * delta_batch
    z += b * z_batch + d * z_channel
    C += b * C_batch + group * C_group
    g = vectors(ends, here, 0, N, False, shift)
    total = tl.zeros((TILE,), tl.float32)
    begin, end, _segment = span_of(chunk, pieces, length, steps, PACKED)
    end = tl.minimum(begin + steps, end)
    whole = end - (end - begin) % K
    for i in range(end - whole):
        g, total = local_steps_back(
            g, total, a, shift, dout, delta, C, z, proj, index, keep, scale, end - 1 - i, length, d, here, channels,
            dout_token, delta_token, delta_channel, C_token, C_state, z_token, N, 1, BYTES, RANK, GATE, SOFTPLUS, WALK, KEEP, REVERSE,
        )  # fmt: skip
    for block in range((whole - begin) // K):
        g, total = local_steps_back(
            g, total, a, shift, dout, delta, C, z, proj, index, keep, scale, whole - (block + 1) * K, length, d, here, channels,
            dout_token, delta_token, delta_channel, C_token, C_state, z_token, N, K, BYTES, RANK, GATE, SOFTPLUS, WALK, KEEP, REVERSE,
        )  # fmt: skip
    for n in tl.static_range(N):
        tl.store(ends + b * ends_batch + tl.cast(chunk, tl.int64) * ends_chunk + n * channels + d, g[n], mask=here)
    tl.store(totals + (b * chunks + chunk) * channels + d, total, mask=here)


@triton.jit
def adjoint(
    dout,
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
    checkpoints,
    entry,
    exit,
    saved_states,
    du,
    du_earlier,
    ddelta,
    ddelta_earlier,
    dz,
    dz_earlier,
    dA,
    dB,
    dC,
    dD,
    dbias,
    dproj,
    dinitial,
    scale,
    items,
    batch,
    length,
    channels,
    groups,
    steps,
    chunks,
    dout_batch,
    dout_token,
    dout_channel,
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
    checkpoints_batch,
    checkpoints_chunk,
    entry_segment,
    entry_channel,
    entry_state,
    exit_batch,
    exit_chunk,
    exit_state,
    exit_channel,
    du_batch,
    du_token,
    du_earlier_batch,
    du_earlier_token,
    ddelta_batch,
    ddelta_token,
    ddelta_earlier_batch,
    ddelta_earlier_token,
    dz_batch,
    dz_token,
    dz_earlier_batch,
    dz_earlier_token,
    dinitial_batch,
    dinitial_channel,
    dinitial_state,
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
    EXIT: tl.constexpr,
    INITIAL: tl.constexpr,
    DU_EARLIER: tl.constexpr,
    DDELTA_EARLIER: tl.constexpr,
    DZ_EARLIER: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    WALK: tl.constexpr,
    KEEP: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Gradients along each chunk from g after it (exit, (b,chunks,n,d)) and the states at its checkpoints (b,.,n,d).

    du, ddelta, dz (b,l,d): added to what is earlier. Partial sums: dA (b,chunks,n,d), dD, dbias (b,chunks,d), dB, dC (tiles,b,l,g,n);
    low-rank: ddelta (tiles of all groups,b,l,r), dproj (b,chunks,r,d), zeros before. dinitial (b,d,n). saved_states (programs, CHUNK / K, N, TILE).
    PACKED: a segment that begins between two checkpoints begins with its row of entry (segments,d,n), zeros without ENTRY; dinitial (segments,d,n).
    """
    tiles_of_group = tl.cdiv(channels // groups, TILE)
    tiles = groups * tiles_of_group
    B_state, C_state, delta_channel = tl.cast(B_state, tl.int64), tl.cast(C_state, tl.int64), tl.cast(delta_channel, tl.int64)
    lane = tl.arange(0, TILE)
    saved_states += tl.program_id(0).to(tl.int64) * (CHUNK // K * N * TILE) + lane
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        tile, chunk, b = item % tiles, item // tiles % chunks, tl.cast(item // tiles // chunks, tl.int64)
        group, d, here = tile_of(tile, channels, groups, TILE)
        a = rates(A, d, here, A_channel, A_state, N)
        shift = tl.zeros((TILE,), tl.float32)
        if BIAS:
            shift = tl.load(bias + d, mask=here, other=0.0)
        if SKIP:
            skip = tl.load(D + d, mask=here, other=0.0)
        dout_at = dout + b * dout_batch + d * dout_channel
        u_at = u + b * u_batch + d * u_channel
        delta_at = delta + b * delta_batch
        z_at = z + b * z_batch + d * z_channel
        B_at = B + b * B_batch + group * B_group
        C_at = C + b * C_batch + group * C_group
        row = ((tile % tiles_of_group * batch + b) * length * groups + group) * N  # of dB and dC
        g = vectors(exit + b * exit_batch + tl.cast(chunk, tl.int64) * exit_chunk + d * exit_channel, here, exit_state, N, EXIT, shift)
        A_sums = vectors(exit, here, 0, N, False, shift)
        D_sum = tl.zeros((TILE,), tl.float32)
        bias_sum = tl.zeros((TILE,), tl.float32)
        begin_of_chunk, end_of_chunk, segment = span_of(chunk, pieces, length, steps, PACKED)
        end_of_chunk = tl.minimum(begin_of_chunk + steps, end_of_chunk)
        origin = begin_of_chunk
        if PACKED:
            origin -= begin_of_chunk % CHUNK
        runs = tl.cdiv(end_of_chunk - origin, CHUNK)
        for run in range(runs):
            begin = origin + (runs - 1 - run) * CHUNK
            end = tl.minimum(begin + CHUNK, end_of_chunk)
            saved = checkpoints + b * checkpoints_batch + tl.cast(begin // CHUNK, tl.int64) * checkpoints_chunk + d
            if PACKED:
                h = vectors(saved, where_live(here, begin >= begin_of_chunk), channels, N, True, shift)
                if ENTRY:
                    entered = entry + segment.to(tl.int64) * entry_segment + d * entry_channel
                    entered = vectors(entered, where_live(here, begin < begin_of_chunk), entry_state, N, True, shift)
                    either = ()
                    for n in tl.static_range(N):
                        either = either + (h[n] + entered[n],)
                    h = either
                begin = tl.maximum(begin, begin_of_chunk)
            else:
                h = vectors(saved, here, channels, N, True, shift)
            blocks = tl.cdiv(end - begin, K)

            for block in range(blocks):
                for n in tl.static_range(N):
                    tl.store(saved_states + (block * N + n) * TILE, h[n])
                tokens, live, fades = places(index, keep, begin + block * K, end, length, K, WALK, KEEP, REVERSE)
                raw = raw_steps(delta_at, proj, shift, tokens, d, here, channels, delta_token, delta_channel, K, RANK)
                inputs = rows(u_at, tokens, here, u_token, K)
                dy, dgate = upstream(dout_at, z_at, tokens, here, live, scale, dout_token, z_token, K, GATE)
                if DZ_EARLIER:
                    gate_sums = rows(dz_earlier + b * dz_earlier_batch + d, tokens, here, dz_earlier_token, K)
                s = positive(raw, live, K, SOFTPLUS)
                su = drives(s, inputs, live, K)
                h, products, y = walk_forwards(
                    h, a, s, su, dy, fades, tokens, B_at, C_at, B_token, B_state, C_token, C_state, N, K, BYTES, GATE, KEEP
                )
                store_rows(dC + row, products, tokens, live, groups * N, K)
                if GATE:
                    for k in tl.static_range(K):
                        dgated = y[k]
                        if SKIP:
                            dgated += skip * inputs[k]
                        dgated *= dgate[k]
                        if DZ_EARLIER:
                            dgated += gate_sums[k]
                        tl.store(dz + b * dz_batch + tokens[k] * dz_token + d, dgated.to(dz.dtype.element_ty), mask=where_live(here, live[k]))
            tl.debug_barrier()  # a lane may read a state that another lane saved

            for i in range(blocks):
                block = blocks - 1 - i
                tokens, live, fades = places(index, keep, begin + block * K, end, length, K, WALK, KEEP, REVERSE)
                raw = raw_steps(delta_at, proj, shift, tokens, d, here, channels, delta_token, delta_channel, K, RANK)
                inputs = rows(u_at, tokens, here, u_token, K)
                dy, _ = upstream(dout_at, z_at, tokens, here, live, scale, dout_token, z_token, K, GATE)
                s = positive(raw, live, K, SOFTPLUS)
                su = drives(s, inputs, live, K)
                before = vectors(saved_states + block * N * TILE, lane >= 0, TILE, N, True, shift)
                g, A_sums, products, along_B, along_A = walk_backwards(
                    g, A_sums, before, a, s, su, dy, fades, tokens, B_at, C_at, B_token, B_state, C_token, C_state, N, K, BYTES, KEEP
                )
                store_rows(dB + row, products, tokens, live, groups * N, K)
                dsteps = ()
                for k in tl.static_range(K):
                    x = s[k] * along_B[k]
                    if SKIP:
                        x += skip * dy[k]
                        D_sum += dy[k] * inputs[k]
                    if DU_EARLIER:
                        x += tl.load(du_earlier + b * du_earlier_batch + tokens[k] * du_earlier_token + d, mask=here, other=0.0)
                    tl.store(du + b * du_batch + tokens[k] * du_token + d, x.to(du.dtype.element_ty), mask=where_live(here, live[k]))
                    ds = tl.where(live[k], inputs[k] * along_B[k] + along_A[k] * LN_2, 0.0)
                    if SOFTPLUS:
                        ds *= sigmoid(raw[k])
                    bias_sum += ds
                    dsteps = dsteps + (ds,)
                    if RANK == 0:
                        if DDELTA_EARLIER:
                            ds += tl.load(ddelta_earlier + b * ddelta_earlier_batch + tokens[k] * ddelta_earlier_token + d, mask=here, other=0.0)
                        tl.store(
                            ddelta + b * ddelta_batch + tokens[k] * ddelta_token + d, ds.to(ddelta.dtype.element_ty), mask=where_live(here, live[k])
                        )
                if RANK > 0:
                    for r in range(RANK):
                        p = tl.load(proj + r * channels + d, mask=here, other=0.0)
                        to_proj = dproj + ((b * chunks + chunk) * RANK + r) * channels + d
                        proj_sum = tl.load(to_proj, mask=here, other=0.0)
                        parts = ()
                        for k in tl.static_range(K):
                            proj_sum += dsteps[k] * tl.load(delta_at + tokens[k] * delta_token + r * delta_channel).to(tl.float32)
                            parts = parts + (dsteps[k] * p,)
                        tl.store(to_proj, proj_sum, mask=here)
                        store_rows(ddelta + (tile * batch + b) * length * RANK + r, parts, tokens, live, RANK, K)
            tl.debug_barrier()  # before the next run overwrites the saved states
        partial = (b * chunks + chunk) * channels + d
        for n in tl.static_range(N):
            tl.store(dA + ((b * chunks + chunk) * N + n) * channels + d, A_sums[n], mask=here)
        if SKIP:
            tl.store(dD + partial, D_sum, mask=here)
        if BIAS:
            tl.store(dbias + partial, bias_sum, mask=here)
        if INITIAL:
            opens, row = chunk == 0, b
            if PACKED:
                opens, row = chunk == tl.load(bounds + segment), segment.to(tl.int64)
            if opens:
                for n in tl.static_range(N):
                    tl.store(
                        dinitial + row * dinitial_batch + d * dinitial_channel + n * dinitial_state, g[n].to(dinitial.dtype.element_ty), mask=here
                    )
