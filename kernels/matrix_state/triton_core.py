"""Matrix-state recurrences on a GPU, in Triton: allocates and launches, for every op that is one of them.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T,    o_t = scale q_t S_t

The walk is cut into chunks of CHUNK tokens:

    1. `chunk_states`  what each chunk adds to the state, a matrix product; all chunks in parallel
    2. `carry_over`    the state at every edge of a chunk, a recurrence over the chunks
    3. `outputs`       the outputs, two more products from the state that enters a chunk; all chunks in parallel

Backward computes the states again, carries their gradient from the last chunk to the first, and gets a chunk's gradients by the same kinds of
products. Nothing is added atomically: where heads share q, k or v, each head's gradient is written in float32 and PyTorch adds them in a fixed order.

Packed sequences have chunks of their own, and all their chunks are computed at once; b is then 1, and states have a row for each sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from medssm.kernels.matrix_state.triton_carry import carry_over
from medssm.kernels.matrix_state.triton_gradients import decay_gradients, query_key_gradients
from medssm.kernels.matrix_state.triton_outputs import outputs
from medssm.kernels.matrix_state.triton_pairs import key_pairs, pair_gradients
from medssm.kernels.matrix_state.triton_states import chunk_states
from medssm.kernels.matrix_state.triton_token_gradients import key_gradients, query_gradients, value_gradients
from medssm.kernels.pieces import Pieces, cut
from medssm.kernels.triton import INTERPRETED, on, pointers, strided
from medssm.kernels.walks import Sequences, at_starts

CHUNK = 64  # tokens: as many as a chunk's products need to keep the states' traffic below the tokens'
BLOCK = 16  # tokens whose pairs are computed one by one where the decay is per key
TOKENS = ("batch", "token", "head")  # the names of strides
KEY = 2  # a decay per key
WIDEST = 256 if INTERPRETED else 32  # of a tile of keys or values
KEYS = 64 if INTERPRETED else 16  # of a tile of keys in a block's pairs: BLOCK x BLOCK x KEYS numbers are in registers
WARPS = 8  # of a program


class Scan(NamedTuple):
    """One recurrence, and what is fused with it. The last dimension of every tensor is dense."""

    q: torch.Tensor  # (b,l,h or fewer,dk)
    k: torch.Tensor  # (b,l,h or fewer,dk)
    v: torch.Tensor  # (b,l,h or fewer,dv)
    g: torch.Tensor | None  # (b,l,h) or (b,l,h,dk), log decay
    scale: float
    heads: int
    index: torch.Tensor | None  # type: ignore[assignment]  # it hides tuple.index, which nobody calls here
    segment: torch.Tensor | None  # (l,) int32: how often the state has begun anew, up to each step
    pieces: Pieces | None  # of packed sequences
    states: int  # b, or the number of packed sequences
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


def scan_of(
    q: torch.Tensor,  # (b,l,h or fewer,dk)
    k: torch.Tensor,  # (b,l,h or fewer,dk)
    v: torch.Tensor,  # (b,l,h or fewer,dv)
    g: torch.Tensor | None,  # (b,l,h) or (b,l,h,dk)
    scale: float,
    heads: int,
    index: torch.Tensor | None,  # (l,)
    starts: torch.Tensor | None,  # (segments,)
    reverse: bool,
    sequences: Sequences | None = None,
    steps: torch.Tensor | None = None,  # (b,l,h)
    skip: torch.Tensor | None = None,  # (h,dv)
    z: torch.Tensor | None = None,  # (b,l,h,dv)
) -> Scan:
    """The recurrence as the kernels read it: `Scan`'s fields, of tensors with any strides, and starts as the ops have them."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    z = z if z is None or z.stride(-1) == 1 else z.contiguous()
    if g is not None and g.dim() == 4 and g.stride(-1) != 1:
        g = g.contiguous()
    length, segment, pieces, states = q.shape[1], None, None, q.shape[0]
    if sequences is None:
        begun = at_starts(starts, length, reverse, 1, torch.int32)
        segment = None if begun is None else begun.cumsum(0, dtype=torch.int32)
    else:
        assert starts is not None  # each sequence begins at one
        states = sequences.count
        pieces = cut(starts, sequences, length, reverse, CHUNK) if length else None
    return Scan(q, k, v, g, float(scale), heads, index, segment, pieces, states, reverse, steps, skip, z)


