"""Linear attention over all tokens on a GPU: the kernels. `triton.py` launches them.

The backward pass repeats the forward's two passes with other tensors. With f_t = scale / (q'_t z + eps), M = kv, and dM, dz the sums' gradients:

    dM = sum_t (R q'_t) (f_t dout_t)^T,    dz = sum_t w_t q'_t,    w_t = -f_t (R q'_t) M dout_t / (q'_t z + eps)
    dq'_t = R^T M f_t dout_t + w_t z,    dk'_s = R^T dM v_s + dz,    dv_s = (R k'_s) dM

So `sums` reads k and v, and in backward q and dout; `outputs` gives o, and in backward dv; `inputs` gives dq, then dk; `factors` gives f and w.
"""

# ruff: noqa: SIM108 (Triton does not compile every conditional expression)

from __future__ import annotations

import triton
import triton.language as tl

from medssm.kernels.triton_tiles import product, tile


@triton.jit
def feature(x, inner, MAP: tl.constexpr):
    """elu(x) + 1 (MAP 2), relu(x) (1) or x (0); 0 outside."""
    if MAP == 2:
        x = tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    if MAP == 1:
        x = tl.maximum(x, 0.0)
    return tl.where(inner, x, 0.0)


@triton.jit
def rotated(x, cos, sin, tokens, keys, live, here, cos_token, sin_token, BACK: tl.constexpr, ROTARY: tl.constexpr):
    """The pairs (2i, 2i+1) of x (tokens, keys) rotated by their angle; BACK: by its negative."""
    if ROTARY:
        even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        if BACK:
            other = tl.join(odd, -even)
        else:
            other = tl.join(-odd, even)
        cosine, sine = tile(cos, tokens * cos_token, keys, live, here), tile(sin, tokens * sin_token, keys, live, here)
        x = x * cosine + tl.reshape(other, (x.shape[0], x.shape[1])) * sine
    return x


