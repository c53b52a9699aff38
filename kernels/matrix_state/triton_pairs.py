"""Products of the pairs of tokens of a chunk where the decay is per key: q_t k_i for the outputs, do_t v_i for the gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from medssm.kernels.matrix_state.triton_tiles import KEY, log_decays, segment_of
from medssm.kernels.triton_tiles import chunk_of, product, span_of, split, tile, tokens_of, visited


@triton.jit
def key_pairs(
    q,
    k,
    g,
    index,
    segment,
    pieces,
    pairs,
    length,
    heads,
    q_repeat,
    k_repeat,
    dk,
    chunks,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
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
):
    """pairs (b*h, chunks, CHUNK, CHUNK): sum over keys of q_t k_i exp(G_t - G_i) where i <= t, else 0.

    A program has BLOCK rows. The columns before them are one product, split at the block's edge: exp(G_t - G_edge) exp(G_edge - G_i).
    """
    blocks: tl.constexpr = CHUNK // BLOCK
    block, chunk, row, b, h = chunk_of(blocks, chunks, heads)
    begin, end, _ = span_of(chunk, pieces, length, CHUNK, PACKED)
    inside, step, live, token = tokens_of(begin, end, index, length, CHUNK, WALK, REVERSE)
    within, edge = tl.arange(0, BLOCK), block * BLOCK
    step_t = begin + edge + within
    live_t = step_t < end
    early = inside < edge
    token_t = visited(index, step_t, length, WALK, REVERSE)
    next_token = visited(index, step + 1, length, WALK, REVERSE)
    q += b * q_batch + h // q_repeat * q_head
    k += b * k_batch + h // k_repeat * k_head
    g += b * g_batch + h * g_head
    a = tl.zeros((BLOCK, CHUNK), tl.float32)
    within_block = tl.zeros((BLOCK, BLOCK), tl.float32)
    seen = within[:, None] >= within[None, :]
    for first in range(0, dk, BK):
        keys = first + tl.arange(0, BK)
        here = keys < dk
        q_t = tile(q, token_t * q_token, keys, live_t, here)
        k_t = tile(k, token_t * k_token, keys, live_t, here)
        coarse, rest = split(log_decays(g, token_t, live_t, keys, here, g_token, KEY))
        logs = (coarse[:, None, :] - coarse[None, :, :]) + (rest[:, None, :] - rest[None, :, :])
        within_block += tl.sum(q_t[:, None, :] * k_t[None, :, :] * tl.exp(tl.where(seen[:, :, None], logs, float("-inf"))), 2)
        if edge > 0:
            k_i = tile(k, token * k_token, keys, early & live, here)
            following = log_decays(g, next_token, (inside + 1 < edge) & (step + 1 < end), keys, here, g_token, KEY)
            k_i *= tl.exp(tl.cumsum(following, 0, reverse=True))
            a += product(q_t * tl.exp(coarse + rest), tl.trans(k_i))
    pairs += (row * chunks + chunk) * CHUNK * CHUNK
    mine_t = segment_of(segment, step_t, length, STARTS)
    same = mine_t[:, None] == segment_of(segment, step, length, STARTS)[None, :]
    at = (edge + within)[:, None] * CHUNK
    beside = (inside < edge) | (inside >= edge + BLOCK)
    tl.store(pairs + at + inside[None, :], tl.where(same & early[None, :], a, 0.0), mask=beside[None, :] & (within >= 0)[:, None])
    same = mine_t[:, None] == mine_t[None, :]
    tl.store(pairs + at + edge + within[None, :], tl.where(same, within_block, 0.0))


@triton.jit
def pair_gradients(
    dout,
    v,
    index,
    segment,
    pieces,
    dpairs,
    scale,
    length,
    heads,
    v_repeat,
    dv,
    chunks,
    dout_batch,
    dout_token,
    dout_head,
    v_batch,
    v_token,
    v_head,
    WALK: tl.constexpr,
    STARTS: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BV: tl.constexpr,
):
    """dpairs (b*h, chunks, CHUNK, CHUNK): scale do_t v_i where i <= t, else 0."""
    _, chunk, row, b, h = chunk_of(1, chunks, heads)
    begin, end, _ = span_of(chunk, pieces, length, CHUNK, PACKED)
    inside, step, live, token = tokens_of(begin, end, index, length, CHUNK, WALK, REVERSE)
    mine = segment_of(segment, step, length, STARTS)
    dout += b * dout_batch + h * dout_head
    v += b * v_batch + h // v_repeat * v_head
    da = tl.zeros((CHUNK, CHUNK), tl.float32)
    for first in range(0, dv, BV):
        values = first + tl.arange(0, BV)
        here = values < dv
        da += product(tile(dout, token * dout_token, values, live, here), tl.trans(tile(v, token * v_token, values, live, here)))
    seen = (inside[:, None] >= inside[None, :]) & (mine[:, None] == mine[None, :])
    at = (row * chunks + chunk) * CHUNK * CHUNK + inside[:, None] * CHUNK + inside[None, :]
    tl.store(dpairs + at, tl.where(seen, da * scale, 0.0))