def forward(
    scan: Scan,
    initial: torch.Tensor | None,  # (b,h,dk,dv), of packed sequences (n,h,dk,dv), as all states
    save: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """save: keep the output as it is before the gate.

    Returns (out (b,l,h,dv) in v's dtype, the final state (b,h,dk,dv), float32, and what is kept, float32, or None).
    """
    out = torch.empty(_per_head(scan, scan.v), dtype=scan.v.dtype, device=scan.v.device)
    before_gate = _floats(out, *out.shape) if save else None
    if not out.numel():
        state = _floats(out, *_state_shape(scan))
        return out, state.zero_() if initial is None else state.copy_(initial), before_gate
    with on(scan.q):
        states, _ = _states(scan, initial)
        _outputs(scan, states, out, before_gate)
        state = _leave(scan, states, initial)
    return out, state.clone() if scan.pieces is None else state, before_gate


def backward(
    dout: torch.Tensor,  # (b,l,h,dv)
    dfinal: torch.Tensor | None,  # (b,h,dk,dv), of the final state
    scan: Scan,
    initial: torch.Tensor | None,  # (b,h,dk,dv)
    before_gate: torch.Tensor | None = None,  # (b,l,h,dv), what forward kept, where there is z
) -> Gradients:
    """The gradients of the scan's tensors and of the initial state."""
    q, k, v, g, heads = scan.q, scan.k, scan.v, scan.g, scan.heads
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    batch, length, _, _, dv, _ = _sizes(scan)
    dq, dkeys, dvalues = (_new(scan, t) for t in (q, k, v))
    dg = None if g is None else torch.empty(g.shape, dtype=torch.float32 if scan.steps is not None else g.dtype, device=g.device)
    dz = None if scan.z is None else torch.empty(scan.z.shape, dtype=scan.z.dtype, device=q.device)
    if not dvalues.numel():
        return _nothing(scan, dfinal, dz)
    with on(q):
        states, decays = _states(scan, initial)
        dstates = torch.empty_like(states)
        _enter(scan, dstates, dfinal, backward=True)
        _chunk_states(scan, dstates, decays, q, dout, backward=True)
        carry_over(dstates, decays, backward=True)

        dsteps = None if scan.steps is None else _floats(q, triton.cdiv(dv, _value_tile(scan)), batch, length, heads)
        _value_gradients(scan, dout, dstates, before_gate, dvalues, dsteps, dz)
        if _decay(scan) == KEY:
            change = _per_key_gradients(scan, dout, states, dstates, dq, dkeys)
        else:
            change = _query_and_key_gradients(scan, dout, states, dstates, dq, dkeys)
        if g is not None:
            _decay_gradients(scan, states, dstates, decays, change, dg)
        dinitial = _leave(scan, dstates, dfinal, backward=True)
    dq, dkeys, dvalues = (_shared(d, t, heads) for d, t in ((dq, q), (dkeys, k), (dvalues, v)))
    return Gradients(dq, dkeys, dvalues, dg, None if dsteps is None else dsteps.sum(0), dz, dinitial)


def _nothing(scan, dfinal, dz):
    """The gradients where there is no output: the empty walk's final state is its initial one."""
    zeros = [None if t is None else torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (scan.q, scan.k, scan.v, scan.g)]
    dinitial = _floats(scan.q, *_state_shape(scan))
    dinitial.zero_() if dfinal is None else dinitial.copy_(dfinal)
    return Gradients(*zeros, None if scan.steps is None else torch.zeros_like(scan.steps), dz, dinitial)


def _value_gradients(scan, dout, dstates, before_gate, dv_out, dsteps, dz):
    """Fills dv_out (b,l,h,dv), dsteps (tiles, b, l, h) and dz (b,l,h,dv), where they are given."""
    _, _, rows, dk, dv, chunks = _sizes(scan)
    bv = _value_tile(scan)
    value_gradients[rows * chunks * triton.cdiv(dv, bv),](
        **_inputs(scan, dout),
        **pointers(dout, pairs=_pairs(scan), dstates=dstates, skip=scan.skip, before_gate=before_gate),
        **pointers(dout, dv_out=dv_out, dsteps=dsteps, dz=dz),
        SKIP=scan.skip is not None,
        BK=_inner_tile(scan, dk),
        BV=bv,
    )


def _query_and_key_gradients(scan, dout, states, dstates, dq_out, dk_out):
    """Fills dq_out and dk_out (b,l,h,dk) where the decay is not per key.

    Returns change (2 * tiles, b*h, chunks, CHUNK), parts of the decays' gradients; None without decay.
    """
    _, _, rows, dk, dv, chunks = _sizes(scan)
    bk = _key_tile(scan)
    tiles = triton.cdiv(dk, bk)
    change = None if scan.g is None else _floats(dout, 2, tiles, rows, chunks, CHUNK)
    of_queries, of_keys = (None, None) if change is None else change
    shared = {**_inputs(scan, dout), "BK": bk, "BV": _inner_tile(scan, dv)}
    query_gradients[rows * chunks * tiles,](**pointers(dout, states=states, dq_out=dq_out, change=of_queries), **shared)
    key_gradients[rows * chunks * tiles,](**pointers(dout, dstates=dstates, dk_out=dk_out, change=of_keys), **shared)
    return None if change is None else change.flatten(0, 1)


def _per_key_gradients(scan, dout, states, dstates, dq_out, dk_out):
    """Fills dq_out and dk_out (b,l,h,dk) where the decay is per key. Returns change, as `query_key_gradients` writes it."""
    _, _, rows, dk, dv, chunks = _sizes(scan)
    bk, bv = min(_tile(dk), KEYS), _tile(dv)
    dpairs = _floats(dout, rows, chunks, CHUNK, CHUNK)
    pair_gradients[rows * chunks,](
        **strided(TOKENS, dout, dout=dout), **_of_heads(scan, v=scan.v), dpairs=dpairs, scale=scan.scale, dv=dv, **_common(scan), BV=bv
    )
    change = _floats(dout, rows, chunks, CHUNK + 2 * (CHUNK // BLOCK), dk)
    query_key_gradients[rows * chunks * triton.cdiv(dk, bk) * (CHUNK // BLOCK),](
        **strided(TOKENS, dout, dout=dout, g=scan.g),
        **_of_heads(scan, q=scan.q, k=scan.k, v=scan.v),
        dpairs=dpairs,
        states=states,
        dstates=dstates,
        dq_out=dq_out,
        dk_out=dk_out,
        change=change,
        scale=scan.scale,
        dk=dk,
        dv=dv,
        slots=_slots(scan),
        **_common(scan),
        BLOCK=BLOCK,
        BK=bk,
        BV=bv,
    )
    return change


def _decay_gradients(scan, states, dstates, decays, change, dg_out):
    """Fills dg_out, of g's shape."""
    _, _, rows, dk, dv, chunks = _sizes(scan)
    bk, decay = _tile(dk), _decay(scan)
    decay_gradients[rows * chunks * (triton.cdiv(dk, bk) if decay == KEY else 1),](
        states=states,
        dstates=dstates,
        change=change,
        decays=decays,
        dg_out=dg_out,
        dk=dk,
        dv=dv,
        slots=_slots(scan),
        parts=change.shape[0],
        **{name: value for name, value in _common(scan).items() if name not in ("segment", "STARTS")},
        DECAY=decay,
        BLOCK=BLOCK,
        BK=bk,
        BV=_tile(dv),
    )


def _states(scan, initial):
    """(states (b*h, slots, dk, dv), decays (b*h, slots - 1[, dk])) at every edge."""
    _, _, rows, dk, dv, _ = _sizes(scan)
    states = _floats(scan.q, rows, _slots(scan), dk, dv)
    _enter(scan, states, initial)
    decays = _floats(scan.q, rows, _slots(scan) - 1, *((dk,) if _decay(scan) == KEY else ()))
    if scan.pieces is not None:
        decays.zero_()  # between two segments no chunk writes one
    _chunk_states(scan, states, decays, scan.k, scan.v)
    carry_over(states, decays)
    return states, decays


def _chunk_states(scan, states, decays, a, c, backward=False):
    """What each chunk adds, of a = k and c = v; backward: of a = q and c = the output's gradient."""
    _, _, rows, dk, dv, chunks = _sizes(scan)
    bk, bv = _tile(dk), _tile(dv)
    chunk_states[rows * chunks * triton.cdiv(dk, bk) * triton.cdiv(dv, bv),](
        **_of_heads(scan, k=a, v=c),
        **strided(TOKENS, a, g=scan.g, z=scan.z),
        **pointers(a, steps=scan.steps),
        states=states,
        decays=decays,
        scale=scan.scale,
        dk=dk,
        dv=dv,
        slots=_slots(scan),
        **_common(scan),
        BACKWARD=backward,
        DECAY=_decay(scan),
        STEPS=scan.steps is not None,
        GATE=scan.z is not None,
        BK=bk,
        BV=bv,
    )


def _pairs(scan):
    """(b*h, chunks, CHUNK, CHUNK): q_t k_i with their decays; None unless the decay is per key."""
    if _decay(scan) != KEY:
        return None
    _, _, rows, dk, _, chunks = _sizes(scan)
    pairs = _floats(scan.q, rows, chunks, CHUNK, CHUNK)
    key_pairs[rows * chunks * (CHUNK // BLOCK),](
        **_of_heads(scan, q=scan.q, k=scan.k),
        **strided(TOKENS, scan.q, g=scan.g),
        pairs=pairs,
        dk=dk,
        **_common(scan),
        BLOCK=BLOCK,
        BK=min(_tile(dk), KEYS),
    )
    return pairs


def _outputs(scan, states, out, before_gate):
    """Fills out (b,l,h,dv), and before_gate where it is given."""
    _, _, rows, dk, dv, chunks = _sizes(scan)
    bv = _value_tile(scan)
    outputs[rows * chunks * triton.cdiv(dv, bv),](
        **_inputs(scan),
        **pointers(out, pairs=_pairs(scan), states=states, skip=scan.skip, out=out, before_gate=before_gate),
        SKIP=scan.skip is not None,
        SAVE=before_gate is not None,
        BK=_inner_tile(scan, dk),
        BV=bv,
    )


def _inputs(scan, dout=None):
    """The arguments of `outputs` and, with the output's gradient, of the kernels of triton_token_gradients.py that come from the op's inputs."""
    return {
        **({} if dout is None else strided(TOKENS, dout, dout=dout)),
        **_of_heads(scan, q=scan.q, k=scan.k, v=scan.v),
        **strided(TOKENS, scan.q, g=scan.g, z=scan.z),
        **pointers(scan.q, steps=scan.steps),
        "scale": scan.scale,
        "dk": scan.q.shape[3],
        "dv": scan.v.shape[3],
        "slots": _slots(scan),
        **_common(scan),
        "DECAY": _decay(scan),
        "STEPS": scan.steps is not None,
        "GATE": scan.z is not None,
    }


def _of_heads(scan, **tensors):
    """Arguments for token tensors that heads may share: pointers, strides, and how many heads share one."""
    return strided(TOKENS, scan.q, **tensors) | {f"{name}_repeat": scan.heads // t.shape[2] for name, t in tensors.items()}


def _common(scan):
    """The arguments of every kernel but `carry`."""
    _, length, _, _, _, chunks = _sizes(scan)
    return {
        **pointers(scan.q, index=scan.index, segment=scan.segment, pieces=None if scan.pieces is None else scan.pieces.table),
        "length": length,
        "heads": scan.heads,
        "chunks": chunks,
        "WALK": scan.index is not None,
        "STARTS": scan.segment is not None,
        "PACKED": scan.pieces is not None,
        "REVERSE": scan.reverse,
        "CHUNK": CHUNK,
        "num_warps": WARPS,
        "maxnreg": 255,  # else the assembler may spill a few registers so that more programs run at a time
    }


def _sizes(scan):
    """batch, length, batch x heads, dk, dv, chunks."""
    batch, length, _, dk = scan.q.shape
    chunks = triton.cdiv(length, CHUNK) if scan.pieces is None else scan.pieces.count
    return batch, length, batch * scan.heads, dk, scan.v.shape[3], chunks


def _slots(scan) -> int:
    """States at the chunks' edges."""
    return _sizes(scan)[5] + (1 if scan.pieces is None else scan.pieces.segments)


def _state_shape(scan) -> tuple[int, ...]:
    return scan.states, scan.heads, scan.q.shape[3], scan.v.shape[3]


def _decay(scan) -> int:
    return 0 if scan.g is None else scan.g.dim() - 2


def _tile(width):
    return min(max(triton.next_power_of_2(width), 16), WIDEST)


def _key_tile(scan):
    """Keys of a tile of the gradients of q and k. With a gate, or in float32, registers are left for fewer."""
    return min(_tile(scan.q.shape[3]), KEYS if scan.z is not None or _few_registers(scan) else WIDEST)


def _value_tile(scan):
    """Values of a tile of the outputs and of the gradients of v."""
    return min(_tile(scan.v.shape[3]), KEYS if scan.z is not None and _few_registers(scan) else WIDEST)


def _inner_tile(scan, width):
    """Of a tile of the dimension that the outputs and the gradients of q, k and v sum over."""
    return min(_tile(width), KEYS if _few_registers(scan) else WIDEST)


def _few_registers(scan):
    """Whether these kernels hold pairs of tokens and float32 operands: sm_80 then has too few registers for wide tiles."""
    return _decay(scan) != KEY and any(t.dtype == torch.float32 for t in (scan.q, scan.k, scan.v))


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


def _enter(scan, states, given, backward=False):
    """Fills the slots of what enters the walk: the initial states or (backward) the final states' gradients; zeros where none are given."""
    if scan.pieces is None:
        edge = states.unflatten(0, (-1, scan.heads))[:, :, -1 if backward else 0]
        edge.zero_() if given is None else edge.copy_(given)
    else:
        entries = scan.pieces.enter(given, _state_shape(scan)[1:], backward)
        states.index_copy_(1, scan.pieces.edges(backward), entries.transpose(0, 1))


def _leave(scan, states, given, backward=False):
    """What leaves the walk, (b,h,dk,dv), a view of states unless sequences are packed; given: what entered it."""
    if scan.pieces is None:
        return states.unflatten(0, (-1, scan.heads))[:, :, 0 if backward else -1]
    left = states.index_select(1, scan.pieces.edges(not backward)).transpose(0, 1)
    return scan.pieces.leave(left, given, backward)
