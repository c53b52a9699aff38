"""The delta rule on a GPU, in Triton: allocates and launches. The kernels are in triton_forward.py, triton_carry.py and triton_backward.py.

The caller has checked shapes, dtypes and the walk (index, starts, reverse, sequences). Workspace: the states at the edges of chunks, for each chunk
an inverse (CHUNK, CHUNK), for each segment the map (dk, dv + dk) that it applies to a state; backward also the gradients of the states. Nothing is
added atomically. Nothing waits for the GPU, but that the CPU reads where packed sequences begin.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from medssm.kernels.delta_rule.general import defaults_back, is_general
from medssm.kernels.delta_rule.triton_backward import entry_key_gradients, exit_key_gradients, outer, pair_gradients, query_gradients
from medssm.kernels.delta_rule.triton_carry import carry, carry_back, compose
from medssm.kernels.delta_rule.triton_forward import inverse, outputs
from medssm.kernels.delta_rule.triton_general import walk, walk_back
from medssm.kernels.matrix_state.triton_tiles import HEAD, KEY, NONE
from medssm.kernels.native import lanes, like
from medssm.kernels.pieces import cut
from medssm.kernels.triton import on, plain, pointers, strided
from medssm.kernels.triton_tiles import STRONGEST
from medssm.kernels.walks import at_starts

TOKENS = ("batch", "token", "head")  # the names of strides
HELD = 2  # tiles of keys: a state with more does not fit in a program's registers
CARRIED = 16  # value channels of a tile where the state of all keys is carried
# 255 registers are the hardware's limit. Without maxnreg ptxas spills registers to fit more warps on a multiprocessor.
OPTIONS = {"num_warps": 4, "num_stages": 1, "maxnreg": 255, "enable_fp_fusion": True}
# Programs of `carry` that run at a time: two on each of some 130 multiprocessors. A constant, so that every GPU gives the same bits.
PROGRAMS = 256
WALKED = 1024  # numbers of a state's tile of the general form, as many as a warp holds in registers
CHUNK_WALKED = 32  # steps of the general form whose states are kept on the way back
SHORTEST = 32  # chunks of a segment: composing takes the time of two chunks of 64 keys, and three more launches the time of some ten


class _Sizes(NamedTuple):
    keys: int  # of a tile
    values: int  # of a tile
    chunk: int = 16  # steps: in tiles of 32 steps by 32 channels some kernels spill in float32


def sizes(dk: int, dv: int) -> _Sizes:
    """Sizes of chunks and tiles for these heads: as large as registers allow."""
    return _Sizes(*(min(max(16, triton.next_power_of_2(n)), 32) for n in (dk, dv)))


def segment(rows: int, chunks: int, dk: int, dv: int) -> int:
    """Chunks that a program of `carry` walks: all of them, or fewer so that there are enough programs. Shapes alone decide.

    In one level there are rows x tiles of value channels programs, and each takes `chunks` steps. In two levels there are as many times more programs
    as segments, but a step is taken twice for every tile of values and once for every tile of the dk columns of M: some three times the work where
    dk = dv. Two levels are chosen where by this count they take half the time or less; no GPU has measured it.
    """
    tiles, across = triton.cdiv(dv, CARRIED), triton.cdiv(dv + dk, CARRIED)
    segments = min(PROGRAMS // (rows * tiles), chunks // SHORTEST)
    return triton.cdiv(chunks, segments) if segments * tiles >= 2 * (across + tiles) else chunks


def forward(
    q,
    k,
    v,
    beta,
    g,
    scale,
    index,
    starts,
    reverse,
    initial_state,
    save,
    final,
    sequences=None,
    erase=None,
    erase_out=None,
    write=None,
    erase_first=False,
):
    """Returns out (b,l,h,dv) contiguous, the state (b,h,dk,dv) or None, recalled (b,l,h,dv) or None, for backward: exp(g_t) S_{t-1}^T k_t, in the
    general form with a_t in place of k_t.
    """
    q, k, v, beta, g, erase, erase_out, write, initial_state = plain(q, k, v, beta, g, erase, erase_out, write, initial_state)
    if is_general(g, erase, erase_out, write, erase_first):
        with on(q):
            general = _General(q, k, v, beta, g, erase, erase_out, write, erase_first, scale, index, starts, reverse, sequences)
            return general.forward(initial_state, save, final)
    batch, _, heads, dk = q.shape
    dv = v.shape[-1]
    out, recalled = like(v), like(v, torch.float32)
    state = _floats(q, batch if sequences is None else sequences.count, heads, dk, dv) if final else None
    left = initial_state
    if v.numel():
        with on(q):
            problem = _Problem(q, k, v, beta, g, scale, index, starts, reverse, sequences)
            states = problem.carry(problem.inverses(rows=False), initial_state, recalled)
            problem.outputs(recalled, states, out)
            left = problem.leave(states, initial_state) if final else None
    if final:
        _fill(state, left)
    return out, state, recalled if save else None


def backward(
    dout,
    dstate,
    recalled,
    q,
    k,
    v,
    beta,
    g,
    scale,
    index,
    starts,
    reverse,
    initial_state,
    sequences=None,
    erase=None,
    erase_out=None,
    write=None,
    erase_first=False,
):
    """Gradients of q, k, v, beta, g, erase, erase_out, write, initial_state (None where that input is), each in its input's dtype and contiguous."""
    dout, dstate, recalled, *inputs = plain(dout, dstate, recalled, q, k, v, beta, g, erase, erase_out, write, initial_state)
    q, k, v, beta, g, erase, erase_out, write, initial_state = inputs
    if not v.numel():
        results = [None if t is None else torch.zeros_like(t, memory_format=torch.contiguous_format) for t in inputs]
        if initial_state is not None and dstate is not None:
            results[-1].copy_(dstate)
        return tuple(results)
    if is_general(g, erase, erase_out, write, erase_first):
        with on(q):
            general = _General(q, k, v, beta, g, erase, erase_out, write, erase_first, scale, index, starts, reverse, sequences)
            gradients = general.backward(lanes(dout), dstate, recalled, initial_state)
        return tuple(None if t is None else gradient.to(t.dtype) for gradient, t in zip(gradients, inputs, strict=True))
    results = [like(t) for t in inputs]
    with on(q):
        problem = _Problem(q, k, v, beta, g, scale, index, starts, reverse, sequences)
        states = problem.carry(None, initial_state, recalled)
        r, exits = problem.carry_back(lanes(dout), dstate)
        if initial_state is not None:
            results[-1].copy_(problem.leave(exits, dstate, back=True))
        problem.gradients(lanes(dout), recalled, r, states, exits, *results[:5])
    return tuple(results)


