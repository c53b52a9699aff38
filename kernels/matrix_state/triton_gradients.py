"""Gradients of the decays, and of q and k where the decay is per key. With S the state that enters a chunk and dS the gradient of what leaves it:

    dq_t = scale (exp(G_t) do_t S^T + sum_i exp(G_t - G_i) (do_t v_i) k_i)
    dk_i = sum_t scale exp(G_t - G_i) (do_t v_i) q_t + exp(G_end - G_i) v_i dS^T
    dg_t = sum over s >= t of (q_s dq_s - k_s dk_s) + <S_end, dS>, the sum to the chunk's end (per key where the decay is)

The pair of a token with itself would cancel in dg's sum and is left out of both products. Sums stop where the state begins anew.
"""

from __future__ import annotations

import triton
import triton.language as tl

from medssm.kernels.matrix_state.triton_tiles import HEAD, KEY, log_decays, segment_of
from medssm.kernels.triton_tiles import chunk_of, product, split, tile, tokens_of, visited


@triton.jit
def query_key_gradients(
    dout,
    q,
    k,
    v,
    g,
    dpairs,
    states,
    dstates,
    index,
    segment,
    dq_out,
    dk_out,
    change,
    scale,
    length,
    heads,
    q_repeat,
    k_repeat,
    v_repeat,
    dk,
    dv,
    chunks,
    dout_batch,
    dout_token,
    dout_head,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    g_batch,
    g_token,
    g_head,
    WALK: tl.constexpr,
    STARTS: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """dq_out, dk_out (b,l,h,dk), and change (b*h, chunks, CHUNK, dk): q_t dq_t - k_t dk_t.

    A program has BLOCK tokens. Pairs with tokens before the block (for dq) and after it (for dk) are a product each, split at the block's edge;
    pairs within the block are computed one by one.
    """
    blocks: tl.constexpr = CHUNK // BLOCK
    tiles = tl.cdiv(dk, BK)
    part, chunk, row, b, h = chunk_of(blocks * tiles, chunks, heads)
    keys = part // blocks * BK + tl.arange(0, BK)
    here = keys < dk
    within, edge = tl.arange(0, BLOCK), part % blocks * BLOCK
    inside, step, live, token = tokens_of(chunk, index, length, CHUNK, WALK, REVERSE)
    step_t = chunk * CHUNK + edge + within
    live_t = step_t < length
    token_t = visited(index, step_t, length, WALK, REVERSE)
    mine_t = segment_of(segment, step_t, length, STARTS)
    from_entry = mine_t == segment_of(segment, chunk * CHUNK - 1, length, STARTS)
    to_end = mine_t == segment_of(segment, chunk * CHUNK + CHUNK - 1, length, STARTS)
    dout += b * dout_batch + h * dout_head
    q += b * q_batch + h // q_repeat * q_head
    k += b * k_batch + h // k_repeat * k_head
    v += b * v_batch + h // v_repeat * v_head
    g += b * g_batch + h * g_head
    states += (row * (chunks + 1) + chunk) * dk * dv
    dstates += (row * (chunks + 1) + chunk + 1) * dk * dv
    dpairs += (row * chunks + chunk) * CHUNK * CHUNK

    dq_t = tl.zeros((BLOCK, BK), tl.float32)
    dk_t = tl.zeros((BLOCK, BK), tl.float32)
    for first in range(0, dv, BV):
        values = first + tl.arange(0, BV)
        here_v = values < dv
        do = tile(dout, token_t * dout_token, values, live_t, here_v)
        dq_t += product(do, tl.trans(tile(states, keys * dv, values, here, here_v)))
        c = tile(v, token_t * v_token, values, live_t, here_v)
        dk_t += product(c, tl.trans(tile(dstates, keys * dv, values, here, here_v)))
    coarse, rest = split(log_decays(g, token_t, live_t, keys, here, g_token, KEY))
    from_edge = tl.exp(coarse + rest)
    next_token, next_step = visited(index, step_t + 1, length, WALK, REVERSE), step_t + 1
    following = log_decays(g, next_token, (within + 1 < BLOCK) & (next_step < length), keys, here, g_token, KEY)
    to_edge = tl.exp(tl.cumsum(following, 0, reverse=True))
    logs = log_decays(g, token, live, keys, here, g_token, KEY)
    before = tl.exp(tl.sum(tl.where((inside < edge)[:, None], logs, 0.0), 0))
    later = inside >= edge + BLOCK
    logs = tl.where(later[:, None], logs, 0.0)
    dq_t = tl.where(from_entry[:, None], dq_t * from_edge * before[None, :] * scale, 0.0)
    dk_t = tl.where(to_end[:, None], dk_t * to_edge * tl.exp(tl.sum(logs, 0))[None, :], 0.0)
    if edge + BLOCK < CHUNK:
        q_s = tile(q, token * q_token, keys, live & later, here) * tl.exp(tl.cumsum(logs, 0))
        da = tl.load(dpairs + (edge + within)[:, None] + inside[None, :] * CHUNK)
        dk_t += to_edge * product(da, q_s)
    if edge > 0:
        early = inside < edge
        logs = log_decays(g, visited(index, step + 1, length, WALK, REVERSE), (inside + 1 < edge) & (step + 1 < length), keys, here, g_token, KEY)
        k_i = tile(k, token * k_token, keys, live & early, here) * tl.exp(tl.cumsum(logs, 0, reverse=True))
        da = tl.load(dpairs + (edge + within)[:, None] * CHUNK + inside[None, :])
        dq_t += from_edge * product(da, k_i)
    q_t = tile(q, token_t * q_token, keys, live_t, here)
    k_t = tile(k, token_t * k_token, keys, live_t, here)
    da = tl.load(dpairs + (edge + within)[:, None] * CHUNK + edge + within[None, :])
    before_self = (within[:, None] > within[None, :])[:, :, None]
    logs = (coarse[:, None, :] - coarse[None, :, :]) + (rest[:, None, :] - rest[None, :, :])
    decayed = da[:, :, None] * tl.exp(tl.where(before_self, logs, float("-inf")))
    dq_t += tl.sum(decayed * k_t[None, :, :], 1)
    dk_t += tl.sum(decayed * q_t[:, None, :], 0)
    mask = live_t[:, None] & here[None, :]
    at = ((row * chunks + chunk) * CHUNK + edge + within)[:, None] * dk + keys[None, :]
    tl.store(change + at, q_t * dq_t - k_t * dk_t, mask=here[None, :] & (within >= 0)[:, None])
    itself = tl.load(dpairs + (edge + within) * (CHUNK + 1))[:, None]
    at = ((b * length + token_t) * heads + h)[:, None] * dk + keys[None, :]
    tl.store(dq_out + at, (dq_t + itself * k_t).to(dq_out.dtype.element_ty), mask=mask)
    tl.store(dk_out + at, (dk_t + itself * q_t).to(dk_out.dtype.element_ty), mask=mask)


@triton.jit
def decay_gradients(
    states,
    dstates,
    change,
    index,
    segment,
    dg_out,
    length,
    heads,
    dk,
    dv,
    chunks,
    parts,
    DECAY: tl.constexpr,
    WALK: tl.constexpr,
    STARTS: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """dg_out (b,l,h), or (b,l,h,dk) of change (b*h, chunks, CHUNK, dk), from the changes' sums and <S_end, dS>."""
    tiles = tl.cdiv(dk, BK)
    if DECAY == HEAD:
        tiles = 1
    part, chunk, row, b, h = chunk_of(tiles, chunks, heads)
    inside, step, live, token = tokens_of(chunk, index, length, CHUNK, WALK, REVERSE)
    mine = segment_of(segment, step, length, STARTS)
    to_end = mine == segment_of(segment, chunk * CHUNK + CHUNK - 1, length, STARTS)
    goes_on = live & (mine == segment_of(segment, step - 1, length, STARTS))
    later = tl.where((inside[:, None] <= inside[None, :]) & (mine[:, None] == mine[None, :]), 1.0, 0.0)
    slot = (row * (chunks + 1) + chunk + 1) * dk * dv
    states += slot
    dstates += slot
    if DECAY == HEAD:
        parts_of_inner = tl.zeros((BK, BV), tl.float32)
        for first_k in range(0, dk, BK):
            keys = first_k + tl.arange(0, BK)
            for first_v in range(0, dv, BV):
                values = first_v + tl.arange(0, BV)
                parts_of_inner += tile(states, keys * dv, values, keys < dk, values < dv) * tile(dstates, keys * dv, values, keys < dk, values < dv)
        inner = tl.sum(tl.sum(parts_of_inner, 1), 0)
        changes = tl.zeros((CHUNK,), tl.float32)
        for i in range(parts):
            changes += tl.load(change + (tl.cast(i, tl.int64) * tl.num_programs(0) + row * chunks + chunk) * CHUNK + inside)
        dg = tl.sum(later * changes[None, :], 1) + tl.where(to_end, inner, 0.0)
        tl.store(dg_out + (b * length + token) * heads + h, tl.where(goes_on, dg, 0.0).to(dg_out.dtype.element_ty), mask=live)
    else:
        keys = part * BK + tl.arange(0, BK)
        here = keys < dk
        inner = tl.zeros((BK,), tl.float32)
        for first_v in range(0, dv, BV):
            values = first_v + tl.arange(0, BV)
            inner += tl.sum(tile(states, keys * dv, values, here, values < dv) * tile(dstates, keys * dv, values, here, values < dv), 1)
        changes = tile(change + (row * chunks + chunk) * CHUNK * dk, inside * dk, keys, inside >= 0, here)
        dg = product(later, changes) + tl.where(to_end[:, None], inner[None, :], 0.0)
        at = ((b * length + token) * heads + h)[:, None] * dk + keys[None, :]
        tl.store(dg_out + at, tl.where(goes_on[:, None], dg, 0.0).to(dg_out.dtype.element_ty), mask=live[:, None] & here[None, :])
