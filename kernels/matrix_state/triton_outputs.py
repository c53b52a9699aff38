"""What a chunk's tokens read, of the state at its edge and of each other: the outputs, and by the same sums three of the gradients.

With S the state that enters the chunk, dS the gradient of the state that leaves it, E_ti = exp(G_t - G_i) for i <= t:

    o_t  = scale (exp(G_t) q_t S + sum_i E_ti (q_t k_i) v_i)               x, y, c = q, k, v
    dv_i = exp(G_end - G_i) k_i dS + scale sum_t E_ti (k_i q_t) do_t       x, y, c = k, q, do
    dq_t = scale (exp(G_t) do_t S^T + sum_i E_ti (do_t v_i) k_i)           x, y, c = do, v, k
    dk_i = exp(G_end - G_i) v_i dS^T + scale sum_t E_ti (v_i do_t) q_t     x, y, c = v, do, q
"""

# ruff: noqa: SIM108, SIM109 (Triton does not compile every expression)

from __future__ import annotations

import triton
import triton.language as tl

from medssm.kernels.matrix_state.triton_tiles import HEAD, KEY, log_decays, scaled_tile, segment_of, silu
from medssm.kernels.triton_tiles import pair_decays, product, tile, visited

OUT, DV, DQ, DK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def read(
    x,
    y,
    c,
    own,
    g,
    pairs,
    states,
    steps,
    skip,
    z,
    kept,
    index,
    segment,
    out,
    side,
    dz,
    scale,
    length,
    heads,
    x_repeat,
    y_repeat,
    c_repeat,
    own_repeat,
    width,
    out_width,
    chunks,
    s_row,
    s_col,
    x_batch,
    x_token,
    x_head,
    y_batch,
    y_token,
    y_head,
    c_batch,
    c_token,
    c_head,
    own_batch,
    own_token,
    own_head,
    g_batch,
    g_token,
    g_head,
    z_batch,
    z_token,
    z_head,
    OF: tl.constexpr,
    DECAY: tl.constexpr,
    X_BY: tl.constexpr,
    Y_BY: tl.constexpr,
    C_BY: tl.constexpr,
    STEPS: tl.constexpr,
    SKIP: tl.constexpr,
    GATE: tl.constexpr,
    SAVE: tl.constexpr,
    WALK: tl.constexpr,
    STARTS: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """out (b,l,h,out_width) of x, y (b,l,h,width) and c (b,l,h,out_width). states: slots of S, or of dS from slot 1 on, (width, out_width).

    X_BY, Y_BY, C_BY: what they are multiplied by (scaled_tile). DV and DQ, DK with decays per head also read own (b,l,h,out_width), the input whose
    gradient out is. With a decay per key the pairs' products (b*h, chunks, CHUNK, CHUNK) are read: OUT and DV alone.
    OUT: SKIP adds skip (h,out_width) c; SAVE puts that in side (b,l,h,out_width), GATE multiplies it by silu(z).
    DV: with STEPS, own is multiplied by steps, and side (tiles, b, l, h) gets the parts of their gradient; SKIP adds skip do; with GATE dz is
    written, from kept, which SAVE saved.
    DQ, DK: with decays per head, side (2 x tiles, b*h, chunks, CHUNK) gets the parts of q_t dq_t - k_t dk_t without the pair (t, t).
    """
    AFTER: tl.constexpr = OF == DV or OF == DK  # a token reads those after it
    tiles = tl.cdiv(out_width, BN)
    program = tl.program_id(0)
    part = (program % tiles).to(tl.int64)
    chunk = program // tiles % chunks
    row = (program // tiles // chunks).to(tl.int64)
    b, h = row // heads, row % heads
    cols = program % tiles * BN + tl.arange(0, BN)
    here_n = cols < out_width
    inside = tl.arange(0, CHUNK)
    step = chunk * CHUNK + inside
    live = step < length
    token = visited(index, step, length, WALK, REVERSE)
    of_steps = (b * length + token) * heads + h
    mine = segment_of(segment, step, length, STARTS)
    x += b * x_batch + h // x_repeat * x_head
    y += b * y_batch + h // y_repeat * y_head
    c += b * c_batch + h // c_repeat * c_head
    g += b * g_batch + h * g_head
    z += b * z_batch + h * z_head
    states += (row * (chunks + 1) + chunk) * width * out_width
    if not AFTER:
        reached = mine == segment_of(segment, chunk * CHUNK - 1, length, STARTS)
        seen = (inside[:, None] >= inside[None, :]) & (mine[:, None] == mine[None, :])
        to_edge, edged = token, live  # whose decays lie between a token and the edge
    else:
        reached = mine == segment_of(segment, chunk * CHUNK + CHUNK - 1, length, STARTS)
        seen = (inside[:, None] <= inside[None, :]) & (mine[:, None] == mine[None, :])
        to_edge, edged = visited(index, step + 1, length, WALK, REVERSE), (inside + 1 < CHUNK) & (step + 1 < length)

    sums = tl.zeros((CHUNK, BN), tl.float32)
    a = tl.zeros((CHUNK, CHUNK), tl.float32)
    for first in range(0, width, BM):
        m = first + tl.arange(0, BM)
        here_m = m < width
        x_t = scaled_tile(x, token, x_token, m, live, here_m, steps, of_steps, z, z_token, X_BY)
        if DECAY != KEY:
            a += product(x_t, tl.trans(scaled_tile(y, token, y_token, m, live, here_m, steps, of_steps, z, z_token, Y_BY)))
        else:
            x_t *= tl.exp(tl.cumsum(log_decays(g, to_edge, edged, m, here_m, g_token, DECAY), 0, reverse=OF == DV))
        state = tl.load(states + m[:, None] * s_row + cols[None, :] * s_col, mask=here_m[:, None] & here_n[None, :], other=0.0)
        sums += product(x_t, state)
    if DECAY == KEY:
        pairs += (row * chunks + chunk) * CHUNK * CHUNK
        if OF == DV:
            a = tl.load(pairs + inside[:, None] + inside[None, :] * CHUNK)
        else:
            a = tl.load(pairs + inside[:, None] * CHUNK + inside[None, :])
        sums = tl.where(reached[:, None], sums, 0.0)
    else:
        if DECAY == HEAD:
            sums *= tl.where(reached, tl.exp(tl.cumsum(log_decays(g, to_edge, edged, cols, here_n, g_token, DECAY), 0, reverse=AFTER)), 0.0)[:, None]
            a *= pair_decays(log_decays(g, token, live, cols, here_n, g_token, DECAY), seen, AFTER)
        else:
            sums = tl.where(reached[:, None], sums, 0.0)
            a = tl.where(seen, a, 0.0)
    if not AFTER:
        sums *= scale
    a *= scale
    c_t = scaled_tile(c, token, c_token, cols, live, here_n, steps, of_steps, z, z_token, C_BY)
    at = of_steps[:, None] * out_width + cols[None, :]
    mask = live[:, None] & here_n[None, :]
    if (OF == DQ or OF == DK) and DECAY == HEAD:
        itself = inside[:, None] == inside[None, :]
        sums += product(tl.where(itself, 0.0, a), c_t)
        change = tl.sum(sums * tile(own + b * own_batch + h // own_repeat * own_head, token * own_token, cols, live, here_n), 1)
        if OF == DK:
            part += tiles
            change = -change
        tl.store(side + ((part * (tl.num_programs(0) // tiles // chunks) + row) * chunks + chunk) * CHUNK + inside, change)
        sums += tl.sum(tl.where(itself, a, 0.0), 1)[:, None] * c_t
    else:
        sums += product(a, c_t)
    if OF == DV and STEPS:
        v = tile(own + b * own_batch + h // own_repeat * own_head, token * own_token, cols, live, here_n)
        tl.store(side + part * (tl.num_programs(0) // tiles // chunks) * length + of_steps, tl.sum(sums * v, 1), mask=live)
        sums *= tl.load(steps + of_steps, mask=live, other=0.0)[:, None]
    if SKIP:
        here = tl.load(skip + h * out_width + cols, mask=here_n, other=0.0)[None, :]
        if OF == OUT and STEPS:
            sums += here * tile(c, token * c_token, cols, live, here_n)
        else:
            sums += here * c_t
    if OF == OUT and SAVE:
        tl.store(side + at, sums, mask=mask)
    if OF == OUT and GATE:
        sums *= silu(tile(z, token * z_token, cols, live, here_n))
    if OF == DV and GATE:
        gate = tile(z, token * z_token, cols, live, here_n)
        opened = 1.0 / (1.0 + tl.exp(-gate))
        grown = tile(c, token * c_token, cols, live, here_n) * tl.load(kept + at, mask=mask, other=0.0)
        tl.store(dz + at, (grown * opened * (1.0 + gate * (1.0 - opened))).to(dz.dtype.element_ty), mask=mask)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=mask)
