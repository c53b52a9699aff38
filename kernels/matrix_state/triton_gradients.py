"""Gradients of the decays, and of q and k where the decay is per key. With S the state that enters a chunk and dS the gradient of what leaves it:

    dq_t = scale (exp(G_t) do_t S^T + sum_i exp(G_t - G_i) (do_t v_i) k_i)
    dk_i = sum_t scale exp(G_t - G_i) (do_t v_i) q_t + exp(G_end - G_i) v_i dS^T

A step's decay multiplies everything that goes from before the step to the step or after it: from token to token, from S to a token, from a token to
what leaves the chunk, from S to what leaves it (per key where the decay is). These are summed without differences: the gradient of a strong decay
is as exact as any, and exactly 0 where nothing comes before it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from medssm.kernels.matrix_state.triton_tiles import HEAD, KEY, log_decays, segment_of
from medssm.kernels.triton_tiles import chunk_of, product, span_of, split, tile, tokens_of, visited


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
    pieces,
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
    slots,
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
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """dq_out, dk_out (b,l,h,dk), and what `decay_gradients` needs: change (b*h, chunks, CHUNK + 2 CHUNK / BLOCK, dk).

    A program has BLOCK tokens. Pairs with tokens before the block (for dq) and after it (for dk) are a product each, split at the block's edge;
    pairs within the block are computed one by one. The first CHUNK rows of change are the decays' gradients but for what goes from S to later
    blocks, from earlier blocks to the chunk's end, and from S to there. Then come each block's sum of q dq from S, and of k dk to the chunk's end.
    """
    blocks: tl.constexpr = CHUNK // BLOCK
    tiles = tl.cdiv(dk, BK)
    part, chunk, row, b, h = chunk_of(blocks * tiles, chunks, heads)
    keys = part // blocks * BK + tl.arange(0, BK)
    here = keys < dk
    within, edge = tl.arange(0, BLOCK), part % blocks * BLOCK
    begin, end, shift = span_of(chunk, pieces, length, CHUNK, PACKED)
    inside, step, live, token = tokens_of(begin, end, index, length, CHUNK, WALK, REVERSE)
    step_t = begin + edge + within
    live_t = step_t < end
    token_t = visited(index, step_t, length, WALK, REVERSE)
    mine_t = segment_of(segment, step_t, length, STARTS)
    from_entry = mine_t == segment_of(segment, chunk * CHUNK - 1, length, STARTS)
    to_end = mine_t == segment_of(segment, chunk * CHUNK + CHUNK - 1, length, STARTS)
    dout += b * dout_batch + h * dout_head
    q += b * q_batch + h // q_repeat * q_head
    k += b * k_batch + h // k_repeat * k_head
    v += b * v_batch + h // v_repeat * v_head
    g += b * g_batch + h * g_head
    states += (row * slots + chunk + shift) * dk * dv
    dstates += (row * slots + chunk + shift + 1) * dk * dv
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
    following = log_decays(g, next_token, (within + 1 < BLOCK) & (next_step < end), keys, here, g_token, KEY)
    to_edge = tl.exp(tl.cumsum(following, 0, reverse=True))
    logs = log_decays(g, token, live, keys, here, g_token, KEY)
    before = tl.exp(tl.sum(tl.where((inside < edge)[:, None], logs, 0.0), 0))
    later = inside >= edge + BLOCK
    logs = tl.where(later[:, None], logs, 0.0)
    dq_t = tl.where(from_entry[:, None], dq_t * from_edge * before[None, :] * scale, 0.0)
    dk_t = tl.where(to_end[:, None], dk_t * to_edge * tl.exp(tl.sum(logs, 0))[None, :], 0.0)
    q_t = tile(q, token_t * q_token, keys, live_t, here)
    k_t = tile(k, token_t * k_token, keys, live_t, here)
    change += (row * chunks + chunk) * (CHUNK + 2 * blocks) * dk + keys
    tl.store(change + (CHUNK + part % blocks) * dk, tl.sum(q_t * dq_t, 0), mask=here)
    tl.store(change + (CHUNK + blocks + part % blocks) * dk, tl.sum(k_t * dk_t, 0), mask=here)
    across = tl.zeros((BK,), tl.float32)  # what goes from before the block to after it
    q_s = tl.zeros((CHUNK, BK), tl.float32)
    if edge + BLOCK < CHUNK:
        q_s = tile(q, token * q_token, keys, live & later, here) * tl.exp(tl.cumsum(logs, 0))
        da = tl.load(dpairs + (edge + within)[:, None] + inside[None, :] * CHUNK)
        dk_t += to_edge * product(da, q_s)
    if edge > 0:
        early = inside < edge
        logs = log_decays(g, visited(index, step + 1, length, WALK, REVERSE), (inside + 1 < edge) & (step + 1 < end), keys, here, g_token, KEY)
        k_i = tile(k, token * k_token, keys, live & early, here) * tl.exp(tl.cumsum(logs, 0, reverse=True))
        da = tl.load(dpairs + (edge + within)[:, None] * CHUNK + inside[None, :])
        dq_t += from_edge * product(da, k_i)
        if edge + BLOCK < CHUNK:
            pairs = tl.load(dpairs + inside[:, None] * CHUNK + inside[None, :])
            through = tl.exp(tl.sum(log_decays(g, token_t, live_t, keys, here, g_token, KEY), 0))
            across = through * tl.sum(q_s * product(pairs, k_i), 0)
    crossing = product(tl.where(within[:, None] <= within[None, :], 1.0, 0.0), q_t * dq_t)
    crossing += product(tl.where(within[:, None] > within[None, :], 1.0, 0.0), k_t * dk_t)
    da = tl.load(dpairs + (edge + within)[:, None] * CHUNK + edge + within[None, :])
    before_self = (within[:, None] > within[None, :])[:, :, None]
    logs = (coarse[:, None, :] - coarse[None, :, :]) + (rest[:, None, :] - rest[None, :, :])
    decayed = da[:, :, None] * tl.exp(tl.where(before_self, logs, float("-inf")))
    dq_t += tl.sum(decayed * k_t[None, :, :], 1)
    decayed *= q_t[:, None, :]
    dk_t += tl.sum(decayed, 0)
    crossing += tl.sum(tl.where(before_self, tl.cumsum(decayed * k_t[None, :, :], 0, reverse=True), 0.0), 1)
    mask = live_t[:, None] & here[None, :]
    tl.store(change[None, :] + ((edge + within) * dk)[:, None], crossing + across[None, :], mask=here[None, :] & (within >= 0)[:, None])
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
    pieces,
    decays,
    dg_out,
    length,
    heads,
    dk,
    dv,
    chunks,
    slots,
    parts,
    DECAY: tl.constexpr,
    WALK: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """dg_out (b,l,h) of change (parts, b*h, chunks, CHUNK), which are added; or (b,l,h,dk) of change as `query_key_gradients` writes it. To this
    comes what goes from S to what leaves the chunk: decay <S, dS>, with decays (b*h, slots - 1[, dk]).
    """
    blocks: tl.constexpr = CHUNK // BLOCK
    tiles = tl.cdiv(dk, BK)
    if DECAY == HEAD:
        tiles = 1
    part, chunk, row, b, h = chunk_of(tiles, chunks, heads)
    begin, end, shift = span_of(chunk, pieces, length, CHUNK, PACKED)
    inside, _, live, token = tokens_of(begin, end, index, length, CHUNK, WALK, REVERSE)
    slot = row * slots + chunk + shift
    states += slot * dk * dv
    dstates += (slot + 1) * dk * dv
    decay = row * (slots - 1) + chunk + shift
    if DECAY == HEAD:
        parts_of_inner = tl.zeros((BK, BV), tl.float32)
        for first_k in range(0, dk, BK):
            keys = first_k + tl.arange(0, BK)
            for first_v in range(0, dv, BV):
                values = first_v + tl.arange(0, BV)
                parts_of_inner += tile(states, keys * dv, values, keys < dk, values < dv) * tile(dstates, keys * dv, values, keys < dk, values < dv)
        dg = tl.zeros((CHUNK,), tl.float32) + tl.load(decays + decay) * tl.sum(tl.sum(parts_of_inner, 1), 0)
        for i in range(parts):
            dg += tl.load(change + (tl.cast(i, tl.int64) * tl.num_programs(0) + row * chunks + chunk) * CHUNK + inside)
        tl.store(dg_out + (b * length + token) * heads + h, dg.to(dg_out.dtype.element_ty), mask=live)
    else:
        keys = part * BK + tl.arange(0, BK)
        here = keys < dk
        inner = tl.zeros((BK,), tl.float32)
        for first_v in range(0, dv, BV):
            values = first_v + tl.arange(0, BV)
            inner += tl.sum(tile(states, keys * dv, values, here, values < dv) * tile(dstates, keys * dv, values, here, values < dv), 1)
        inner *= tl.load(decays + decay * dk + keys, mask=here, other=0.0)
        change += (row * chunks + chunk) * (CHUNK + 2 * blocks) * dk + keys
        dg = tl.load(change[None, :] + (inside * dk)[:, None], mask=live[:, None] & here[None, :], other=0.0) + inner[None, :]
        for block in tl.static_range(blocks):
            later = tl.load(change + (CHUNK + block) * dk, mask=here, other=0.0)
            earlier = tl.load(change + (CHUNK + blocks + block) * dk, mask=here, other=0.0)
            dg += tl.where((inside // BLOCK < block)[:, None], later[None, :], 0.0)
            dg += tl.where((inside // BLOCK > block)[:, None], earlier[None, :], 0.0)
        at = ((b * length + token) * heads + h)[:, None] * dk + keys[None, :]
        tl.store(dg_out + at, dg.to(dg_out.dtype.element_ty), mask=live[:, None] & here[None, :])
