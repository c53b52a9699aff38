"""What every Triton kernel of the selective scan does at a step: find the token, read or expand delta, apply softplus.

K steps are read before the first is used, as tuples of K vectors of channels, so that a warp has many loads in flight.
"""

# ruff: noqa: RUF005, SIM108 (Triton compiles neither starred tuples nor every conditional expression)

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus(x):
    """log(1 + e^x), relative error 2e-7 at every x: max(x, 0) + log1p(v), v = e^-|x|, where log1p(v) = 2 atanh(r), r = v / (v + 2) <= 1/3,
    and 2 atanh(r) / r a polynomial of r^2 (Chebyshev points, 4e-9). The GPU's own logarithm has an absolute error: useless for small steps."""
    v = tl.exp2(tl.abs(x) * -LOG2_E)
    r = v / (v + 2.0)
    q = r * r
    return tl.maximum(x, 0.0) + r * (2.0 + q * (0.66666317 + q * (0.40024853 + q * (0.27961418 + q * 0.28174657))))


@triton.jit
def sigmoid(x):
    v = tl.exp2(tl.abs(x) * -LOG2_E)
    return tl.where(x >= 0, 1.0, v) / (1.0 + v)


@triton.jit
def tile_of(program, channels, groups, TILE: tl.constexpr):
    """The group (of B and C), the channels (TILE,), and which of these exist. No tile has channels of two groups, so B_t and C_t are scalars to it.

    program: the tile's number among the tiles of all groups.
    """
    per_group = channels // groups
    tiles = tl.cdiv(per_group, TILE)
    group = program // tiles
    inside = (program % tiles) * TILE + tl.arange(0, TILE)
    return group, (group * per_group + inside).to(tl.int64), inside < per_group


@triton.jit
def places(index, keep, first, end, length, K: tl.constexpr, WALK: tl.constexpr, KEEP: tl.constexpr, REVERSE: tl.constexpr):
    """For K steps from `first`: the token, whether the step is before `end`, and what `decay` adds: -inf where the state begins anew, else 0.

    Steps have 32 bits. Tokens have 64, since offsets are computed from them.
    """
    tokens, live, fades = (), (), ()
    for k in tl.static_range(K):
        step = tl.minimum(first + k, end - 1)
        token = step
        if REVERSE:
            token = length - 1 - token
        if WALK:
            token = tl.load(index + token).to(tl.int32)
        tokens = tokens + (token.to(tl.int64),)
        live = live + (first + k < end,)
        if KEEP:
            fades = fades + (tl.where(first + k < end, tl.load(keep + step), 0.0),)
        else:
            fades = fades + (0.0,)
    return tokens, live, fades


@triton.jit
def visits(index, keep, first, length, K: tl.constexpr, WALK: tl.constexpr, KEEP: tl.constexpr, REVERSE: tl.constexpr):
    """As `places`, for K steps that all exist."""
    tokens, live, fades = (), (), ()
    for k in tl.static_range(K):
        token = first + k
        if REVERSE:
            token = length - 1 - token
        if WALK:
            token = tl.load(index + token).to(tl.int32)
        tokens = tokens + (token.to(tl.int64),)
        live = live + (True,)
        if KEEP:
            fades = fades + (tl.load(keep + first + k),)
        else:
            fades = fades + (0.0,)
    return tokens, live, fades


@triton.jit
def offsets(tokens, step, K: tl.constexpr, NEXT: tl.constexpr):
    """Of K tokens, each `step` numbers apart. NEXT: each token is the one before plus NEXT, and one product serves all; 0: they are anywhere."""
    step = tl.cast(step, tl.int64)
    at = ()
    for k in tl.static_range(K):
        if NEXT == 0:
            at = at + (tokens[k] * step,)
        else:
            at = at + (tokens[0] * step + k * NEXT * step,)
    return at


@triton.jit
def decay(s, a, fade, KEEP: tl.constexpr):
    """exp(s A), with a = A log2 e; 0 where the state begins anew."""
    if KEEP:
        return tl.exp2(s * a + fade)
    return tl.exp2(s * a)


