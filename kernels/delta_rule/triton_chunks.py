"""What the Triton kernels of the delta rule share: a chunk's decays, and the inverse that solves a chunk.

In a chunk with entry state S, a token adds u_t = beta_t w_t to its key's value, with w_t = v_t - recalled_t, and

    w_t + sum_{i<t} exp(G_t - G_i) (k_t k_i) beta_i w_i = v_t - exp(G_t) S^T k_t

G_t is the sum of log decays from the chunk's begin to t. This is a unit lower triangular system: one inverse per chunk solves it for every value
channel. Where the state begins anew, a log decay of -128 serves as a mask: its exponential is zero in float32, and sums of it stay finite.
"""

# ruff: noqa: RUF005 (Triton compiles no starred tuples)

from __future__ import annotations

import triton
import triton.language as tl

from medssm.kernels.triton_tiles import STRONGEST, pair_decays, product, split, tile


@triton.jit
def log_decays(g, fresh, token, step, live, g_token, GATED: tl.constexpr, FRESH: tl.constexpr):
    """(steps,): each step's log decay, STRONGEST where the state begins anew; 0 where not live. fresh (l,) by step: STRONGEST there, else 0."""
    logs = tl.zeros_like(step).to(tl.float32)
    if GATED:
        logs += tl.load(g + token * g_token, mask=live, other=0.0).to(tl.float32)
    if FRESH:
        logs += tl.load(fresh + step, mask=live, other=0.0)
    return tl.maximum(logs, STRONGEST)


@triton.jit
def edge_decays(logs, DECAYS: tl.constexpr):
    """The decay from the chunk's begin to each step, from each step to the chunk's end, and through the whole chunk."""
    if DECAYS:
        coarse, rest = split(logs)
        last = tl.arange(0, logs.shape[0]) == logs.shape[0] - 1
        total, rest_total = tl.sum(tl.where(last, coarse, 0.0), 0), tl.sum(tl.where(last, rest, 0.0), 0)
        return tl.exp(coarse + rest), tl.exp((total - coarse) + (rest_total - rest)), tl.exp(total + rest_total)
    one = tl.zeros_like(logs) + 1.0
    return one, one, tl.max(one, 0)


@triton.jit
def decays_between(logs, seen, DECAYS: tl.constexpr):
    """(steps, steps): the decay from the second's step to the first's; 0 where not seen."""
    if DECAYS:
        return pair_decays(logs, seen, TO_LATER=False)
    return tl.where(seen, 1.0, 0.0)


@triton.jit
def state_tiles(pointer, dk, dv, values, here, PARTS: tl.constexpr, BK: tl.constexpr):
    """PARTS tiles (BK, BV) of keys of a state (dk, dv)."""
    state = ()
    for part in tl.static_range(PARTS):
        keys = part * BK + tl.arange(0, BK)
        state = state + (tile(pointer, keys * dv, values, keys < dk, here),)
    return state


@triton.jit
def state_times(k, rows, live, state, pointer, dk, dv, values, here, CHUNK: tl.constexpr, PARTS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """k_t S, (CHUNK, BV), with the state in registers (`state`), or in memory (`pointer`) if PARTS is 0."""
    result = tl.zeros((CHUNK, BV), tl.float32)
    if PARTS > 0:
        for part in tl.static_range(PARTS):
            keys = part * BK + tl.arange(0, BK)
            result += product(tile(k, rows, keys, live, keys < dk), state[part])
    else:
        for first in range(0, dk, BK):
            keys = first + tl.arange(0, BK)
            result += product(tile(k, rows, keys, live, keys < dk), tile(pointer, keys * dv, values, keys < dk, here))
    return result


@triton.jit
def store(pointer, part, keys, dk, dv, values, here):
    """A tile of the keys of a state (dk, dv)."""
    tl.store(pointer + keys[:, None] * dv + values[None, :], part, mask=(keys < dk)[:, None] & here[None, :])


@triton.jit
def store_tiles(pointer, state, dk, dv, values, here, PARTS: tl.constexpr, BK: tl.constexpr):
    """The tiles of `state_tiles`."""
    for part in tl.static_range(PARTS):
        store(pointer, state[part], part * BK + tl.arange(0, BK), dk, dv, values, here)


@triton.jit
def unit_inverse(a, CHUNK: tl.constexpr):
    """(I + a)^-1 of a strictly lower triangular (CHUNK, CHUNK) matrix by forward substitution, a row at a time.

    A series would cancel: powers of a grow without bound where keys are alike.
    """
    rows, cols = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    x = tl.where(rows == cols, 1.0, 0.0)
    for r in range(1, CHUNK):
        factors = tl.sum(tl.where(rows == r, a, 0.0), 0)
        known = tl.sum(factors[:, None] * x, 0)
        x = tl.where(rows == r, x - known[None, :], x)
    return x
