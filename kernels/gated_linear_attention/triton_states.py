"""The states at the chunks' edges: what each chunk adds, in parallel, and the recurrence over the chunks.

Slot c of `states` (b*h, chunks + 1, dk, dv) is the state that enters chunk c; the last slot is the final state. Backwards it is the gradient of
that state, slot 0 that of the initial one. A state is carried unbroken over a chunk's edge: where the walk begins anew, what reads it looks away.
"""

# ruff: noqa: RUF005, SIM108 (Triton compiles neither starred tuples nor every conditional expression)

from __future__ import annotations

import triton
import triton.language as tl

from medssm.kernels.gated_linear_attention.triton_tiles import HEAD, KEY, log_decays, product, scaled_tile, segment_of, tile, visited


@triton.jit
def chunk_states(k, v, g, steps, z, index, segment, states, decays, scale, length, heads, k_repeat, v_repeat, dk, dv, chunks, k_batch, k_token,
                 k_head, v_batch, v_token, v_head, g_batch, g_token, g_head, z_batch, z_token, z_head, BACKWARD: tl.constexpr, DECAY: tl.constexpr,
                 V_BY: tl.constexpr, WALK: tl.constexpr, STARTS: tl.constexpr, REVERSE: tl.constexpr, CHUNK: tl.constexpr,
                 BK: tl.constexpr, BV: tl.constexpr):
    """Forwards, slot c + 1 becomes sum_i exp(G_end - G_i) k_i v_i^T over chunk c, and decays (b*h, chunks[, dk]) what it leaves of the state before.

    BACKWARD: k is q and v the output's gradient; slot c becomes scale sum_t exp(G_t) q_t do_t^T. V_BY: what v is multiplied by (scaled_tile).
    """
    tiles_v = tl.cdiv(dv, BV)
    tiles = tl.cdiv(dk, BK) * tiles_v
    program = tl.program_id(0)
    of_state, chunk = program % tiles, program // tiles % chunks
    row = (program // tiles // chunks).to(tl.int64)
    b, h = row // heads, row % heads
    keys = of_state // tiles_v * BK + tl.arange(0, BK)
    values = of_state % tiles_v * BV + tl.arange(0, BV)
    here_k, here_v = keys < dk, values < dv
    inside = tl.arange(0, CHUNK)
    step = chunk * CHUNK + inside
    live = step < length
    token = visited(index, step, length, WALK, REVERSE)
    mine = segment_of(segment, step, length, STARTS)
    at_entry = segment_of(segment, chunk * CHUNK - 1, length, STARTS)
    at_end = segment_of(segment, chunk * CHUNK + CHUNK - 1, length, STARTS)

    a = tile(k + b * k_batch + h // k_repeat * k_head, token * k_token, keys, live, here_k)
    if DECAY == 0:
        if BACKWARD:
            a = tl.where((mine == at_entry)[:, None], a, 0.0)
        else:
            a = tl.where((mine == at_end)[:, None], a, 0.0)
    else:
        g += b * g_batch + h * g_head
        logs = log_decays(g, token, live, keys, here_k, g_token, DECAY)
        if BACKWARD:
            weights = tl.exp(tl.cumsum(logs, 0))
            seen = mine == at_entry
        else:
            following = log_decays(g, visited(index, step + 1, length, WALK, REVERSE), (inside + 1 < CHUNK) & (step + 1 < length), keys, here_k,
                                   g_token, DECAY)
            weights = tl.exp(tl.cumsum(following, 0, reverse=True))
            seen = mine == at_end
        if DECAY == HEAD:
            a *= tl.where(seen, weights, 0.0)[:, None]
        else:
            a *= tl.where(seen[:, None], weights, 0.0)
    c = scaled_tile(v + b * v_batch + h // v_repeat * v_head, token, v_token, values, live, here_v, steps, (b * length + token) * heads + h,
                    z + b * z_batch + h * z_head, z_token, V_BY)
    slot = row * (chunks + 1) + chunk
    if BACKWARD:
        a *= scale
    else:
        if DECAY == KEY:
            kept = tl.where(at_entry == at_end, tl.exp(tl.sum(logs, 0)), 0.0)
            if of_state % tiles_v == 0:
                tl.store(decays + (row * chunks + chunk) * dk + keys, kept, mask=here_k)
        else:
            kept = tl.where(at_entry == at_end, 1.0, 0.0)
            if DECAY == HEAD:
                kept *= tl.exp(tl.sum(logs, 0))
            if of_state == 0:
                tl.store(decays + row * chunks + chunk, kept)
        slot += 1
    at = slot * dk * dv + keys.to(tl.int64)[:, None] * dv + values[None, :]
    tl.store(states + at, product(tl.trans(a), c), mask=here_k[:, None] & here_v[None, :])


@triton.jit
def _group(states, decays, first, chunks, here, size, d_chunk, GROUP: tl.constexpr, BACKWARD: tl.constexpr):
    """What GROUP chunks add, and what they leave of the state, from the first on."""
    added, kept = (), ()
    for i in tl.static_range(GROUP):
        at = first + i
        live = at < chunks
        if BACKWARD:
            at = chunks - 1 - at
        there = here & (tl.full(here.shape, live, tl.int32) != 0)
        if BACKWARD:
            added = added + (tl.load(states + at * size, mask=there, other=0.0),)
        else:
            added = added + (tl.load(states + (at + 1) * size, mask=there, other=0.0),)
        kept = kept + (tl.load(decays + at * d_chunk, mask=there, other=0.0),)
    return added, kept


@triton.jit
def carry(states, decays, size, dv, chunks, d_row, d_chunk, d_key, TILE: tl.constexpr, GROUP: tl.constexpr, BACKWARD: tl.constexpr):
    """states: the first slot (the last, BACKWARD) holds a state and each other what its chunk adds; becomes the state at every edge.

    A program has TILE numbers of one state. A chunk is one multiply-add; what it waits for is memory: a group is read while the one before is used.
    """
    tiles = tl.cdiv(size, TILE)
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    place = program % tiles * TILE + tl.arange(0, TILE)
    here = place < size
    states += row * (chunks + 1) * size + place
    decays += row * d_row + place // dv * d_key
    chunk = tl.zeros((), tl.int64)
    if BACKWARD:
        s = tl.load(states + (chunk + chunks) * size, mask=here, other=0.0)
    else:
        s = tl.load(states, mask=here, other=0.0)
    added, kept = _group(states, decays, chunk, chunks, here, size, d_chunk, GROUP, BACKWARD)
    for first in range(chunk, chunks, GROUP):
        next_added, next_kept = _group(states, decays, first + GROUP, chunks, here, size, d_chunk, GROUP, BACKWARD)
        for i in tl.static_range(GROUP):
            at = first + i
            there = here & (tl.full(here.shape, at < chunks, tl.int32) != 0)
            s = kept[i] * s + added[i]
            if BACKWARD:
                tl.store(states + (chunks - 1 - at) * size, s, mask=there)
            else:
                tl.store(states + (at + 1) * size, s, mask=there)
        added, kept = next_added, next_kept
