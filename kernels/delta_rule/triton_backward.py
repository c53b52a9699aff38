"""The delta rule backward on a GPU: the kernels. `triton.py` launches them.

With U = T diag(beta) (V - diag(exp G) K S), T = (I + diag(beta) tril(exp(G_t - G_i) k_t k_i, -1))^-1 and R the gradient of what T multiplies:

    dU = scale P^T dO + diag(exp(G_C - G)) K dS_C,    R = T^T dU
    dS = exp(G_C) dS_C + scale (diag(exp G) Q)^T dO - (diag(beta exp G) K)^T R

S enters the chunk, S_C leaves it, P = tril(exp(G_t - G_i) q_t k_i). `outer` writes the part of dU and dS that comes from the outputs. `carry_back` in
triton_carry.py carries dS from the last chunk to the first and writes R. The other kernels compute the rest: dV = diag(beta) R, dbeta_t = R_t w_t,
and -R U^T, the gradient of the matrix that T inverts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from medssm.kernels.delta_rule.triton_chunks import decays_between, edge_decays, log_decays
from medssm.kernels.triton_tiles import chunk_of, product, span_of, tile, tokens_of


@triton.jit
def outer(
    dout,
    q,
    k,
    g,
    fresh,
    index,
    pieces,
    r,
    exits,
    scale,
    length,
    heads,
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
    """Gradients through the outputs of the same chunk: of the updates, r (b,l,h,dv) = scale sum_{t>=i} exp(G_t - G_i) (q_t k_i) dout_t, and of the
    state that enters it, exits (b*h, slots, dk, dv) = scale sum_t exp(G_t) q_t dout_t^T.
    """
    part, chunk, row, b, h = chunk_of(tl.cdiv(dv, BV), chunks, heads)
    begin, end, shift = span_of(chunk, pieces, length, CHUNK, PACKED)
    inside, step, live, token = tokens_of(begin, end, index, length, CHUNK, WALK, REVERSE)
    values = part * BV + tl.arange(0, BV)
    here = values < dv
    q += b * q_batch + h * q_head
    k += b * k_batch + h * k_head
    exits += (row * slots + chunk + shift) * dk * dv
    logs = log_decays(g + b * g_batch + h * g_head, fresh, token, step, live, g_token, GATED, FRESH)
    from_begin, _, _ = edge_decays(logs, GATED or FRESH)
    do = tile(dout + b * dout_batch + h * dout_head, token * dout_token, values, live, here)
    faded = do * (scale * from_begin)[:, None]
    pairs = tl.zeros((CHUNK, CHUNK), tl.float32)  # [i, t]
    for first in range(0, dk, BK):
        keys = first + tl.arange(0, BK)
        q_t = tl.trans(tile(q, token * q_token, keys, live, keys < dk))
        pairs += product(tile(k, token * k_token, keys, live, keys < dk), q_t)
        tl.store(exits + keys[:, None] * dv + values[None, :], product(q_t, faded), mask=(keys < dk)[:, None] & here[None, :])
    pairs *= tl.trans(decays_between(logs, inside[:, None] >= inside[None, :], GATED or FRESH))
    at = ((b * length + token) * heads + h) * dv
    tl.store(r + at[:, None] + values[None, :], scale * product(pairs, do), mask=live[:, None] & here[None, :])


@triton.jit
def pair_gradients(
    dout,
    q,
    k,
    v,
    beta,
    g,
    fresh,
    index,
    pieces,
    recalled,
    r,
    to_v,
    to_beta,
    to_g,
    dpairs,
    dinverted,
    scale,
    length,
    heads,
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
    """Gradients (b,l,h,…) of v and beta, and of the products of a chunk's tokens.

    dpairs, dinverted (b*h, chunks, CHUNK, CHUNK): the gradients of q_t k_i and of k_t k_i; to_g (b,l,h): their part of the log decays' gradient.
    """
    _, chunk, row, b, h = chunk_of(1, chunks, heads)
    begin, end, _ = span_of(chunk, pieces, length, CHUNK, PACKED)
    inside, step, live, token = tokens_of(begin, end, index, length, CHUNK, WALK, REVERSE)
    at = (b * length + token) * heads + h
    shares = tl.load(beta + b * beta_batch + h * beta_head + token * beta_token, mask=live, other=0.0).to(tl.float32)
    dout += b * dout_batch + h * dout_head
    v += b * v_batch + h * v_head
    of_pairs, of_inverted = tl.zeros((CHUNK, CHUNK), tl.float32), tl.zeros((CHUNK, CHUNK), tl.float32)
    of_beta = tl.zeros((CHUNK,), tl.float32)
    for first in range(0, dv, BV):
        values = first + tl.arange(0, BV)
        here = values < dv
        behind = tile(r, at * dv, values, live, here)
        w = tile(v, token * v_token, values, live, here) - tile(recalled, at * dv, values, live, here)
        tl.store(
            to_v + (at * dv)[:, None] + values[None, :], (shares[:, None] * behind).to(to_v.dtype.element_ty), mask=live[:, None] & here[None, :]
        )
        of_beta += tl.sum(behind * w, 1)
        u = tl.trans(shares[:, None] * w)
        of_pairs += product(tile(dout, token * dout_token, values, live, here), u)
        of_inverted += product(behind, u)
    tl.store(to_beta + at, of_beta.to(to_beta.dtype.element_ty), mask=live)

    logs = log_decays(g + b * g_batch + h * g_head, fresh, token, step, live, g_token, GATED, FRESH)
    later, earlier = inside[:, None], inside[None, :]
    between = decays_between(logs, later >= earlier, GATED or FRESH)
    of_pairs *= scale * between
    of_inverted *= tl.where(later > earlier, between, 0.0) * -shares[:, None]
    square = (row * chunks + chunk) * CHUNK * CHUNK + later * CHUNK + earlier
    tl.store(dpairs + square, of_pairs)
    tl.store(dinverted + square, of_inverted)
    if GATED:
        q += b * q_batch + h * q_head
        k += b * k_batch + h * k_head
        queried, keyed = tl.zeros((CHUNK, CHUNK), tl.float32), tl.zeros((CHUNK, CHUNK), tl.float32)
        for first in range(0, dk, BK):
            keys = first + tl.arange(0, BK)
            k_t = tile(k, token * k_token, keys, live, keys < dk)
            queried += product(tile(q, token * q_token, keys, live, keys < dk), tl.trans(k_t))
            keyed += product(k_t, tl.trans(k_t))
        # A step's decay multiplies everything that goes from an earlier step to this step or a later one.
        before = product(of_pairs * queried + of_inverted * keyed, tl.where(later < earlier, 1.0, 0.0))  # [s, t]: from all i < t to s
        tl.store(to_g + at, tl.sum(tl.where(later >= earlier, before, 0.0), 0), mask=live)


@triton.jit
def query_gradients(
    dout,
    k,
    q,
    g,
    fresh,
    index,
    pieces,
    states,
    dpairs,
    to_q,
    to_g,
    scale,
    length,
    heads,
    dk,
    dv,
    chunks,
    slots,
    dout_batch,
    dout_token,
    dout_head,
    k_batch,
    k_token,
    k_head,
    q_batch,
    q_token,
    q_head,
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
    """The gradient (b,l,h,dk) of q. to_g: adds the log decays' gradient from the entry states to the outputs."""
    _, chunk, row, b, h = chunk_of(1, chunks, heads)
    begin, end, shift = span_of(chunk, pieces, length, CHUNK, PACKED)
    inside, step, live, token = tokens_of(begin, end, index, length, CHUNK, WALK, REVERSE)
    later, earlier = inside[:, None], inside[None, :]
    at = (b * length + token) * heads + h
    from_begin, _, _ = edge_decays(log_decays(g + b * g_batch + h * g_head, fresh, token, step, live, g_token, GATED, FRESH), GATED or FRESH)
    dout += b * dout_batch + h * dout_head
    q += b * q_batch + h * q_head
    k += b * k_batch + h * k_head
    states += (row * slots + chunk + shift) * dk * dv
    of_pairs = tl.load(dpairs + (row * chunks + chunk) * CHUNK * CHUNK + later * CHUNK + earlier)
    from_entry = tl.zeros((CHUNK,), tl.float32)
    for first_key in range(0, dk, BK):
        keys = first_key + tl.arange(0, BK)
        here_k = keys < dk
        of_q = tl.zeros((CHUNK, BK), tl.float32)
        for first in range(0, dv, BV):
            values = first + tl.arange(0, BV)
            here = values < dv
            state = tl.trans(tile(states, keys * dv, values, here_k, here))
            of_q += product(tile(dout, token * dout_token, values, live, here), state)
        of_q *= (scale * from_begin)[:, None]
        if GATED:
            from_entry += tl.sum(of_q * tile(q, token * q_token, keys, live, here_k), 1)
        of_q += product(of_pairs, tile(k, token * k_token, keys, live, here_k))
        tl.store(to_q + (at * dk)[:, None] + keys[None, :], of_q.to(to_q.dtype.element_ty), mask=live[:, None] & here_k[None, :])
    if GATED:
        of_g = tl.load(to_g + at, mask=live, other=0.0)
        tl.store(to_g + at, of_g + tl.sum(tl.where(later >= earlier, from_entry[:, None], 0.0), 0), mask=live)