@triton.jit
def rates(A, d, here, A_channel, A_state, N: tl.constexpr):
    """A log2 e: N vectors of channels."""
    a = ()
    for n in tl.static_range(N):
        a = a + (tl.load(A + d * A_channel + n * A_state, mask=here, other=0.0) * LOG2_E,)
    return a


@triton.jit
def vectors(values, here, step, N: tl.constexpr, PRESENT: tl.constexpr, like):
    """N vectors of channels, `step` apart; zeros where there are none."""
    v = ()
    for n in tl.static_range(N):
        if PRESENT:
            v = v + (tl.load(values + n * step, mask=here, other=0.0).to(tl.float32),)
        else:
            v = v + (tl.zeros_like(like),)
    return v


@triton.jit
def numbers(values, step, N: tl.constexpr, BYTES: tl.constexpr):
    """N numbers in float32, `step` apart, the same for all lanes. BYTES: how many one load reads, 4 or 8, where the step is 1; 0: a number a load."""
    bits: tl.constexpr = values.dtype.element_ty.primitive_bitwidth
    several: tl.constexpr = BYTES * 8 // bits
    v = ()
    if several > 1:
        word: tl.constexpr = tl.int64 if BYTES == 8 else tl.int32
        words = values.to(tl.pointer_type(word), bitcast=True)
        for w in tl.static_range(N // several):
            read = tl.load(words + w)
            for i in tl.static_range(several):
                part = read >> (i * bits)
                if bits == 32:
                    v = v + (part.to(tl.int32).to(tl.float32, bitcast=True),)
                elif values.dtype.element_ty == tl.bfloat16 and i % 2 == 1:  # the upper half of a register is a float32 once the lower one is zero
                    v = v + (((read >> (i - 1) * bits).to(tl.int32) & -65536).to(tl.float32, bitcast=True),)
                else:
                    v = v + (part.to(tl.int16).to(values.dtype.element_ty, bitcast=True).to(tl.float32),)
    else:
        for n in tl.static_range(N):
            v = v + (tl.load(values + n * step).to(tl.float32),)
    return v


@triton.jit
def rows(values, tokens, here, step, K: tl.constexpr, NEXT: tl.constexpr = 0):
    """K tokens' channels in float32. values: pointers to token 0's."""
    v = ()
    at = offsets(tokens, step, K, NEXT)
    for k in tl.static_range(K):
        v = v + (tl.load(values + at[k], mask=here, other=0.0).to(tl.float32),)
    return v


@triton.jit
def raw_steps(delta, proj, bias, tokens, d, here, channels, delta_token, delta_channel, K: tl.constexpr, RANK: tl.constexpr, NEXT: tl.constexpr = 0):
    """delta + bias of K tokens. delta: pointer to the first token. RANK > 0: delta is low-rank and proj (r,d) expands it, read once for K tokens."""
    s = ()
    at = offsets(tokens, delta_token, K, NEXT)
    if RANK == 0:
        for k in tl.static_range(K):
            s = s + (tl.load(delta + at[k] + d * delta_channel, mask=here, other=0.0).to(tl.float32) + bias,)
    else:
        for _ in tl.static_range(K):
            s = s + (bias,)
        for r in range(RANK):
            p = tl.load(proj + r * channels + d, mask=here, other=0.0)
            sums = ()
            for k in tl.static_range(K):
                sums = sums + (s[k] + tl.load(delta + at[k] + r * delta_channel).to(tl.float32) * p,)
            s = sums
    return s


@triton.jit
def positive(raw, live, K: tl.constexpr, SOFTPLUS: tl.constexpr):
    """s of K tokens; 0 past the end, where the state then stays as it is."""
    s = ()
    for k in tl.static_range(K):
        if SOFTPLUS:
            s = s + (tl.where(live[k], softplus(raw[k]), 0.0),)
        else:
            s = s + (tl.where(live[k], raw[k], 0.0),)
    return s


@triton.jit
def drives(s, u, live, K: tl.constexpr):
    """s u of K tokens; 0 past the end, whatever is read there."""
    v = ()
    for k in tl.static_range(K):
        v = v + (tl.where(live[k], s[k] * u[k], 0.0),)
    return v
