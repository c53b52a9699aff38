"""The delta rule forward on a GPU: the kernels. `triton.py` launches them.

`inverse` solves every chunk by itself, `carry` in triton_carry.py carries the state from chunk to chunk, `outputs` computes every chunk's outputs
from its entry state.
"""

from __future__ import annotations

import triton
import triton.language as tl

from medssm.kernels.delta_rule.triton_chunks import decays_between, edge_decays, log_decays, unit_inverse
from medssm.kernels.triton_tiles import chunk_of, product, span_of, tile, tokens_of


@triton.jit
def inverse(
    k,
    beta,
    g,
    fresh,
    index,
    pieces,
    inverses,
    length,
    heads,
    dk,
    chunks,
    k_batch,
    k_token,
    k_head,
    beta_batch,
    beta_token,
    beta_head,
    g_batch,
    g_token,
    g_head,
    ROWS: tl.constexpr,
    GATED: tl.constexpr,
    FRESH: tl.constexpr,
    PACKED: tl.constexpr,
    WALK: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BK: tl.constexpr,
):
    """inverses (b*h, chunks, CHUNK, CHUNK): (I + tril(exp(G_t - G_i) k_t k_i, -1) diag(beta))^-1; ROWS: with diag(beta) on the left."""
    _, chunk, row, b, h = chunk_of(1, chunks, heads)
    begin, end, _ = span_of(chunk, pieces, length, CHUNK, PACKED)
    inside, step, live, token = tokens_of(begin, end, index, length, CHUNK, WALK, REVERSE)
    k += b * k_batch + h * k_head
    a = tl.zeros((CHUNK, CHUNK), tl.float32)
    for first in range(0, dk, BK):
        keys = first + tl.arange(0, BK)
        k_t = tile(k, token * k_token, keys, live, keys < dk)
        a += product(k_t, tl.trans(k_t))
    shares = tl.load(beta + b * beta_batch + h * beta_head + token * beta_token, mask=live, other=0.0).to(tl.float32)
    logs = log_decays(g + b * g_batch + h * g_head, fresh, token, step, live, g_token, GATED, FRESH)
    a *= decays_between(logs, inside[:, None] > inside[None, :], GATED or FRESH)
    if ROWS:
        a *= shares[:, None]
    else:
        a *= shares[None, :]
    at = ((row * chunks + chunk) * CHUNK + inside)[:, None] * CHUNK + inside[None, :]
    tl.store(inverses + at, unit_inverse(a, CHUNK))


@triton.jit
def outputs(
    q,
    k,
    v,
    beta,
    g,
    fresh,
    index,
    pieces,
    recalled,
    states,
    out,
    scale,
    length,
    heads,
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
    beta_batch,
    beta_token,
    beta_head,
    g_batch,
    g_token,
    g_head,
    GATED: tl.constexpr,
    FRESH: tl.constexpr,
    PACKED: tl.constexpr,
    WALK: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """out (b,l,h,dv) = scale (exp(G_t) S^T q_t + sum_{i<=t} exp(G_t - G_i) (q_t k_i) u_i)."""
    part, chunk, row, b, h = chunk_of(tl.cdiv(dv, BV), chunks, heads)
    begin, end, shift = span_of(chunk, pieces, length, CHUNK, PACKED)
    inside, step, live, token = tokens_of(begin, end, index, length, CHUNK, WALK, REVERSE)
    values = part * BV + tl.arange(0, BV)
    here = values < dv
    logs = log_decays(g + b * g_batch + h * g_head, fresh, token, step, live, g_token, GATED, FRESH)
    q += b * q_batch + h * q_head
    k += b * k_batch + h * k_head
    states += (row * slots + chunk + shift) * dk * dv
    pairs, o = tl.zeros((CHUNK, CHUNK), tl.float32), tl.zeros((CHUNK, BV), tl.float32)
    for first in range(0, dk, BK):
        keys = first + tl.arange(0, BK)
        here_k = keys < dk
        q_t = tile(q, token * q_token, keys, live, here_k)
        pairs += product(q_t, tl.trans(tile(k, token * k_token, keys, live, here_k)))
        o += product(q_t, tile(states, keys * dv, values, here_k, here))
    pairs *= decays_between(logs, inside[:, None] >= inside[None, :], GATED or FRESH)
    from_begin, _, _ = edge_decays(logs, GATED or FRESH)
    at = ((b * length + token) * heads + h) * dv
    u = tile(v + b * v_batch + h * v_head, token * v_token, values, live, here) - tile(recalled, at, values, live, here)
    u *= tl.load(beta + b * beta_batch + h * beta_head + token * beta_token, mask=live, other=0.0).to(tl.float32)[:, None]
    o = scale * (o * from_begin[:, None] + product(pairs, u))
    tl.store(out + at[:, None] + values[None, :], o.to(out.dtype.element_ty), mask=live[:, None] & here[None, :])
