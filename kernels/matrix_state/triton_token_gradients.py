"""Gradients of v, and of q and k where the decay is not per key, from the states at a chunk's edges and from the chunk's tokens.

With S the state that enters the chunk, dS the gradient of the state that leaves it, E_ti = exp(G_t - G_i) for i <= t:

    dv_i = exp(G_end - G_i) k_i dS + scale sum_t E_ti (k_i q_t) do_t
    dq_t = scale (exp(G_t) do_t S^T + sum_i E_ti (do_t v_i) k_i)
    dk_i = exp(G_end - G_i) v_i dS^T + scale sum_t E_ti (v_i do_t) q_t

With a decay per key, dq and dk are in triton_gradients.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from medssm.kernels.matrix_state.triton_outputs import decayed, view
from medssm.kernels.matrix_state.triton_tiles import HEAD, KEY, gated_tile, log_decays, stepped_tile
from medssm.kernels.triton_tiles import chunk_of, product, span_of, tile, tokens_of


@triton.jit
def value_gradients(
    dout,
    q,
    k,
    v,
    g,
    pairs,
    dstates,
    steps,
    skip,
    z,
    before_gate,
    index,
    segment,
    pieces,
    dv_out,
    dsteps,
    dz,
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
    z_batch,
    z_token,
    z_head,
    DECAY: tl.constexpr,
    STEPS: tl.constexpr,
    SKIP: tl.constexpr,
    GATE: tl.constexpr,
    WALK: tl.constexpr,
    STARTS: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """dv_out (b,l,h,dv), from the states' gradients dstates (b*h, slots, dk, dv). pairs, STEPS and SKIP are as in `outputs`.

    STEPS: dsteps (tiles, b, l, h) gets each tile's part of the steps' gradient. GATE: dz (b,l,h,dv) is written, from before_gate.
    """
    tiles = tl.cdiv(dv, BV)
    part, chunk, row, b, h = chunk_of(tiles, chunks, heads)
    values = part * BV + tl.arange(0, BV)
    here_v = values < dv
    begin, end, shift = span_of(chunk, pieces, length, CHUNK, PACKED)
    inside, step, live, token = tokens_of(begin, end, index, length, CHUNK, WALK, REVERSE)
    reached, seen, between, counted = view(index, segment, chunk, inside, step, length, end, token, live, True, WALK, STARTS, REVERSE)
    of_token = (b * length + token) * heads + h
    dout += b * dout_batch + h * dout_head
    q += b * q_batch + h // q_repeat * q_head
    k += b * k_batch + h // k_repeat * k_head
    v += b * v_batch + h // v_repeat * v_head
    g += b * g_batch + h * g_head
    z += b * z_batch + h * z_head
    dstates += (row * slots + chunk + shift + 1) * dk * dv
    dv_t = tl.zeros((CHUNK, BV), tl.float32)
    a = tl.zeros((CHUNK, CHUNK), tl.float32)  # [i, t]
    for first in range(0, dk, BK):
        keys = first + tl.arange(0, BK)
        here_k = keys < dk
        k_t = tile(k, token * k_token, keys, live, here_k)
        if DECAY == KEY:
            k_t *= tl.exp(tl.cumsum(log_decays(g, between, counted, keys, here_k, g_token, DECAY), 0, reverse=True))
        else:
            a += product(k_t, tl.trans(tile(q, token * q_token, keys, live, here_k)))
        dv_t += product(k_t, tile(dstates, keys * dv, values, here_k, here_v))
    if DECAY == KEY:
        a = tl.load(pairs + (row * chunks + chunk) * CHUNK * CHUNK + inside[:, None] + inside[None, :] * CHUNK)
    dv_t, a = decayed(dv_t, a, g, token, live, between, counted, reached, seen, values, here_v, g_token, DECAY, True)
    do = gated_tile(dout, token * dout_token, values, live, here_v, z, token * z_token, GATE)
    dv_t += product(a * scale, do)
    if STEPS:
        v_t = tile(v, token * v_token, values, live, here_v)
        parts = part.to(tl.int64) * (tl.num_programs(0) // tiles // chunks) * length
        tl.store(dsteps + parts + of_token, tl.sum(dv_t * v_t, 1), mask=live)
        dv_t *= tl.load(steps + of_token, mask=live, other=0.0)[:, None]
    if SKIP:
        dv_t += tl.load(skip + h * dv + values, mask=here_v, other=0.0)[None, :] * do
    at = of_token[:, None] * dv + values[None, :]
    mask = live[:, None] & here_v[None, :]
    if GATE:
        gate = tile(z, token * z_token, values, live, here_v)
        opened = 1.0 / (1.0 + tl.exp(-gate))
        before = tile(dout, token * dout_token, values, live, here_v) * tl.load(before_gate + at, mask=mask, other=0.0)
        tl.store(dz + at, (before * opened * (1.0 + gate * (1.0 - opened))).to(dz.dtype.element_ty), mask=mask)
    tl.store(dv_out + at, dv_t.to(dv_out.dtype.element_ty), mask=mask)


@triton.jit
def query_gradients(
    dout,
    q,
    k,
    v,
    g,
    states,
    steps,
    z,
    index,
    segment,
    pieces,
    dq_out,
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
    z_batch,
    z_token,
    z_head,
    DECAY: tl.constexpr,
    STEPS: tl.constexpr,
    GATE: tl.constexpr,
    WALK: tl.constexpr,
    STARTS: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """dq_out (b,l,h,dk), from the states (b*h, slots, dk, dv); with a decay per head also change (tiles, b*h, chunks, CHUNK): each tile's part of
    the decays' gradients, what goes from before each step to the chunk's tokens from it on: from S and from the tokens before it.
    """
    tiles = tl.cdiv(dk, BK)
    part, chunk, row, b, h = chunk_of(tiles, chunks, heads)
    keys = part * BK + tl.arange(0, BK)
    here_k = keys < dk
    begin, end, shift = span_of(chunk, pieces, length, CHUNK, PACKED)
    inside, step, live, token = tokens_of(begin, end, index, length, CHUNK, WALK, REVERSE)
    reached, seen, between, counted = view(index, segment, chunk, inside, step, length, end, token, live, False, WALK, STARTS, REVERSE)
    of_token = (b * length + token) * heads + h
    dout += b * dout_batch + h * dout_head
    q += b * q_batch + h // q_repeat * q_head
    k += b * k_batch + h // k_repeat * k_head
    v += b * v_batch + h // v_repeat * v_head
    g += b * g_batch + h * g_head
    z += b * z_batch + h * z_head
    states += (row * slots + chunk + shift) * dk * dv
    dq_t = tl.zeros((CHUNK, BK), tl.float32)
    a = tl.zeros((CHUNK, CHUNK), tl.float32)  # [t, i]
    for first in range(0, dv, BV):
        values = first + tl.arange(0, BV)
        here_v = values < dv
        do = gated_tile(dout, token * dout_token, values, live, here_v, z, token * z_token, GATE)
        a += product(do, tl.trans(stepped_tile(v, token * v_token, values, live, here_v, steps, of_token, STEPS)))
        state = tl.load(states + values[:, None] + keys[None, :] * dv, mask=here_v[:, None] & here_k[None, :], other=0.0)  # transposed
        dq_t += product(do, state)
    dq_t, a = decayed(dq_t, a, g, token, live, between, counted, reached, seen, keys, here_k, g_token, DECAY, False)
    k_t = tile(k, token * k_token, keys, live, here_k)
    q_t = tile(q, token * q_token, keys, live, here_k)
    dq_t *= scale
    a *= scale
    arrives = tl.sum(dq_t * q_t, 1)
    dq_t += product(a, k_t)
    at = of_token[:, None] * dk + keys[None, :]
    tl.store(dq_out + at, dq_t.to(dq_out.dtype.element_ty), mask=live[:, None] & here_k[None, :])
    if DECAY == HEAD:
        of_pairs = tl.cumsum(a * product(q_t, tl.trans(k_t)), 0, reverse=True)  # [t, i]: from i to the tokens from t on
        arrives = tl.cumsum(arrives, 0, reverse=True) + tl.sum(tl.where(inside[:, None] > inside[None, :], of_pairs, 0.0), 1)
        rows = tl.num_programs(0) // tiles // chunks
        tl.store(change + ((part.to(tl.int64) * rows + row) * chunks + chunk) * CHUNK + inside, arrives)


@triton.jit
def key_gradients(
    dout,
    q,
    k,
    v,
    g,
    dstates,
    steps,
    z,
    index,
    segment,
    pieces,
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
    z_batch,
    z_token,
    z_head,
    DECAY: tl.constexpr,
    STEPS: tl.constexpr,
    GATE: tl.constexpr,
    WALK: tl.constexpr,
    STARTS: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """dk_out (b,l,h,dk), from the states' gradients dstates (b*h, slots, dk, dv); with a decay per head also change (tiles, b*h, chunks, CHUNK):
    each tile's part of the decays' gradients, what goes from the tokens before each step to what leaves the chunk.
    """
    tiles = tl.cdiv(dk, BK)
    part, chunk, row, b, h = chunk_of(tiles, chunks, heads)
    keys = part * BK + tl.arange(0, BK)
    here_k = keys < dk
    begin, end, shift = span_of(chunk, pieces, length, CHUNK, PACKED)
    inside, step, live, token = tokens_of(begin, end, index, length, CHUNK, WALK, REVERSE)
    reached, seen, between, counted = view(index, segment, chunk, inside, step, length, end, token, live, True, WALK, STARTS, REVERSE)
    of_token = (b * length + token) * heads + h
    dout += b * dout_batch + h * dout_head
    q += b * q_batch + h // q_repeat * q_head
    k += b * k_batch + h // k_repeat * k_head
    v += b * v_batch + h // v_repeat * v_head
    g += b * g_batch + h * g_head
    z += b * z_batch + h * z_head
    dstates += (row * slots + chunk + shift + 1) * dk * dv
    dk_t = tl.zeros((CHUNK, BK), tl.float32)
    a = tl.zeros((CHUNK, CHUNK), tl.float32)  # [i, t]
    for first in range(0, dv, BV):
        values = first + tl.arange(0, BV)
        here_v = values < dv
        v_t = stepped_tile(v, token * v_token, values, live, here_v, steps, of_token, STEPS)
        a += product(v_t, tl.trans(gated_tile(dout, token * dout_token, values, live, here_v, z, token * z_token, GATE)))
        dstate = tl.load(dstates + values[:, None] + keys[None, :] * dv, mask=here_v[:, None] & here_k[None, :], other=0.0)  # transposed
        dk_t += product(v_t, dstate)
    dk_t, a = decayed(dk_t, a, g, token, live, between, counted, reached, seen, keys, here_k, g_token, DECAY, True)
    q_t = tile(q, token * q_token, keys, live, here_k)
    k_t = tile(k, token * k_token, keys, live, here_k)
    if DECAY == HEAD:
        leaves = tl.where(inside[:, None] < inside[None, :], tl.sum(dk_t * k_t, 1)[:, None], 0.0)
        rows = tl.num_programs(0) // tiles // chunks
        tl.store(change + ((part.to(tl.int64) * rows + row) * chunks + chunk) * CHUNK + inside, tl.sum(leaves, 0))
    dk_t += product(a * scale, q_t)
    at = of_token[:, None] * dk + keys[None, :]
    tl.store(dk_out + at, dk_t.to(dk_out.dtype.element_ty), mask=live[:, None] & here_k[None, :])
