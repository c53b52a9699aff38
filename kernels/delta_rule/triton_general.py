"""The general form of the delta rule on a GPU: the kernels. `triton.py` launches them.

A program has a tile of value channels, whose columns of the state are independent, and walks a segment token by token. Gradients that are sums over
value channels are written for each tile; the caller adds them. The walk back runs chunk by chunk: it computes the states of a chunk again from the
state that enters it, keeps them in memory, and then goes back over them.
"""

# ruff: noqa: SIM108 (Triton does not compile every conditional expression)

from __future__ import annotations

import triton
import triton.language as tl

from medssm.kernels.matrix_state.triton_tiles import HEAD, KEY
from medssm.kernels.triton_tiles import span_of, visited


@triton.jit
def row(pointer, at, here):
    """A token's features in float32."""
    return tl.load(pointer + at, mask=here, other=0.0).to(tl.float32)


@triton.jit
def begun(state, fresh, step, FRESH: tl.constexpr):
    """The state, or zeros where it begins anew. fresh (l,): not 0 there."""
    if FRESH:
        state = tl.where(tl.load(fresh + step) != 0.0, 0.0, state)
    return state


@triton.jit
def decay_of(g, token, keys, here, g_token, DECAY: tl.constexpr):
    """e (keys,)."""
    if DECAY == KEY:
        return tl.exp(row(g, token * g_token + keys, here))
    one = tl.where(here, 1.0, 1.0)
    if DECAY == HEAD:
        one *= tl.exp(tl.load(g + token * g_token).to(tl.float32))
    return one


@triton.jit
def gate_of(write, token, values, here, write_token, PER_VALUE: tl.constexpr):
    """w (values,)."""
    if PER_VALUE:
        return row(write, token * write_token + values, here)
    return tl.where(here, 1.0, 1.0) * tl.load(write + token * write_token).to(tl.float32)