@triton.jit
def entry_key_gradients(
    q,
    k,
    beta,
    g,
    fresh,
    index,
    pieces,
    r,
    states,
    dpairs,
    dinverted,
    to_k,
    to_g,
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
    """to_k (b,l,h,dk): the gradient of k through the entry states and the products of a chunk's tokens. to_g: adds the log decays' part."""
    _, chunk, row, b, h = chunk_of(1, chunks, heads)
    begin, end, shift = span_of(chunk, pieces, length, CHUNK, PACKED)
    inside, step, live, token = tokens_of(begin, end, index, length, CHUNK, WALK, REVERSE)
    later, earlier = inside[:, None], inside[None, :]
    at = (b * length + token) * heads + h
    from_begin, _, _ = edge_decays(log_decays(g + b * g_batch + h * g_head, fresh, token, step, live, g_token, GATED, FRESH), GATED or FRESH)
    factor = -from_begin * tl.load(beta + b * beta_batch + h * beta_head + token * beta_token, mask=live, other=0.0).to(tl.float32)
    q += b * q_batch + h * q_head
    k += b * k_batch + h * k_head
    states += (row * slots + chunk + shift) * dk * dv
    dpairs += (row * chunks + chunk) * CHUNK * CHUNK
    dinverted += (row * chunks + chunk) * CHUNK * CHUNK
    from_entry = tl.zeros((CHUNK,), tl.float32)
    for first_key in range(0, dk, BK):
        keys = first_key + tl.arange(0, BK)
        here_k = keys < dk
        of_k = tl.zeros((CHUNK, BK), tl.float32)
        for first in range(0, dv, BV):
            values = first + tl.arange(0, BV)
            here = values < dv
            of_k += product(tile(r, at * dv, values, live, here), tl.trans(tile(states, keys * dv, values, here_k, here)))
        of_k *= factor[:, None]
        k_t = tile(k, token * k_token, keys, live, here_k)
        if GATED:
            from_entry += tl.sum(of_k * k_t, 1)
        of_k += product(tl.load(dpairs + earlier * CHUNK + later), tile(q, token * q_token, keys, live, here_k))
        of_k += product(tl.load(dinverted + later * CHUNK + earlier) + tl.load(dinverted + earlier * CHUNK + later), k_t)
        tl.store(to_k + (at * dk)[:, None] + keys[None, :], of_k, mask=live[:, None] & here_k[None, :])
    if GATED:
        of_g = tl.load(to_g + at, mask=live, other=0.0)
        tl.store(to_g + at, of_g + tl.sum(tl.where(later >= earlier, from_entry[:, None], 0.0), 0), mask=live)


@triton.jit
def exit_key_gradients(
    k,
    v,
    beta,
    g,
    fresh,
    index,
    pieces,
    recalled,
    states,
    exits,
    so_far,
    to_k,
    g_so_far,
    to_g,
    length,
    heads,
    dk,
    dv,
    chunks,
    slots,
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
    """Gradients (b,l,h,…) of k and g: the gradient through the exit states, added to so_far and g_so_far of the other kernels."""
    _, chunk, row, b, h = chunk_of(1, chunks, heads)
    begin, end, shift = span_of(chunk, pieces, length, CHUNK, PACKED)
    inside, step, live, token = tokens_of(begin, end, index, length, CHUNK, WALK, REVERSE)
    at = (b * length + token) * heads + h
    logs = log_decays(g + b * g_batch + h * g_head, fresh, token, step, live, g_token, GATED, FRESH)
    _, to_end, through = edge_decays(logs, GATED or FRESH)
    factor = to_end * tl.load(beta + b * beta_batch + h * beta_head + token * beta_token, mask=live, other=0.0).to(tl.float32)
    k += b * k_batch + h * k_head
    v += b * v_batch + h * v_head
    states += (row * slots + chunk + shift) * dk * dv
    exits += (row * slots + chunk + shift + 1) * dk * dv
    to_exit = tl.zeros((CHUNK,), tl.float32)
    kept = tl.zeros((BV,), tl.float32)
    for first_key in range(0, dk, BK):
        keys = first_key + tl.arange(0, BK)
        here_k = keys < dk
        of_k = tl.zeros((CHUNK, BK), tl.float32)
        for first in range(0, dv, BV):
            values = first + tl.arange(0, BV)
            here = values < dv
            w = tile(v, token * v_token, values, live, here) - tile(recalled, at * dv, values, live, here)
            ds = tile(exits, keys * dv, values, here_k, here)
            of_k += product(w, tl.trans(ds))
            if GATED:
                kept += tl.sum(ds * tile(states, keys * dv, values, here_k, here), 0)
        of_k *= factor[:, None]
        if GATED:
            to_exit += tl.sum(of_k * tile(k, token * k_token, keys, live, here_k), 1)
        places, inner = (at * dk)[:, None] + keys[None, :], live[:, None] & here_k[None, :]
        of_k += tl.load(so_far + places, mask=inner, other=0.0)
        tl.store(to_k + places, of_k.to(to_k.dtype.element_ty), mask=inner)
    if GATED:
        # A step's decay multiplies everything that goes from before the step to the step or after it: between tokens, from the entry state to a
        # token, from a token to the exit state, from state to state. Summed without differences, the gradient of a strong decay is exactly 0.
        of_g = tl.load(g_so_far + at, mask=live, other=0.0) + through * tl.sum(kept, 0)
        of_g += tl.sum(tl.where(inside[:, None] < inside[None, :], to_exit[:, None], 0.0), 0)
        tl.store(to_g + at, of_g.to(to_g.dtype.element_ty), mask=live)