@triton.jit
def sums(
    x,
    v,
    cos,
    sin,
    factor,
    weight,
    to_kv,
    to_z,
    scale,
    constant,
    length,
    heads,
    groups,
    dk,
    dv,
    segments,
    steps,
    x_batch,
    x_token,
    x_head,
    v_batch,
    v_token,
    v_head,
    cos_token,
    cos_group,
    sin_token,
    sin_group,
    MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    FACTORS: tl.constexpr,
    T: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """For each segment of tokens: to_kv (b*h, segments, dk, dv) = sum (R x') (f v)^T and to_z (b*h, segments, dk) = sum w x'.

    f and w are scale and constant; with FACTORS they are factor and weight (b*h, l).
    """
    tiles_k, tiles_v = tl.cdiv(dk, BK), tl.cdiv(dv, BV)
    program = tl.program_id(0)
    tile_v, tile_k, program = program % tiles_v, program // tiles_v % tiles_k, program // tiles_v // tiles_k
    segment, row = (program % segments).to(tl.int64), (program // segments).to(tl.int64)
    b, h = row // heads, row % heads
    keys, values = tile_k * BK + tl.arange(0, BK), tile_v * BV + tl.arange(0, BV)
    here_k, here_v = keys < dk, values < dv
    x += b * x_batch + h * x_head
    v += b * v_batch + h * v_head
    cos += h // (heads // groups) * cos_group
    sin += h // (heads // groups) * sin_group
    kv, z = tl.zeros((BK, BV), tl.float32), tl.zeros((BK,), tl.float32)
    for first in range(segment * steps, tl.minimum((segment + 1) * steps, length), T):
        tokens = first + tl.arange(0, T).to(tl.int64)
        live = tokens < length
        mapped = feature(tile(x, tokens * x_token, keys, live, here_k), live[:, None] & here_k[None, :], MAP)
        v_t = tile(v, tokens * v_token, values, live, here_v)
        if FACTORS:
            v_t *= tl.load(factor + row * length + tokens, mask=live, other=0.0)[:, None]
            z += tl.sum(mapped * tl.load(weight + row * length + tokens, mask=live, other=0.0)[:, None], 0)
        else:
            v_t *= scale
            z += tl.sum(mapped, 0) * constant
        kv += product(tl.trans(rotated(mapped, cos, sin, tokens, keys, live, here_k, cos_token, sin_token, False, ROTARY)), v_t)
    at = row * segments + segment
    tl.store(to_kv + at * dk * dv + keys[:, None] * dv + values[None, :], kv, mask=here_k[:, None] & here_v[None, :])
    if tile_v == 0:
        tl.store(to_z + at * dk + keys, z, mask=here_k)


@triton.jit
def outputs(
    x,
    kv,
    z,
    cos,
    sin,
    out,
    scale,
    eps,
    length,
    heads,
    groups,
    dk,
    dv,
    x_batch,
    x_token,
    x_head,
    cos_token,
    cos_group,
    sin_token,
    sin_group,
    MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    T: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """out (b,l,h,dv) = scale (R x') kv, with NORMALIZE over x' z + eps."""
    tiles, tiles_v = tl.cdiv(length, T), tl.cdiv(dv, BV)
    program = tl.program_id(0)
    row = (program // tiles_v // tiles).to(tl.int64)
    b, h = row // heads, row % heads
    group = h // (heads // groups)
    tokens = (program // tiles_v % tiles).to(tl.int64) * T + tl.arange(0, T)
    values = program % tiles_v * BV + tl.arange(0, BV)
    live, here_v = tokens < length, values < dv
    x += b * x_batch + h * x_head
    cos += group * cos_group
    sin += group * sin_group
    kv += (b * groups + group) * dk * dv
    z += (b * groups + group) * dk
    upper, below = tl.zeros((T, BV), tl.float32), tl.zeros((T,), tl.float32)
    for first in range(0, dk, BK):
        keys = first + tl.arange(0, BK)
        here_k = keys < dk
        mapped = feature(tile(x, tokens * x_token, keys, live, here_k), live[:, None] & here_k[None, :], MAP)
        if NORMALIZE:
            below += tl.sum(mapped * tl.load(z + keys, mask=here_k, other=0.0)[None, :], 1)
        turned = rotated(mapped, cos, sin, tokens, keys, live, here_k, cos_token, sin_token, False, ROTARY)
        upper += product(turned, tile(kv, keys * dv, values, here_k, here_v))
    upper *= scale
    if NORMALIZE:
        upper = upper / (below + eps)[:, None]
    at = ((b * length + tokens) * heads + h)[:, None] * dv + values[None, :]
    tl.store(out + at, upper.to(out.dtype.element_ty), mask=live[:, None] & here_v[None, :])


@triton.jit
def factors(
    x,
    y,
    kv,
    z,
    cos,
    sin,
    factor,
    weight,
    scale,
    eps,
    length,
    heads,
    groups,
    dk,
    dv,
    x_batch,
    x_token,
    x_head,
    y_batch,
    y_token,
    y_head,
    cos_token,
    cos_group,
    sin_token,
    sin_group,
    MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    T: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """factor and weight (b*h, l): f and w of q = x and dout = y."""
    tiles = tl.cdiv(length, T)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = row // heads, row % heads
    group = h // (heads // groups)
    tokens = (tl.program_id(0) % tiles).to(tl.int64) * T + tl.arange(0, T)
    live = tokens < length
    x += b * x_batch + h * x_head
    y += b * y_batch + h * y_head
    cos += group * cos_group
    sin += group * sin_group
    kv += (b * groups + group) * dk * dv
    z += (b * groups + group) * dk
    below, above = tl.zeros((T,), tl.float32), tl.zeros((T,), tl.float32)
    for first_key in range(0, dk, BK):
        keys = first_key + tl.arange(0, BK)
        here_k = keys < dk
        back = tl.zeros((T, BK), tl.float32)
        for first in range(0, dv, BV):
            values = first + tl.arange(0, BV)
            here_v = values < dv
            back += product(tile(y, tokens * y_token, values, live, here_v), tl.trans(tile(kv, keys * dv, values, here_k, here_v)))
        mapped = feature(tile(x, tokens * x_token, keys, live, here_k), live[:, None] & here_k[None, :], MAP)
        below += tl.sum(mapped * tl.load(z + keys, mask=here_k, other=0.0)[None, :], 1)
        above += tl.sum(back * rotated(mapped, cos, sin, tokens, keys, live, here_k, cos_token, sin_token, False, ROTARY), 1)
    f = scale / (below + eps)
    tl.store(factor + row * length + tokens, f, mask=live)
    tl.store(weight + row * length + tokens, -f * above / (below + eps), mask=live)


@triton.jit
def inputs(
    x,
    y,
    kv,
    z,
    cos,
    sin,
    factor,
    weight,
    to_x,
    scale,
    constant,
    length,
    heads,
    groups,
    dk,
    dv,
    x_batch,
    x_token,
    x_head,
    y_batch,
    y_token,
    y_head,
    cos_token,
    cos_group,
    sin_token,
    sin_group,
    MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    FACTORS: tl.constexpr,
    T: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """to_x (b,l,h,dk): the gradient of x, whose feature's is R^T kv f y + w z, f and w as in `sums`."""
    tiles, tiles_k = tl.cdiv(length, T), tl.cdiv(dk, BK)
    program = tl.program_id(0)
    row = (program // tiles_k // tiles).to(tl.int64)
    b, h = row // heads, row % heads
    group = h // (heads // groups)
    tokens = (program // tiles_k % tiles).to(tl.int64) * T + tl.arange(0, T)
    keys = program % tiles_k * BK + tl.arange(0, BK)
    live, here_k = tokens < length, keys < dk
    y += b * y_batch + h * y_head
    kv += (b * groups + group) * dk * dv
    back = tl.zeros((T, BK), tl.float32)
    for first in range(0, dv, BV):
        values = first + tl.arange(0, BV)
        here_v = values < dv
        back += product(tile(y, tokens * y_token, values, live, here_v), tl.trans(tile(kv, keys * dv, values, here_k, here_v)))
    back = rotated(back, cos + group * cos_group, sin + group * sin_group, tokens, keys, live, here_k, cos_token, sin_token, True, ROTARY)
    total = tl.load(z + (b * groups + group) * dk + keys, mask=here_k, other=0.0)[None, :]
    if FACTORS:
        back *= tl.load(factor + row * length + tokens, mask=live, other=0.0)[:, None]
        back += tl.load(weight + row * length + tokens, mask=live, other=0.0)[:, None] * total
    else:
        back = back * scale + constant * total
    x_t = tile(x + b * x_batch + h * x_head, tokens * x_token, keys, live, here_k)
    if MAP == 2:
        back *= tl.where(x_t > 0, 1.0, tl.exp(tl.minimum(x_t, 0.0)))
    if MAP == 1:
        back = tl.where(x_t > 0, back, 0.0)
    at = ((b * length + tokens) * heads + h)[:, None] * dk + keys[None, :]
    tl.store(to_x + at, back.to(to_x.dtype.element_ty), mask=live[:, None] & here_k[None, :])