class _Problem:
    """The launches of one call."""

    def __init__(self, q, k, v, beta, g, scale, index, starts, reverse, sequences):
        self.q, self.k, self.v, self.beta, self.g, self.scale, self.index = lanes(q), lanes(k), lanes(v), beta, g, scale, index
        batch, length, heads, dk = q.shape
        dv = v.shape[-1]
        self.dk, self.dv, self.sizes = dk, dv, sizes(dk, dv)
        self.rows, self.tiles = batch * heads, triton.cdiv(dv, self.sizes.values)
        parts = triton.cdiv(dk, self.sizes.keys)
        if sequences is None:
            self.pieces, self.fresh = None, at_starts(starts, length, reverse, STRONGEST.value, torch.float32)
            self.chunks = triton.cdiv(length, self.sizes.chunk)
            self.segment = segment(self.rows, self.chunks, dk, dv)
            self.segments, self.slots = triton.cdiv(self.chunks, self.segment), self.chunks + 1
        else:  # each of the walk's segments is walked by programs of its own
            self.pieces, self.fresh = cut(starts, sequences, length, reverse, self.sizes.chunk), None
            self.chunks = self.segment = self.pieces.count
            self.segments, self.slots = 1, self.chunks + self.pieces.segments
        self.shared = {  # by every kernel but `compose`
            **strided(TOKENS, q, k=self.k, g=g),
            **pointers(q, fresh=self.fresh, index=index, pieces=None if self.pieces is None else self.pieces.table),
            "length": length,
            "heads": heads,
            "dk": dk,
            "chunks": self.chunks,
            "GATED": g is not None,
            "FRESH": self.fresh is not None,
            "PACKED": self.pieces is not None,
            "WALK": index is not None,
            "REVERSE": reverse,
            "CHUNK": self.sizes.chunk,
            "BK": self.sizes.keys,
            **OPTIONS,
        }
        self.of_beta = strided(TOKENS, q, beta=beta)
        self.of_values = {"dv": dv, "BV": self.sizes.values}
        self.of_states = {"slots": self.slots}
        self.of_carry = {
            **pointers(q, bounds=None if self.pieces is None else self.pieces.bounds),
            **self.of_states,
            "dv": dv,
            "segment": self.segment,
            "PARTS": parts if parts <= HELD else 0,
            "BV": CARRIED,
        }

    def inverses(self, rows: bool):
        """(b*h, chunks, CHUNK, CHUNK)."""
        made = self._squares()
        inverse[self.rows * self.chunks,](inverses=made, ROWS=rows, **self.of_beta, **self.shared)
        return made

    def carry(self, inverses, initial_state, recalled):
        """The states (b*h, slots, dk, dv) that enter the chunks, and the final one. Fills recalled where inverses are given."""
        states = self._states()
        self._enter(states, initial_state)
        given = {
            **strided(TOKENS, self.q, v=self.v),
            **pointers(self.q, inverses=inverses, recalled=recalled),
            "KNOWN": inverses is None,
            **self.of_beta,
            **self.of_carry,
            **self.shared,
        }
        if self.segments > 1:
            ends = self._ends()
            carry[self._programs(across=True),](states=ends, ACROSS=True, **given)
            self.compose(ends, states, back=False)
        carry[self._programs(across=False),](states=states, ACROSS=False, **given)
        return states

    def compose(self, ends, states, back):
        """Fills the states that enter the segments; back: the gradients of those that leave them."""
        compose[self.rows * triton.cdiv(self.dv, CARRIED),](
            ends=ends,
            states=states,
            dk=self.dk,
            dv=self.dv,
            chunks=self.chunks,
            segment=self.segment,
            BACK=back,
            BK=self.sizes.keys,
            BV=CARRIED,
            **OPTIONS,
        )

    def outputs(self, recalled, states, out):
        """Fills out (b,l,h,dv)."""
        outputs[self.rows * self.chunks * self.tiles,](
            **strided(TOKENS, self.q, q=self.q, v=self.v),
            recalled=recalled,
            states=states,
            out=out,
            scale=self.scale,
            **self.of_beta,
            **self.of_states,
            **self.of_values,
            **self.shared,
        )

    def carry_back(self, dout, dstate):
        """R (b,l,h,dv) and the gradients (b*h, slots, dk, dv) of the states that enter the chunks and of the final one."""
        r, exits = like(self.v, torch.float32), self._states()
        self._enter(exits, dstate, back=True)
        outer[self.rows * self.chunks * self.tiles,](
            **strided(TOKENS, self.q, dout=dout, q=self.q), r=r, exits=exits, scale=self.scale, **self.of_states, **self.of_values, **self.shared
        )
        given = {"inverses": self.inverses(rows=True), "r": r, "exits": exits, **self.of_beta, **self.of_carry, **self.shared}
        if self.segments > 1:
            ends = self._ends()
            carry_back[self._programs(across=True),](states=ends, ACROSS=True, **given)
            self.compose(ends, exits, back=True)
        carry_back[self._programs(across=False),](states=exits, ACROSS=False, **given)
        return r, exits

    def gradients(self, dout, recalled, r, states, exits, dq, dk, dv, dbeta, dg):
        """Fills those of q, k, v, beta and g."""
        programs = self.rows * self.chunks
        dpairs, dinverted = self._squares(), self._squares()
        part = None if dg is None else _floats(self.q, *self.q.shape[:3])  # of g's gradient: each kernel adds to it
        key_part = like(self.k, torch.float32)
        pair_gradients[programs,](
            **strided(TOKENS, self.q, dout=dout, q=self.q, v=self.v),
            **pointers(self.q, recalled=recalled, r=r, to_v=dv, to_beta=dbeta, to_g=part, dpairs=dpairs, dinverted=dinverted),
            scale=self.scale,
            **self.of_beta,
            **self.of_values,
            **self.shared,
        )
        query_gradients[programs,](
            **strided(TOKENS, self.q, dout=dout, q=self.q),
            **pointers(self.q, states=states, dpairs=dpairs, to_q=dq, to_g=part),
            scale=self.scale,
            **self.of_states,
            **self.of_values,
            **self.shared,
        )
        entry_key_gradients[programs,](
            **strided(TOKENS, self.q, q=self.q),
            **pointers(self.q, r=r, states=states, dpairs=dpairs, dinverted=dinverted, to_k=key_part, to_g=part),
            **self.of_beta,
            **self.of_states,
            **self.of_values,
            **self.shared,
        )
        exit_key_gradients[programs,](
            **strided(TOKENS, self.q, v=self.v),
            **pointers(self.q, recalled=recalled, states=states, exits=exits, so_far=key_part, to_k=dk, g_so_far=part, to_g=dg),
            **self.of_beta,
            **self.of_states,
            **self.of_values,
            **self.shared,
        )

    def _states(self):
        return _floats(self.q, self.rows, self.slots, self.dk, self.dv)

    def _enter(self, states, given, back=False):
        """Fills the slots of what enters the walk: the initial states, or (back) the gradients of the final ones; zeros where none are given."""
        if self.pieces is None:
            _fill(states[:, -1 if back else 0], given)
        else:
            entries = self.pieces.enter(given, (self.rows, self.dk, self.dv), back)
            states.index_copy_(1, self.pieces.edges(back), entries.transpose(0, 1))

    def leave(self, states, given, back=False):
        """What leaves the walk; given: what entered it."""
        if self.pieces is None:
            return states[:, 0 if back else -1].unflatten(0, (-1, self.q.shape[2]))
        return self.pieces.leave(states.index_select(1, self.pieces.edges(not back)).transpose(0, 1), given, back)

    def _squares(self):
        """A matrix of pairs of steps for each chunk."""
        return _floats(self.q, self.rows, self.chunks, self.sizes.chunk, self.sizes.chunk)

    def _ends(self):
        """(b*h, segments - 1, dk, dv + dk): [0, I], before `carry` walks ACROSS."""
        ends = _floats(self.q, self.rows, self.segments - 1, self.dk, self.dv + self.dk).zero_()
        ends[..., self.dv :].diagonal(dim1=-2, dim2=-1).fill_(1.0)
        return ends

    def _programs(self, across):
        walks = self.segments if self.pieces is None else self.pieces.segments
        walks, width = (walks - 1, self.dv + self.dk) if across else (walks, self.dv)
        return self.rows * walks * triton.cdiv(width, CARRIED)


