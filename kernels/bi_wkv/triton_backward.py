"""The kernels of bi_wkv's backward pass after `outputs`. `triton.py` launches them.

With o_t = (sum_i W_ti v_i) / D_t, x_t = do_t / D_t and y_t = x_t o_t,

    dv_i = sum_t W_ti x_t,    dk_i = sum_t W_ti (x_t v_i - y_t)

are sums over the outputs. They have the form of the forward pass's sums over the tokens, with x and y in place of v and 1, and minus the shift of an
output's denominator in place of a key.
"""

# ruff: noqa: RUF005 (Triton compiles no starred tuples)

from __future__ import annotations

import triton
import triton.language as tl

from medssm.kernels.bi_wkv.triton_steps import add, empty, exp, further, lanes, later, load_sum, places, program, rows, seen, store_sum, taken


@triton.jit
def _share(s, key, v, dk, dv):
    """Adds one sum over outputs to dk and dv."""
    scale = exp(key + s[0])
    return dk + scale * (s[1] * v - s[2]), dv + scale * s[1]


@triton.jit
def tokens_adjoint(
    k,
    v,
    w,
    u,
    top,
    index,
    begins,
    entry,
    kept,
    dk,
    dv,
    length,
    channels,
    chunks,
    k_batch,
    k_token,
    k_channel,
    v_batch,
    v_token,
    v_channel,
    entry_direction,
    entry_field,
    kept_batch,
    kept_field,
    top_field,
    K: tl.constexpr,
    TILE: tl.constexpr,
    UPSTREAM: tl.constexpr,
    ENTRY: tl.constexpr,
    WALK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """dk, dv (b,l,d) from the outputs' top (3,b,l,d) and entry (2 directions, fields, b, chunks, d), the sums over the outputs before each chunk and
    after it.
    """
    b, chunk, begin, end, d, here = program(begins, channels, chunks, TILE)
    rate, bonus = tl.load(w + d, mask=here, other=0.0), tl.load(u + d, mask=here, other=0.0)
    top_field = tl.cast(top_field, tl.int64)
    k += b * k_batch + d * k_channel
    v += b * v_batch + d * v_channel
    dk += b * length * channels + d
    dv += b * length * channels + d
    top += b * length * channels + d
    kept += b * kept_batch + (begin // K + chunk) * channels + d
    past, future = empty(rate), empty(rate)
    if ENTRY:
        at = entry + (b * chunks + chunk) * channels + d
        past, future = load_sum(at, entry_field, here, False), load_sum(at + entry_direction, entry_field, here, False)
    groups = tl.cdiv(end - begin, K)
    for i in range(groups):
        first = begin + i * K
        store_sum(kept + i * channels, kept_field, here, past, False)
        steps, live = places(index, first, end, length, K, False, False)
        keys, x, y = (
            rows(top, steps, live, here, channels, K),
            rows(top + top_field, steps, live, here, channels, K),
            rows(top + 2 * top_field, steps, live, here, channels, K),
        )
        for j in tl.static_range(K):
            past = add(past, rate, live[j], keys[j], x[j], y[j], False)

    before, left = future, empty(rate)  # as in `outputs`, from the end
    if UPSTREAM:
        future = empty(rate)
    for i in range(groups):
        first = begin + (groups - 1 - i) * K
        tokens, live = places(index, first, end, length, K, WALK, REVERSE)
        steps, _ = places(index, first, end, length, K, False, False)
        keys, values = rows(k, tokens, live, here, k_token, K), rows(v, tokens, live, here, v_token, K)
        tops, x, y = (
            rows(top, steps, live, here, channels, K),
            rows(top + top_field, steps, live, here, channels, K),
            rows(top + 2 * top_field, steps, live, here, channels, K),
        )
        past = load_sum(kept + (groups - 1 - i) * channels, kept_field, here, False)
        shares = ()
        for j in tl.static_range(K):
            own = exp(bonus + keys[j] + tops[j])
            behind = seen(past, rate)
            if UPSTREAM:
                behind = further(behind, rate)
            shares = shares + (_share(behind, keys[j], values[j], own * (x[j] * values[j] - y[j]), own * x[j]),)
            past = add(past, rate, live[j], tops[j], x[j], y[j], False)
        results = ()
        for n in tl.static_range(K):
            g_k, g_v = _share(seen(future, rate), keys[K - 1 - n], values[K - 1 - n], shares[K - 1 - n][0], shares[K - 1 - n][1])
            if UPSTREAM:
                left = add(left, -rate, live[K - 1 - n], tops[K - 1 - n], x[K - 1 - n], y[K - 1 - n], False)
                r = taken(left, rate, False)
                takes = tl.where(first + (K - 1 - n) == begin, 0.0, 1.0)  # 0 for a chunk's first token
                g_k, g_v = _share((r[0], takes * r[1], takes * r[2]), keys[K - 1 - n], values[K - 1 - n], g_k, g_v)
                far = later(before, (end - first - (K - n)).to(tl.float32))
                g_k, g_v = _share(further(seen(far, rate), rate), keys[K - 1 - n], values[K - 1 - n], g_k, g_v)
            future = add(future, rate, live[K - 1 - n], tops[K - 1 - n], x[K - 1 - n], y[K - 1 - n], False)
            results = results + ((g_k, g_v),)
        for n in tl.static_range(K):
            there = lanes(here, live[K - 1 - n])
            tl.store(dk + tokens[K - 1 - n] * channels, results[n][0].to(dk.dtype.element_ty), mask=there)
            tl.store(dv + tokens[K - 1 - n] * channels, results[n][1].to(dv.dtype.element_ty), mask=there)
