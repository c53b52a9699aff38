"""Matrix-state recurrences on a GPU, in Triton: allocates and launches, for every op that is one of them.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T,    o_t = scale q_t S_t

The walk is cut in chunks of CHUNK tokens. What each adds to the state is a matrix product (`chunk_states`), the state at every edge a recurrence over
the chunks (`carry_over`), and the outputs two more products from the state that enters (`read`): chunks in parallel, and for the recurrence spans of
chunks where the states alone are too few programs. Backward works out the states anew, carries their gradient from the last chunk to the first, and
has a chunk's gradients by the same products. Nothing is added atomically: where heads share q, k or v, each head's gradient is written in float32
and PyTorch adds them in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from medssm.kernels.matrix_state.triton_carry import carry_over
from medssm.kernels.matrix_state.triton_gradients import decay_gradients, key_gradients
from medssm.kernels.matrix_state.triton_outputs import read
from medssm.kernels.matrix_state.triton_pairs import key_pairs, pair_gradients
from medssm.kernels.matrix_state.triton_states import chunk_states
from medssm.kernels.triton import INTERPRETED, on, present

CHUNK = 64  # tokens: as many as a chunk's products need to keep the states' traffic below the tokens'
BLOCK = 16  # tokens whose pairs are worked out one by one where the decay is per key
OUT, DV, DQ, DK = range(4)  # what `read` works out
BY_NOTHING, BY_STEPS, BY_GATE = range(3)  # what it multiplies a tile by
KEY = 2  # a decay per key
WIDEST = 256 if INTERPRETED else 32  # of a tile of keys or values
KEYS = 64 if INTERPRETED else 16  # of a tile of keys in a block's pairs: BLOCK x BLOCK x KEYS numbers are held
WARPS = 8  # of a program


class Scan(NamedTuple):
    """One recurrence, and what is fused with it: the last dimension of every tensor is dense."""

    q: torch.Tensor  # (b,l,h or fewer,dk)
    k: torch.Tensor  # (b,l,h or fewer,dk)
    v: torch.Tensor  # (b,l,h or fewer,dv)
    g: torch.Tensor | None  # (b,l,h) or (b,l,h,dk), log decay
    scale: float
    heads: int
    index: torch.Tensor | None
    segment: torch.Tensor | None  # (l,) int32: how often the state has begun anew, up to each step
    reverse: bool
    steps: torch.Tensor | None = None  # (b,l,h) float32, dense: v is multiplied by it
    skip: torch.Tensor | None = None  # (h,dv) float32, dense: skip v is added to the output
    z: torch.Tensor | None = None  # (b,l,h,dv): the output is multiplied by silu(z)


class Gradients(NamedTuple):
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    dg: torch.Tensor | None  # float32 where fused with steps, else g's dtype
    dsteps: torch.Tensor | None  # (b,l,h) float32
    dz: torch.Tensor | None
    dinitial: torch.Tensor  # (b,h,dk,dv) float32


def scan_of(q, k, v, g, scale, heads, index, starts, reverse, steps=None, skip=None, z=None) -> Scan:
    q, k, v, z = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, z))
    if g is not None and g.dim() == 4 and g.stride(-1) != 1:
        g = g.contiguous()
    return Scan(q, k, v, g, float(scale), heads, index, segments(starts, q.shape[1], reverse), reverse, steps, skip, z)


def segments(starts, length, reverse):
    """(l,) int32: how often the state has begun anew up to each step; step 0 does not count, the initial state precedes it."""
    if starts is None or not length:
        return None
    fresh = length - starts if reverse else starts
    begun = torch.zeros(length + 1, dtype=torch.int32, device=starts.device).index_fill_(0, fresh, 1)
    begun[0] = 0
    return begun[:length].cumsum(0, dtype=torch.int32)


def forward(scan: Scan, initial, save=False):
    """initial (b,h,dk,dv) or None; save: keep the output as it is before the gate.

    Returns (out (b,l,h,dv) in v's dtype, the final state (b,h,dk,dv), float32, and what is kept, float32, or None).
    """
    out = torch.empty(_per_head(scan, scan.v), dtype=scan.v.dtype, device=scan.v.device)
    before_gate = _floats(out, *out.shape) if save else None
    batch, _, _, dk = scan.q.shape
    if not out.numel():
        state = _floats(out, batch, scan.heads, dk, scan.v.shape[3])
        return out, state.zero_() if initial is None else state.copy_(initial), before_gate
    with on(scan.q):
        states, _ = _states(scan, initial)
        _read(OUT, scan, states, out, pairs=_pairs(scan), side=before_gate)
    return out, _edge(states, scan, -1).clone(), before_gate


def backward(dout, dfinal, scan: Scan, initial, before_gate=None) -> Gradients:
    """dfinal: gradient of the final state, or None; before_gate: what forward kept, where there is z."""
    q, k, v, g, heads = scan.q, scan.k, scan.v, scan.g, scan.heads
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    batch, length, rows, dk, dv, chunks = _sizes(scan)
    dq, dkeys, dvalues = (_new(scan, t) for t in (q, k, v))
    dg = None if g is None else torch.empty(g.shape, dtype=torch.float32 if scan.steps is not None else g.dtype, device=g.device)
    dz = None if scan.z is None else torch.empty(scan.z.shape, dtype=scan.z.dtype, device=q.device)
    if not dvalues.numel():
        return _nothing(scan, dfinal, dz)
    with on(q):
        states, decays = _states(scan, initial)
        dstates = _floats(q, rows, chunks + 1, dk, dv)
        last = dstates.view(batch, heads, chunks + 1, dk, dv)[:, :, -1]
        last.zero_() if dfinal is None else last.copy_(dfinal)
        _chunk_states(scan, dstates, decays, q, dout, backward=True)
        carry_over(dstates, decays, backward=True)

        dsteps = None if scan.steps is None else _floats(q, triton.cdiv(dv, _value_tile(scan)), batch, length, heads)
        _read(DV, scan, dstates[:, 1:], dvalues, dout, pairs=_pairs(scan), side=dsteps, kept=before_gate, dz=dz)
        if _decay(scan) == KEY:
            _key_gradients(scan, dout, states, dstates, dq, dkeys, dg)
        else:
            tiles = triton.cdiv(dk, _key_tile(scan))
            change = None if g is None else _floats(q, 2 * tiles, rows, chunks, CHUNK)
            _read(DQ, scan, states, dq, dout, side=change)
            _read(DK, scan, dstates[:, 1:], dkeys, dout, side=change)
            if g is not None:
                _decay_gradients(scan, states, dstates, change, dg, rows * chunks)
    dq, dkeys, dvalues = (_shared(d, t, heads) for d, t in ((dq, q), (dkeys, k), (dvalues, v)))
    return Gradients(dq, dkeys, dvalues, dg, None if dsteps is None else dsteps.sum(0), dz, _edge(dstates, scan, 0))


def _nothing(scan, dfinal, dz):
    """The gradients where there is no output: the empty walk's final state is its initial one."""
    batch, _, _, dk, dv, _ = _sizes(scan)
    zeros = [None if t is None else torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (scan.q, scan.k, scan.v, scan.g)]
    dinitial = _floats(scan.q, batch, scan.heads, dk, dv)
    dinitial.zero_() if dfinal is None else dinitial.copy_(dfinal)
    return Gradients(*zeros, None if scan.steps is None else torch.zeros_like(scan.steps), dz, dinitial)


def _key_gradients(scan, dout, states, dstates, dq, dk_out, dg):
    _, length, rows, dk, dv, chunks = _sizes(scan)
    q, k, v, g = scan.q, scan.k, scan.v, scan.g
    common = _options(scan)
    bk, bv = min(_tile(dk), KEYS), _tile(dv)
    q_repeat, k_repeat, v_repeat = _repeats(scan)
    walk = (*present(q, scan.index, scan.segment),)
    dpairs = _floats(q, rows, chunks, CHUNK, CHUNK)
    pair_gradients[rows * chunks,](
        dout, v, *walk, dpairs, scan.scale, length, scan.heads, v_repeat, dv, chunks, *_three(dout), *_three(v), BV=bv, **common
    )
    change = _floats(q, rows, chunks, CHUNK, dk)
    key_gradients[rows * chunks * triton.cdiv(dk, bk) * (CHUNK // BLOCK),](
        dout,
        q,
        k,
        v,
        g,
        dpairs,
        states,
        dstates,
        *walk,
        dq,
        dk_out,
        change,
        scan.scale,
        length,
        scan.heads,
        q_repeat,
        k_repeat,
        v_repeat,
        dk,
        dv,
        chunks,
        *_three(dout),
        *_three(q),
        *_three(k),
        *_three(v),
        *_three(g),
        BLOCK=BLOCK,
        BK=bk,
        BV=bv,
        **common,
    )
    _decay_gradients(scan, states, dstates, change, dg, rows * chunks * triton.cdiv(dk, _tile(dk)))


def _decay_gradients(scan, states, dstates, change, dg, programs):
    _, length, _, dk, dv, chunks = _sizes(scan)
    decay_gradients[programs,](
        states,
        dstates,
        change,
        *present(change, scan.index, scan.segment),
        dg,
        length,
        scan.heads,
        dk,
        dv,
        chunks,
        change.shape[0],
        DECAY=_decay(scan),
        BK=_tile(dk),
        BV=_tile(dv),
        **_options(scan),
    )


def _states(scan, initial):
    """(states (b*h, chunks + 1, dk, dv), decays (b*h, chunks[, dk])) at every edge."""
    batch, _, rows, dk, dv, chunks = _sizes(scan)
    states = _floats(scan.q, rows, chunks + 1, dk, dv)
    first = states.view(batch, scan.heads, chunks + 1, dk, dv)[:, :, 0]
    first.zero_() if initial is None else first.copy_(initial)
    decays = _floats(scan.q, rows, chunks, *((dk,) if _decay(scan) == KEY else ()))
    _chunk_states(scan, states, decays, scan.k, scan.v)
    carry_over(states, decays)
    return states, decays


def _chunk_states(scan, states, decays, a, c, backward=False):
    _, length, rows, dk, dv, chunks = _sizes(scan)
    bk, bv = _tile(dk), _tile(dv)
    by = [BY_NOTHING if scan.steps is None else BY_STEPS, BY_NOTHING if scan.z is None else BY_GATE][backward]
    chunk_states[rows * chunks * triton.cdiv(dk, bk) * triton.cdiv(dv, bv),](
        a,
        c,
        *present(a, scan.g, scan.steps, scan.z, scan.index, scan.segment),
        states,
        decays,
        scan.scale,
        length,
        scan.heads,
        scan.heads // a.shape[2],
        scan.heads // c.shape[2],
        dk,
        dv,
        chunks,
        *_three(a),
        *_three(c),
        *_three(scan.g),
        *_three(scan.z),
        BACKWARD=backward,
        DECAY=_decay(scan),
        V_BY=by,
        BK=bk,
        BV=bv,
        **_options(scan),
    )


def _pairs(scan):
    """q_t k_i with their decays per key, None where the decay is not."""
    if _decay(scan) != KEY:
        return None
    _, length, rows, dk, _, chunks = _sizes(scan)
    q, k, g = scan.q, scan.k, scan.g
    pairs = _floats(q, rows, chunks, CHUNK, CHUNK)
    q_repeat, k_repeat, _ = _repeats(scan)
    key_pairs[rows * chunks * (CHUNK // BLOCK),](
        q,
        k,
        g,
        *present(q, scan.index, scan.segment),
        pairs,
        length,
        scan.heads,
        q_repeat,
        k_repeat,
        dk,
        chunks,
        *_three(q),
        *_three(k),
        *_three(g),
        BLOCK=BLOCK,
        BK=min(_tile(dk), KEYS),
        **_options(scan),
    )
    return pairs


def _read(of, scan, states, out, dout=None, pairs=None, side=None, kept=None, dz=None):
    tensors = {"q": scan.q, "k": scan.k, "v": scan.v, "do": dout}
    roles = {OUT: ("q", "k", "v", "v"), DV: ("k", "q", "do", "v"), DQ: ("do", "v", "k", "q"), DK: ("v", "do", "q", "k")}[of]
    x, y, c, own = (tensors[role] for role in roles)
    by = {"v": BY_NOTHING if scan.steps is None else BY_STEPS, "do": BY_NOTHING if scan.z is None else BY_GATE}
    x_by, y_by, c_by, _ = (by.get(role, BY_NOTHING) for role in roles)
    dv, chunks = scan.v.shape[3], triton.cdiv(scan.q.shape[1], CHUNK)
    width, out_width = x.shape[3], c.shape[3]
    bm, bn = min(_tile(width), KEYS if _wide(scan) else WIDEST), _value_tile(scan) if of in (OUT, DV) else _key_tile(scan)
    read[out.shape[0] * scan.heads * chunks * triton.cdiv(out_width, bn),](
        x,
        y,
        c,
        own,
        *present(x, scan.g, pairs),
        states,
        *present(x, scan.steps, scan.skip, scan.z, kept, scan.index, scan.segment),
        out,
        *present(out, side, dz),
        scan.scale,
        out.shape[1],
        scan.heads,
        *(scan.heads // t.shape[2] for t in (x, y, c, own)),
        width,
        out_width,
        chunks,
        *((dv, 1) if of in (OUT, DV) else (1, dv)),
        *_three(x),
        *_three(y),
        *_three(c),
        *_three(own),
        *_three(scan.g),
        *_three(scan.z),
        OF=of,
        DECAY=_decay(scan),
        X_BY=x_by,
        Y_BY=y_by,
        C_BY=c_by,
        STEPS=scan.steps is not None,
        SKIP=scan.skip is not None and of in (OUT, DV),
        GATE=scan.z is not None,
        SAVE=side is not None,
        BM=bm,
        BN=bn,
        **_options(scan),
    )


def _sizes(scan):
    """batch, length, batch x heads, dk, dv, chunks."""
    batch, length, _, dk = scan.q.shape
    return batch, length, batch * scan.heads, dk, scan.v.shape[3], triton.cdiv(length, CHUNK)


def _options(scan):
    return {
        "WALK": scan.index is not None,
        "STARTS": scan.segment is not None,
        "REVERSE": scan.reverse,
        "CHUNK": CHUNK,
        "num_warps": WARPS,
        "maxnreg": 255,
    }  # else the assembler may spill a few registers so that more programs run at a time


def _decay(scan) -> int:
    return 0 if scan.g is None else scan.g.dim() - 2


def _repeats(scan):
    """Heads that share one of q's, of k's, of v's."""
    return (scan.heads // t.shape[2] for t in (scan.q, scan.k, scan.v))


def _tile(width):
    return min(max(triton.next_power_of_2(width), 16), WIDEST)


def _key_tile(scan):
    """Of the gradients of q and k: with the gate's factors, or in float32, there are registers for fewer keys."""
    return min(_tile(scan.q.shape[3]), KEYS if scan.z is not None or _wide(scan) else WIDEST)


def _value_tile(scan):
    """Of the outputs and the gradients of v."""
    return min(_tile(scan.v.shape[3]), KEYS if scan.z is not None and _wide(scan) else WIDEST)


def _wide(scan):
    """Whether `read` holds pairs of tokens and operands of float32, which sm_80 has no registers for in wide tiles."""
    return _decay(scan) != KEY and any(t.dtype == torch.float32 for t in (scan.q, scan.k, scan.v))


def _three(t):
    """Strides of batch, token and head."""
    return (0, 0, 0) if t is None else t.stride()[:3]


def _floats(like, *shape):
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _per_head(scan, t):
    return (*t.shape[:2], scan.heads, t.shape[3])


def _new(scan, t):
    """A gradient for t, of every head; in float32 where heads share t."""
    return torch.empty(_per_head(scan, t), dtype=t.dtype if t.shape[2] == scan.heads else torch.float32, device=t.device)


def _shared(gradient, t, heads):
    """The sum over the heads that share t."""
    groups = t.shape[2]
    if groups == heads:
        return gradient
    return gradient.unflatten(2, (groups, heads // groups)).sum(3).to(t.dtype)


def _edge(states, scan, at):
    """The state at the first or last edge, (b,h,dk,dv)."""
    return states.unflatten(0, (-1, scan.heads))[:, :, at]
