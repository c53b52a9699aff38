"""The delta rule on a GPU, in Triton: allocates and launches. The kernels are in triton_forward.py, triton_carry.py and triton_backward.py.

The caller has checked shapes, dtypes and the walk (index, starts, reverse, sequences). Workspace: the states at the edges of chunks, for each chunk
an inverse (CHUNK, CHUNK), for each segment the map (dk, dv + dk) that it applies to a state; backward also the gradients of the states. Nothing is
added atomically. Nothing waits for the GPU, but that the CPU reads where packed sequences begin.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from medssm.kernels.delta_rule.triton_backward import entry_key_gradients, exit_key_gradients, outer, pair_gradients, query_gradients
from medssm.kernels.delta_rule.triton_carry import carry, carry_back, compose
from medssm.kernels.delta_rule.triton_forward import inverse, outputs
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


def forward(q, k, v, beta, g, scale, index, starts, reverse, initial_state, save, final, sequences=None):
    """Returns out (b,l,h,dv) contiguous, the state (b,h,dk,dv) or None, recalled (b,l,h,dv) or None: exp(g_t) S_{t-1}^T k_t, for backward."""
    q, k, v, beta, g, initial_state = plain(q, k, v, beta, g, initial_state)
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


def backward(dout, dstate, recalled, q, k, v, beta, g, scale, index, starts, reverse, initial_state, sequences=None):
    """Gradients of q, k, v, beta, g and initial_state (None where that input is), each in its input's dtype and contiguous."""
    dout, dstate, recalled, *inputs = plain(dout, dstate, recalled, q, k, v, beta, g, initial_state)
    q, k, v, beta, g, initial_state = inputs
    if not v.numel():
        results = [None if t is None else torch.zeros_like(t, memory_format=torch.contiguous_format) for t in inputs]
        if initial_state is not None and dstate is not None:
            results[-1].copy_(dstate)
        return tuple(results)
    results = [like(t) for t in inputs]
    with on(q):
        problem = _Problem(q, k, v, beta, g, scale, index, starts, reverse, sequences)
        states = problem.carry(None, initial_state, recalled)
        r, exits = problem.carry_back(lanes(dout), dstate)
        if initial_state is not None:
            results[-1].copy_(problem.leave(exits, dstate, back=True))
        problem.gradients(lanes(dout), recalled, r, states, exits, *results[:-1])
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


def _fill(states, given):
    """With what is given, of as many numbers, else zeros."""
    states.zero_() if given is None else states.copy_(given.reshape(states.shape))


def _floats(like, *shape):
    return torch.empty(shape, dtype=torch.float32, device=like.device)