@triton.jit
def place(chunks, heads, dv, bounds, PACKED: tl.constexpr, segments, BV: tl.constexpr):
    """What this program works on: its tile of value channels, (batch, head) and both apart, segment, and the segment's chunks."""
    tiles = tl.cdiv(dv, BV)
    part, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    of_head, segment = (rest // segments).to(tl.int64), rest % segments
    first, stop = segment * 0, segment * 0 + chunks
    if PACKED:
        first, stop = tl.load(bounds + segment).to(tl.int32), tl.load(bounds + segment + 1).to(tl.int32)
    return part, of_head, of_head // heads, of_head % heads, segment, first, stop


@triton.jit
def walk(
    q,
    k,
    v,
    a,
    c,
    write,
    g,
    fresh,
    index,
    pieces,
    bounds,
    out,
    recalled,
    entering,
    leaving,
    states,
    scale,
    length,
    heads,
    dk,
    dv,
    chunks,
    segments,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    a_batch,
    a_token,
    a_head,
    c_batch,
    c_token,
    c_head,
    write_batch,
    write_token,
    write_head,
    g_batch,
    g_token,
    g_head,
    KNOWN: tl.constexpr,
    DECAY: tl.constexpr,
    PER_VALUE: tl.constexpr,
    FIRST: tl.constexpr,
    FRESH: tl.constexpr,
    PACKED: tl.constexpr,
    WALK: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """entering, leaving (segments, b*h, dk, dv): the states at the segments' ends. out, recalled (b,l,h,dv) are written.

    KNOWN: recalled is read instead, and the only result is states (b*h, chunks, dk, dv), those that enter the chunks.
    """
    part, of_head, b, h, segment, first, stop = place(chunks, heads, dv, bounds, PACKED, segments, BV)
    keys, values = tl.arange(0, BK), part * BV + tl.arange(0, BV)
    here_k, here = keys < dk, values < dv
    q += b * q_batch + h * q_head
    k += b * k_batch + h * k_head
    v += b * v_batch + h * v_head
    a += b * a_batch + h * a_head
    c += b * c_batch + h * c_head
    write += b * write_batch + h * write_head
    g += b * g_batch + h * g_head
    square, inside = keys[:, None] * dv + values[None, :], here_k[:, None] & here[None, :]
    edge = (segment.to(tl.int64) * (tl.num_programs(0) // tl.cdiv(dv, BV) // segments) + of_head) * dk * dv
    state = tl.load(entering + edge + square, mask=inside, other=0.0)
    for chunk in range(first, stop):
        begin, end, _ = span_of(chunk, pieces, length, CHUNK, PACKED)
        if KNOWN:
            tl.store(states + (of_head * chunks + chunk) * dk * dv + square, state, mask=inside)
        for step in range(begin, tl.minimum(begin + CHUNK, end)):
            token = visited(index, tl.cast(step, tl.int32), length, WALK, REVERSE)
            state = begun(state, fresh, step, FRESH)
            at = ((b * length + token) * heads + h) * dv + values
            decayed = state * decay_of(g, token, keys, here_k, g_token, DECAY)[:, None]
            if KNOWN:
                recall = row(recalled, at, here)
            else:
                erased = row(a, token * a_token + keys, here_k)[:, None]
                if FIRST:
                    recall = tl.sum(state * erased, 0)
                else:
                    recall = tl.sum(decayed * erased, 0)
            value = gate_of(write, token, values, here, write_token, PER_VALUE) * row(v, token * v_token + values, here)
            state = decayed - row(c, token * c_token + keys, here_k)[:, None] * recall[None, :]
            state += row(k, token * k_token + keys, here_k)[:, None] * value[None, :]
            if not KNOWN:
                tl.store(recalled + at, recall, mask=here)
                o = scale * tl.sum(state * row(q, token * q_token + keys, here_k)[:, None], 0)
                tl.store(out + at, o.to(out.dtype.element_ty), mask=here)
    if not KNOWN:
        tl.store(leaving + edge + square, state, mask=inside)


@triton.jit
def walk_back(
    dout,
    q,
    k,
    v,
    a,
    c,
    write,
    g,
    fresh,
    index,
    pieces,
    bounds,
    recalled,
    states,
    scratch,
    edges,
    to_q,
    to_k,
    to_v,
    to_a,
    to_c,
    to_write,
    to_g,
    scale,
    length,
    heads,
    dk,
    dv,
    chunks,
    segments,
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
    a_batch,
    a_token,
    a_head,
    c_batch,
    c_token,
    c_head,
    write_batch,
    write_token,
    write_head,
    g_batch,
    g_token,
    g_head,
    DECAY: tl.constexpr,
    PER_VALUE: tl.constexpr,
    FIRST: tl.constexpr,
    FRESH: tl.constexpr,
    PACKED: tl.constexpr,
    WALK: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """edges (segments, b*h, dk, dv): the gradients of the states that leave the segments become those of the states that enter them.

    to_v (b,l,h,dv); to_q, to_k, to_a, to_c (tiles,b,l,h,dk); to_g the same or (tiles,b,l,h); to_write (b,l,h,dv) or (tiles,b,l,h).
    scratch (programs, CHUNK, BK, BV): the states before the tokens of a chunk.
    """
    part, of_head, b, h, segment, first, stop = place(chunks, heads, dv, bounds, PACKED, segments, BV)
    keys, values = tl.arange(0, BK), part * BV + tl.arange(0, BV)
    here_k, here = keys < dk, values < dv
    dout += b * dout_batch + h * dout_head
    q += b * q_batch + h * q_head
    k += b * k_batch + h * k_head
    v += b * v_batch + h * v_head
    a += b * a_batch + h * a_head
    c += b * c_batch + h * c_head
    write += b * write_batch + h * write_head
    g += b * g_batch + h * g_head
    square, inside = keys[:, None] * dv + values[None, :], here_k[:, None] & here[None, :]
    rows = tl.num_programs(0) // tl.cdiv(dv, BV) // segments
    edge = edges + (segment.to(tl.int64) * rows + of_head) * dk * dv + square
    scratch += tl.program_id(0).to(tl.int64) * CHUNK * BK * BV + keys[:, None] * BV + tl.arange(0, BV)[None, :]
    x = tl.load(edge, mask=inside, other=0.0)
    for i in range(first, stop):
        chunk = first + stop - 1 - i
        begin, end, _ = span_of(chunk, pieces, length, CHUNK, PACKED)
        end = tl.minimum(begin + CHUNK, end)
        state = tl.load(states + (of_head * chunks + chunk) * dk * dv + square, mask=inside, other=0.0)
        for step in range(begin, end):
            token = visited(index, tl.cast(step, tl.int32), length, WALK, REVERSE)
            tl.store(scratch + (step - begin) * BK * BV, state)
            state = begun(state, fresh, step, FRESH)
            recall = row(recalled, ((b * length + token) * heads + h) * dv + values, here)
            value = gate_of(write, token, values, here, write_token, PER_VALUE) * row(v, token * v_token + values, here)
            state *= decay_of(g, token, keys, here_k, g_token, DECAY)[:, None]
            state -= row(c, token * c_token + keys, here_k)[:, None] * recall[None, :]
            state += row(k, token * k_token + keys, here_k)[:, None] * value[None, :]
        tl.debug_barrier()  # other threads read what is stored
        for back in range(begin, end):
            step = begin + end - 1 - back
            token = visited(index, tl.cast(step, tl.int32), length, WALK, REVERSE)
            of_token = (b * length + token) * heads + h
            of_tile = part.to(tl.int64) * (rows * length.to(tl.int64)) + of_token
            do = scale * row(dout, token * dout_token + values, here)
            x += row(q, token * q_token + keys, here_k)[:, None] * do[None, :]
            tl.store(to_q + of_tile * dk + keys, tl.sum(state * do[None, :], 1), mask=here_k)
            state = tl.load(scratch + (step - begin) * BK * BV)
            before = begun(state, fresh, step, FRESH)
            e = decay_of(g, token, keys, here_k, g_token, DECAY)[:, None]
            decayed = before * e
            recall = row(recalled, of_token * dv + values, here)
            gate, value = gate_of(write, token, values, here, write_token, PER_VALUE), row(v, token * v_token + values, here)
            du = tl.sum(x * row(k, token * k_token + keys, here_k)[:, None], 0)
            of_recall = -tl.sum(x * row(c, token * c_token + keys, here_k)[:, None], 0)
            tl.store(to_v + of_token * dv + values, (gate * du).to(to_v.dtype.element_ty), mask=here)
            if PER_VALUE:
                tl.store(to_write + of_token * dv + values, du * value, mask=here)
            else:
                tl.store(to_write + of_tile, tl.sum(du * value, 0))
            tl.store(to_k + of_tile * dk + keys, tl.sum(x * (gate * value)[None, :], 1), mask=here_k)
            tl.store(to_c + of_tile * dk + keys, -tl.sum(x * recall[None, :], 1), mask=here_k)
            through = row(a, token * a_token + keys, here_k)[:, None] * of_recall[None, :]
            if FIRST:
                tl.store(to_a + of_tile * dk + keys, tl.sum(before * of_recall[None, :], 1), mask=here_k)
            else:
                tl.store(to_a + of_tile * dk + keys, tl.sum(decayed * of_recall[None, :], 1), mask=here_k)
                x += through
            of_g = tl.sum(decayed * x, 1)
            if DECAY == KEY:
                tl.store(to_g + of_tile * dk + keys, of_g, mask=here_k)
            elif DECAY == HEAD:
                tl.store(to_g + of_tile, tl.sum(of_g, 0))
            x *= e
            if FIRST:
                x += through
            x = begun(x, fresh, step, FRESH)
        tl.debug_barrier()  # other threads have read what is overwritten
    tl.store(edge, x, mask=inside)