class _General:
    """The launches of one call of the general form."""

    def __init__(self, q, k, v, beta, g, erase, erase_out, write, erase_first, scale, index, starts, reverse, sequences):
        self.q, self.k, self.v, self.beta = lanes(q), lanes(k), lanes(v), beta
        self.erase, self.erase_out, self.write = erase, erase_out, write
        per_key, per_value = g is not None and g.dim() == 4, write is not None and write.dim() == 4
        self.per_key, self.g, self.per_value = per_key, lanes(g) if per_key else g, per_value
        batch, length, heads, dk = q.shape
        dv = v.shape[-1]
        keys = triton.next_power_of_2(dk)
        values = min(triton.next_power_of_2(dv), max(1, WALKED // keys))
        self.rows, self.shape, self.tiles, self.tile = batch * heads, (dk, dv), triton.cdiv(dv, values), (CHUNK_WALKED, keys, values)
        if sequences is None:
            self.pieces, self.segments, self.chunks = None, 1, triton.cdiv(length, CHUNK_WALKED)
            self.fresh = at_starts(starts, length, reverse, 1.0, torch.float32)
        else:
            self.pieces, self.fresh = cut(starts, sequences, length, reverse, CHUNK_WALKED), None
            self.segments, self.chunks = self.pieces.segments, self.pieces.count
        a = beta[..., None].float() * k.float() if erase is None else lanes(erase)
        given = {
            "a": a,
            "c": self.k if erase_out is None else lanes(erase_out),
            "write": beta if write is None else lanes(write) if per_value else write,
        }
        self.shared = {
            **strided(TOKENS, q, q=self.q, k=self.k, v=self.v, g=self.g, **given),
            **pointers(
                q,
                fresh=self.fresh,
                index=index,
                pieces=None if self.pieces is None else self.pieces.table,
                bounds=None if self.pieces is None else self.pieces.bounds,
            ),
            "scale": scale,
            "length": length,
            "heads": heads,
            "dk": dk,
            "dv": dv,
            "chunks": self.chunks,
            "segments": self.segments,
            "DECAY": (NONE if g is None else KEY if per_key else HEAD).value,
            "PER_VALUE": per_value,
            "FIRST": erase_first,
            "FRESH": self.fresh is not None,
            "PACKED": self.pieces is not None,
            "WALK": index is not None,
            "REVERSE": reverse,
            "CHUNK": CHUNK_WALKED,
            "BK": keys,
            "BV": values,
            **OPTIONS,
            "num_warps": max(1, min(8, keys * values // 512)),
        }
        self.grid = (self.rows * self.segments * self.tiles,)

    def forward(self, initial_state, save, final):
        """(out, the final state or None, recalled or None)."""
        out, recalled, states = like(self.v), like(self.v, torch.float32), self._enter(initial_state)
        if self.v.numel():
            walk[self.grid](out=out, recalled=recalled, entering=states, leaving=states, states=states, KNOWN=False, **self.shared)
        return out, self._leave(states, initial_state) if final else None, recalled if save else None

    def backward(self, dout, dstate, recalled, initial_state):
        """The gradients of q, k, v, beta, g, erase, erase_out, write and initial_state."""
        q, k, v, (dk, dv) = self.q, self.k, self.v, self.shape
        states, edges = _floats(q, self.rows, self.chunks, dk, dv), self._enter(initial_state)
        walk[self.grid](out=recalled, recalled=recalled, entering=edges, leaving=edges, states=states, KNOWN=True, **self.shared)
        edges = self._enter(dstate, back=True)
        scratch = _floats(q, self.grid[0], *self.tile)
        tiled = [_floats(q, self.tiles, *k.shape) for _ in range(4)]
        of_v, of_write = like(v), like(v, torch.float32) if self.per_value else _floats(q, self.tiles, *v.shape[:3])
        of_g = None if self.g is None else _floats(q, self.tiles, *self.g.shape)
        made = dict(zip(("to_q", "to_k", "to_a", "to_c"), tiled, strict=True)) | {"to_v": of_v, "to_write": of_write}
        walk_back[self.grid](
            **strided(TOKENS, q, dout=dout),
            recalled=recalled,
            states=states,
            scratch=scratch,
            edges=edges,
            **made,
            **pointers(q, to_g=of_g),
            **self.shared,
        )
        of_q, of_k, of_a, of_c = (t.sum(0) for t in tiled)
        of_write = of_write if self.per_value else of_write.sum(0)
        if self.erase_out is None:
            of_k, of_c = of_k + of_c, None
        of_k, of_beta, of_a, of_write = defaults_back(k, self.beta, self.erase, self.write, of_k, of_a, of_write)
        of_g = None if of_g is None else of_g.sum(0)
        return of_q, of_k, of_v, of_beta, of_g, of_a, of_c, of_write, self._leave(edges, dstate, back=True)

    def _enter(self, given, back=False):
        """(segments, b*h, dk, dv): the initial states, or (back) the gradients of the final ones; zeros where none are given. A copy."""
        if self.pieces is not None:
            return self.pieces.enter(given, (self.rows, *self.shape), back)
        states = _floats(self.q, 1, self.rows, *self.shape)
        _fill(states, given)
        return states

    def _leave(self, states, given, back=False):
        """What leaves the walk, of what leaves its segments; given: what entered it."""
        if self.pieces is None:
            return states[0].unflatten(0, (-1, self.q.shape[2]))
        return self.pieces.leave(states, given, back)


def _fill(states, given):
    """With what is given, of as many numbers, else zeros."""
    states.zero_() if given is None else states.copy_(given.reshape(states.shape))


def _floats(like, *shape):
    return torch.empty(shape, dtype=torch.float32, device=like.device)
