"""What each chunk adds to the state, in parallel. From that, `triton_carry.py` computes the states at the chunks' edges.

Slot c of `states` (b*h, slots, dk, dv) is the state that enters chunk c; the last slot is the final state. Backwards a slot is the gradient of that
state; slot 0 is the initial state's. A state passes a chunk's edge whole, even where the walk begins anew there: its readers then mask it.

PACKED (see kernels/pieces.py): no chunk has tokens of two segments. Each segment has a slot for the state that leaves its last chunk, so chunk c of
segment s has slot c + s; from there to the next slot, which the next segment's state enters, the decay is 0.
"""

# ruff: noqa: SIM108 (Triton does not compile every conditional expression)

from __future__ import annotations

import triton
import triton.language as tl

from medssm.kernels.matrix_state.triton_tiles import HEAD, KEY, gated_tile, log_decays, segment_of, stepped_tile
from medssm.kernels.triton_tiles import chunk_of, product, span_of, tile, tokens_of, visited


@triton.jit
def chunk_states(
    k,
    v,
    g,
    steps,
    z,
    index,
    segment,
    pieces,
    states,
    decays,
    scale,
    length,
    heads,
    k_repeat,
    v_repeat,
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
    g_batch,
    g_token,
    g_head,
    z_batch,
    z_token,
    z_head,
    BACKWARD: tl.constexpr,
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
    """Forwards, slot c + 1 becomes sum_i exp(G_end - G_i) k_i v_i^T over chunk c; STEPS multiplies v by steps (b,l,h). decays
    (b*h, slots - 1[, dk]) become the factor by which the chunk multiplies the state that enters it.

    BACKWARD: k is q and v the output's gradient, which GATE multiplies by silu(z); slot c becomes scale sum_t exp(G_t) q_t do_t^T.
    """
    tiles_v = tl.cdiv(dv, BV)
    of_state, chunk, row, b, h = chunk_of(tl.cdiv(dk, BK) * tiles_v, chunks, heads)
    keys = of_state // tiles_v * BK + tl.arange(0, BK)
    values = of_state % tiles_v * BV + tl.arange(0, BV)
    here_k, here_v = keys < dk, values < dv
    begin, end, shift = span_of(chunk, pieces, length, CHUNK, PACKED)
    inside, step, live, token = tokens_of(begin, end, index, length, CHUNK, WALK, REVERSE)
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
            following = log_decays(
                g, visited(index, step + 1, length, WALK, REVERSE), (inside + 1 < CHUNK) & (step + 1 < end), keys, here_k, g_token, DECAY
            )
            weights = tl.exp(tl.cumsum(following, 0, reverse=True))
            seen = mine == at_end
        if DECAY == HEAD:
            a *= tl.where(seen, weights, 0.0)[:, None]
        else:
            a *= tl.where(seen[:, None], weights, 0.0)
    v += b * v_batch + h // v_repeat * v_head
    slot = row * slots + chunk + shift
    if BACKWARD:
        c = gated_tile(v, token * v_token, values, live, here_v, z + b * z_batch + h * z_head, token * z_token, GATE)
        a *= scale
    else:
        c = stepped_tile(v, token * v_token, values, live, here_v, steps, (b * length + token) * heads + h, STEPS)
        if DECAY == KEY:
            kept = tl.where(at_entry == at_end, tl.exp(tl.sum(logs, 0)), 0.0)
            if of_state % tiles_v == 0:
                tl.store(decays + (row * (slots - 1) + chunk + shift) * dk + keys, kept, mask=here_k)
        else:
            kept = tl.where(at_entry == at_end, 1.0, 0.0)
            if DECAY == HEAD:
                kept *= tl.exp(tl.sum(logs, 0))
            if of_state == 0:
                tl.store(decays + row * (slots - 1) + chunk + shift, kept)
        slot += 1
    at = slot * dk * dv + keys.to(tl.int64)[:, None] * dv + values[None, :]
    tl.store(states + at, product(tl.trans(a), c), mask=here_k[:, None] & here_v[None, :])
