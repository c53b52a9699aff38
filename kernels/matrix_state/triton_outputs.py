"""The outputs of a chunk's tokens, from the state S that enters the chunk and from each other. With E_ti = exp(G_t - G_i) for i <= t:

    o_t = scale (exp(G_t) q_t S + sum_i E_ti (q_t k_i) v_i)

The gradients of q, k and v are sums of the same form (triton_token_gradients.py); `view` and `decayed` serve all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from medssm.kernels.matrix_state.triton_tiles import HEAD, KEY, log_decays, segment_of, silu, stepped_tile
from medssm.kernels.triton_tiles import chunk_of, pair_decays, product, span_of, tile, tokens_of, visited


@triton.jit
def view(
    index,
    segment,
    chunk,
    inside,
    step,
    length,
    end,
    token,
    live,
    AFTER: tl.constexpr,
    WALK: tl.constexpr,
    STARTS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """What each token of a chunk sees; AFTER: the tokens from it on and the chunk's end, else the tokens up to it and the chunk's begin.

    Returns whether nothing begins anew between it and that edge (steps,), which tokens it sees (steps, steps), the tokens whose decays lie between
    it and the edge, and which of these exist.
    """
    chunk_size: tl.constexpr = inside.shape[0]
    mine = segment_of(segment, step, length, STARTS)
    same = mine[:, None] == mine[None, :]
    if AFTER:
        reached = mine == segment_of(segment, chunk * chunk_size + chunk_size - 1, length, STARTS)
        seen = (inside[:, None] <= inside[None, :]) & same
        return reached, seen, visited(index, step + 1, length, WALK, REVERSE), (inside + 1 < chunk_size) & (step + 1 < end)
    reached = mine == segment_of(segment, chunk * chunk_size - 1, length, STARTS)
    return reached, (inside[:, None] >= inside[None, :]) & same, token, live


@triton.jit
def decayed(sums, pairs, g, token, live, between, counted, reached, seen, cols, here, g_token, DECAY: tl.constexpr, AFTER: tl.constexpr):
    """What tokens read of the edge's state, and their products with each other, each times its decay; 0 where not reached or not seen.

    With a decay per key the decays are in both already, and the products are 0 where not seen.
    """
    if DECAY == HEAD:
        to_edge = tl.exp(tl.cumsum(log_decays(g, between, counted, cols, here, g_token, DECAY), 0, reverse=AFTER))
        sums *= tl.where(reached, to_edge, 0.0)[:, None]
        pairs *= pair_decays(log_decays(g, token, live, cols, here, g_token, DECAY), seen, AFTER)
    else:
        sums = tl.where(reached[:, None], sums, 0.0)
        if DECAY != KEY:
            pairs = tl.where(seen, pairs, 0.0)
    return sums, pairs


@triton.jit
def outputs(
    q,
    k,
    v,
    g,
    pairs,
    states,
    steps,
    skip,
    z,
    index,
    segment,
    pieces,
    out,
    before_gate,
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
    z_batch,
    z_token,
    z_head,
    DECAY: tl.constexpr,
    STEPS: tl.constexpr,
    SKIP: tl.constexpr,
    GATE: tl.constexpr,
    SAVE: tl.constexpr,
    WALK: tl.constexpr,
    STARTS: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """out (b,l,h,dv), from the states (b*h, slots, dk, dv) at the chunks' edges.

    With a decay per key the products q_t k_i are read: pairs (b*h, chunks, CHUNK, CHUNK). STEPS: v is multiplied by steps (b,l,h) first; SKIP adds
    skip (h,dv) v, without steps. SAVE keeps the result in before_gate (b,l,h,dv); then GATE multiplies it by silu(z).
    """
    part, chunk, row, b, h = chunk_of(tl.cdiv(dv, BV), chunks, heads)
    values = part * BV + tl.arange(0, BV)
    here_v = values < dv
    begin, end, shift = span_of(chunk, pieces, length, CHUNK, PACKED)
    inside, step, live, token = tokens_of(begin, end, index, length, CHUNK, WALK, REVERSE)
    reached, seen, between, counted = view(index, segment, chunk, inside, step, length, end, token, live, False, WALK, STARTS, REVERSE)
    of_token = (b * length + token) * heads + h
    q += b * q_batch + h // q_repeat * q_head
    k += b * k_batch + h // k_repeat * k_head
    v += b * v_batch + h // v_repeat * v_head
    g += b * g_batch + h * g_head
    z += b * z_batch + h * z_head
    states += (row * slots + chunk + shift) * dk * dv
    o = tl.zeros((CHUNK, BV), tl.float32)
    a = tl.zeros((CHUNK, CHUNK), tl.float32)  # [t, i]
    for first in range(0, dk, BK):
        keys = first + tl.arange(0, BK)
        here_k = keys < dk
        q_t = tile(q, token * q_token, keys, live, here_k)
        if DECAY == KEY:
            q_t *= tl.exp(tl.cumsum(log_decays(g, between, counted, keys, here_k, g_token, DECAY), 0))
        else:
            a += product(q_t, tl.trans(tile(k, token * k_token, keys, live, here_k)))
        o += product(q_t, tile(states, keys * dv, values, here_k, here_v))
    if DECAY == KEY:
        a = tl.load(pairs + (row * chunks + chunk) * CHUNK * CHUNK + inside[:, None] * CHUNK + inside[None, :])
    o, a = decayed(o, a, g, token, live, between, counted, reached, seen, values, here_v, g_token, DECAY, False)
    v_t = stepped_tile(v, token * v_token, values, live, here_v, steps, of_token, STEPS)
    o = o * scale + product(a * scale, v_t)
    if SKIP:
        weight = tl.load(skip + h * dv + values, mask=here_v, other=0.0)[None, :]
        if STEPS:
            o += weight * tile(v, token * v_token, values, live, here_v)
        else:
            o += weight * v_t
    at = of_token[:, None] * dv + values[None, :]
    mask = live[:, None] & here_v[None, :]
    if SAVE:
        tl.store(before_gate + at, o, mask=mask)
    if GATE:
        o *= silu(tile(z, token * z_token, values, live, here_v))
    tl.store(out + at, o.to(out.dtype.element_ty), mask=mask)
