"""Selective scan on a GPU, in Triton: allocates and launches. The kernels are in triton_forward.py and triton_backward.py.

The caller has checked shapes, dtypes and the walk (index, starts, reverse). One launch computes at most 16 states of one walk. With more states or
walks, each launch adds to the result of the launch before it, in float32, and the last launch writes the result. PyTorch adds partial sums of
gradients in a fixed order. Nothing here waits for the GPU.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton

from medssm.kernels.pieces import Pieces, cut
from medssm.kernels.selective_scan import plan
from medssm.kernels.selective_scan.triton_backward import adjoint, local_adjoint
from medssm.kernels.selective_scan.triton_forward import apply, carry, local
from medssm.kernels.triton import on, plain, pointers, strided
from medssm.kernels.walks import Sequences, at_starts

STATES = 16  # of a launch: so many vectors stay in registers
LANES = 32  # of a warp
GROUP = 32  # chunks that the carry reads ahead
HELD = 2  # steps whose states the backward pass has in registers at a time
SAVED_STATES = 2**26  # bytes, for all programs of the backward pass: 1024 programs with 16 states, as many as a large GPU runs at a time
OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}
# The names of the strides that a launch passes: of tokens, A, B and C, results, states by chunk, and states (b,d,n).
TOKENS, RATES, GROUPS, ROWS = ("batch", "token", "channel"), ("channel", "state"), ("batch", "token", "group", "state"), ("batch", "token")
CHUNKS, STATES_OF = ("batch", "chunk"), ("batch", "channel", "state")
UNSPILLED = {"maxnreg": 255}  # without it the assembler may spill a few registers so that more programs run at a time
WIDE = {"maxnreg": 168}  # likewise, of two channels in a lane: three programs for each quarter of a multiprocessor


class _Scan(NamedTuple):
    """The inputs of one walk. Weights are dense, in float32."""

    u: torch.Tensor  # (b,l,d)
    delta: torch.Tensor  # (b,l,d) or (b,l,r)
    A: torch.Tensor  # (d,n)
    B: torch.Tensor  # (b,l,g,n)
    C: torch.Tensor  # (b,l,g,n)
    D: torch.Tensor | None
    z: torch.Tensor | None
    bias: torch.Tensor | None
    softplus: bool
    proj: torch.Tensor | None  # (r,d)
    index: torch.Tensor | None  # type: ignore[assignment]  # it hides tuple.index, which nobody calls here
    keep: torch.Tensor | None  # (l,): what `decay` adds to each step's exponent: -inf where the state begins anew, else 0
    packed: tuple[torch.Tensor, Sequences] | None  # the starts and the sequences of packed ones; keep is then None
    reverse: bool
    initial: torch.Tensor | None  # (b,d,n), or a row for each sequence

    def parts(self):
        """For every launch: its states, and the scan with these states alone. D belongs to the last launch."""
        n = self.A.shape[1]
        for first in range(0, n, STATES):
            of = slice(first, first + STATES)
            initial = None if self.initial is None else self.initial[:, :, of]
            D = self.D if first + STATES >= n else None
            yield of, self._replace(A=self.A[:, of], B=self.B[..., of], C=self.C[..., of], D=D, initial=initial)

    def cut(self, tile: int, states: int) -> tuple[int, int, int, Pieces | None]:
        """The numbers of tiles of channels, of steps in a chunk, and of chunks; and the chunks of packed sequences. states: of all parts together."""
        batch, length, channels = self.u.shape
        groups = self.B.shape[2]
        tiles = groups * triton.cdiv(channels // groups, tile)
        steps = plan.steps(batch * tiles, length, states)
        if self.packed is None:
            return tiles, steps, triton.cdiv(length, steps), None
        pieces = cut(*self.packed, length, self.reverse, steps, grid=True)
        return tiles, steps, pieces.count, pieces

    def arguments(self, steps: int, chunks: int, pieces: Pieces | None) -> dict:
        """What every kernel but `carry` takes."""
        n = self.A.shape[1]
        return {
            **strided(TOKENS, self.u, delta=self.delta),
            **strided(RATES, self.u, A=self.A),
            **pointers(self.u, bias=self.bias, proj=self.proj, index=self.index, keep=self.keep, pieces=None if pieces is None else pieces.table),
            "length": self.u.shape[1],
            "channels": self.u.shape[2],
            "groups": self.B.shape[2],
            "steps": steps,
            "chunks": chunks,
            "N": n,
            "K": 4 if n > 4 else 8,
            "BYTES": _bytes(self.B, self.C),
            "RANK": 0 if self.proj is None else self.proj.shape[0],
            "BIAS": self.bias is not None,
            "SOFTPLUS": self.softplus,
            "WALK": self.index is not None,
            "KEEP": self.keep is not None,
            "PACKED": pieces is not None,
            "REVERSE": self.reverse,
            **OPTIONS,
        }


class _Total:
    """A result (b,l,d) that several launches add to, one after the other. It is in float32 until the last launch writes it."""

    def __init__(self, result: torch.Tensor, launches: int):
        self.result, self.left = result, launches
        self.earlier: torch.Tensor | None = None
        self.sum = result if launches == 1 or result.dtype is torch.float32 else torch.empty(result.shape, dtype=torch.float32, device=result.device)

    def next(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tensor that the next launch writes, and the tensor that it adds to."""
        self.left -= 1
        target, earlier = self.sum if self.left else self.result, self.earlier
        self.earlier = target
        return target, earlier


def forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, delta_proj, index, starts, reverse, initial_state, save, final, sequences=None):
    """As `native.forward`: out (b,l,d), the state (b,d,n) or None, the checkpoints (b,chunks,n,d) or None."""
    u, delta, A, B, C, D, z, delta_bias, delta_proj, initial_state = plain(u, delta, A, B, C, D, z, delta_bias, delta_proj, initial_state)
    batch, length, channels = u.shape
    n = A.shape[1]
    out = _new(u)
    state = _floats(u, batch if sequences is None else sequences.count, channels, n) if final else None
    checkpoints = _floats(u, batch, plan.chunks(length, n), n, channels) if save else None
    if out.numel():
        with on(u):
            scan = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, delta_proj, index, starts, reverse, initial_state, sequences)
            _forward(scan, 1.0, _Total(out, _launches(A)), checkpoints, state)
    elif final:
        state.zero_() if initial_state is None else state.copy_(initial_state)
    return out, state, checkpoints


def forward_nd(x, delta, A, B, C, D, z, delta_bias, delta_softplus, delta_proj, walks, merge, save):
    """As `native.forward_nd`: out (b,l,d), or (b,l,k,d) for merge="stack", and the checkpoints (b,k,chunks,n,d) or None."""
    x, delta, A, B, C, D, z, delta_bias, delta_proj = plain(x, delta, A, B, C, D, z, delta_bias, delta_proj)
    k, channels, n = A.shape
    batch, length = x.shape[:2]
    stack = merge == "stack"
    out = torch.empty((batch, length, k, channels) if stack else (batch, length, channels), dtype=x.dtype, device=x.device)
    checkpoints = _floats(x, batch, k, plan.chunks(length, n), n, channels) if save else None
    if out.numel():
        merged = None if stack else _Total(out, k * _launches(A))
        with on(x):
            for i, walk in enumerate(walks):
                scan = _scan_of_walk(i, walk, x, delta, A, B, C, D, z, delta_bias, delta_softplus, delta_proj)
                total = _Total(out[:, :, i], _launches(A)) if stack else merged
                _forward(scan, 1 / k if merge == "mean" else 1.0, total, None if checkpoints is None else checkpoints[:, i], None)
    return out, checkpoints


def backward(
    dout, dstate, checkpoints, u, delta, A, B, C, D, z, delta_bias, delta_softplus, delta_proj, index, starts, reverse, initial_state, sequences=None
):
    """As `native.backward`: gradients of u, delta, A, B, C, D, z, delta_bias, delta_proj and initial_state, None where the input is."""
    dout, dstate, checkpoints, *inputs = plain(dout, dstate, checkpoints, u, delta, A, B, C, D, z, delta_bias, delta_proj, initial_state)
    u, delta, A, B, C, D, z, delta_bias, delta_proj, initial_state = inputs
    if not u.numel():
        gradients = [None if t is None else torch.zeros_like(t) for t in inputs]
        if initial_state is not None and dstate is not None:
            gradients[-1].copy_(dstate)
        return tuple(gradients)
    du, ddelta, dB, dC, dz, dinitial = (None if t is None else _new(t) for t in (u, delta, B, C, z, initial_state))
    weights = (A, D, delta_bias, delta_proj)
    dweights = [None if t is None else _floats(t, *t.shape) for t in weights]
    launches = _launches(A)
    with on(u):
        scan = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, delta_proj, index, starts, reverse, initial_state, sequences)
        _backward(
            scan,
            1.0,
            dout,
            dstate,
            checkpoints,
            _Total(du, launches),
            ddelta,
            dB,
            dC,
            None if z is None else _Total(dz, launches),
            *dweights,
            dinitial,
        )
    dA, dD, dbias, dproj = (None if t is None else g.to(t.dtype) for g, t in zip(dweights, weights, strict=True))
    return du, ddelta, dA, dB, dC, dD, dz, dbias, dproj, dinitial


def backward_nd(dout, checkpoints, x, delta, A, B, C, D, z, delta_bias, delta_softplus, delta_proj, walks, merge):
    """As `native.backward_nd`: gradients of x, delta, A, B, C, D, z, delta_bias and delta_proj, None where the input is."""
    dout, checkpoints, *inputs = plain(dout, checkpoints, x, delta, A, B, C, D, z, delta_bias, delta_proj)
    x, delta, A, B, C, D, z, delta_bias, delta_proj = inputs
    if not x.numel():
        return tuple(None if t is None else torch.zeros_like(t) for t in inputs)
    dx, ddelta, dB, dC, dz = (None if t is None else _new(t) for t in (x, delta, B, C, z))
    weights = (A, D, delta_bias, delta_proj)
    dweights = [None if t is None else _floats(t, *t.shape) for t in weights]
    k, own = A.shape[0], x.dim() == 4
    x_total = None if own else _Total(dx, k * _launches(A))
    z_total = None if z is None else _Total(dz, k * _launches(A))
    with on(x):
        for i, walk in enumerate(walks):
            scan = _scan_of_walk(i, walk, x, delta, A, B, C, D, z, delta_bias, delta_softplus, delta_proj)
            _backward(
                scan,
                1 / k if merge == "mean" else 1.0,
                _slice(dout, i),
                None,
                checkpoints[:, i],
                _Total(dx[:, :, i], _launches(A)) if own else x_total,
                ddelta[:, :, i],
                dB[:, :, i],
                dC[:, :, i],
                z_total,
                *(None if g is None else g[i] for g in dweights),
                None,
            )
    dA, dD, dbias, dproj = (None if t is None else g.to(t.dtype) for g, t in zip(dweights, weights, strict=True))
    return dx, ddelta, dA, dB, dC, dD, dz, dbias, dproj


def _forward(scan, scale, total, checkpoints, state):
    """total += y + D u along one walk; its last launch scales and gates. Fills checkpoints (b,chunks,n,d) and state (b,d,n) where given."""
    batch, _, channels = scan.u.shape
    initial = scan.initial
    n, groups = scan.A.shape[1], scan.B.shape[2]
    per_group = channels // groups
    tile = 2 * LANES if per_group % (2 * LANES) == 0 or per_group > 8 * LANES else LANES  # two channels in a lane, unless many lanes would be idle
    tiles, steps, chunks, pieces = scan.cut(tile, n)
    programs = batch * chunks * tiles
    carried = chunks > (1 if pieces is None else pieces.segments)  # from chunk to chunk
    sums = _floats(scan.u, batch, chunks, channels) if carried else None
    if pieces is not None and scan.initial is not None:
        scan = scan._replace(initial=pieces.enter(scan.initial, (channels, n)))
    left = state if pieces is None or state is None else _floats(scan.u, pieces.segments, channels, n)
    for of, part in scan.parts():
        u, A = part.u, part.A
        saved = None if checkpoints is None else checkpoints[:, :, of]
        entries = _by_chunk(part.initial, pieces)
        shared = part.arguments(steps, chunks, pieces) | {"TILE": tile}
        if carried:
            # Saved checkpoints at the chunks' begins first hold the chunks' end states, then their entry states: no further memory is needed.
            shares = saved is not None and pieces is None
            entries = saved[:, :: steps // plan.chunk(n)] if shares else _floats(u, batch, chunks, A.shape[1], channels)
            local[programs,](**strided(TOKENS, u, u=u), **strided(GROUPS, u, B=part.B), **strided(CHUNKS, u, ends=entries), sums=sums, **shared)
            _carry(entries, sums, A, part.initial, part.keep, pieces, steps, backward=False)
        target, earlier = total.next()
        last = not total.left  # only the last launch scales and gates
        z = part.z if last else None
        final = None if left is None else left[:, :, of]
        apply[programs,](
            **strided(TOKENS, u, u=u, z=z),
            **strided(GROUPS, u, B=part.B, C=part.C),
            **pointers(u, D=part.D, bounds=None if pieces is None else pieces.bounds),
            **strided((*CHUNKS, "state", "channel"), u, entry=entries),
            **strided(ROWS, u, out=target, earlier=earlier),
            **strided(CHUNKS, u, checkpoints=saved),
            **strided(STATES_OF, u, state=final),
            scale=scale if last else 1.0,
            CHUNK=plan.chunk(n),
            SKIP=part.D is not None,
            GATE=z is not None,
            ENTRY=entries is not None,
            EARLIER=earlier is not None,
            SAVE=saved is not None,
            FINAL=final is not None,
            **shared | (WIDE if tile > LANES else {}),
        )
    if pieces is not None and state is not None:
        state.copy_(pieces.leave(left, initial))


def _backward(scan, scale, dout, dstate, checkpoints, du, ddelta, dB, dC, dz, dA, dD, dbias, dproj, dinitial):
    """The gradients along one walk: added to the totals du and dz, written into the others."""
    batch, length, channels = scan.u.shape
    n, groups, chunk = scan.A.shape[1], scan.B.shape[2], plan.chunk(scan.A.shape[1])
    tiles, steps, chunks, pieces = scan.cut(LANES, n)
    items = batch * chunks * tiles
    carried = chunks > (1 if pieces is None else pieces.segments)  # from chunk to chunk
    entered, left = dstate, dinitial
    if pieces is not None:
        scan = scan._replace(initial=None if scan.initial is None else pieces.enter(scan.initial, (channels, n)))
        entered = None if dstate is None else pieces.enter(dstate, (channels, n), backward=True)
        left = None if dinitial is None else _floats(scan.u, pieces.segments, channels, n)
    saved_by_one = (chunk // HELD, min(n, STATES), LANES)
    programs = min(items, plan.PROGRAMS, max(SAVED_STATES // (4 * math.prod(saved_by_one)), 1))
    like = scan.u
    sums = _floats(like, batch, chunks, channels) if carried else None
    D_sums, bias_sums = _floats(like, batch, chunks, channels), _floats(like, batch, chunks, channels)
    low_rank = scan.proj is not None
    rank = scan.proj.shape[0] if low_rank else 0
    delta_total, delta_sums = None if low_rank else _Total(ddelta, _launches(scan.A)), []
    for of, part in scan.parts():
        u, A, z, D = part.u, part.A, part.z, part.D
        dfinal = None if entered is None else entered[:, :, of]
        exits = _by_chunk(dfinal, pieces)
        shared = part.arguments(steps, chunks, pieces) | {"scale": scale, "TILE": LANES, "GATE": z is not None}
        if carried:
            exits = _floats(like, batch, chunks, A.shape[1], channels)
            local_adjoint[items,](
                **strided(TOKENS, u, dout=dout, z=z), **strided(GROUPS, u, C=part.C), **strided(CHUNKS, u, ends=exits), totals=sums, **shared
            )
            _carry(exits, sums, A, dfinal, part.keep, pieces, steps, backward=True)
        A_sums = _floats(like, batch, chunks, A.shape[1], channels)
        B_sums, C_sums = (_floats(like, tiles // groups, *part.B.shape) for _ in range(2))
        saved_states = _floats(like, programs, *saved_by_one)
        du_target, du_earlier = du.next()
        dz_target, dz_earlier = (None, None) if dz is None else dz.next()
        if low_rank:
            delta_target, delta_earlier = _floats(like, tiles, batch, length, rank), None
            proj_sums = torch.zeros((batch, chunks, rank, channels), dtype=torch.float32, device=like.device)
        else:
            (delta_target, delta_earlier), proj_sums = delta_total.next(), None
        into = None if left is None else left[:, :, of]
        entry = part.initial if pieces is not None else None
        adjoint[programs,](
            **strided(TOKENS, u, dout=dout, u=u, z=z),
            **strided(GROUPS, u, B=part.B, C=part.C),
            **strided(CHUNKS, u, checkpoints=checkpoints[:, :, of]),
            **strided(("segment", "channel", "state"), u, entry=entry),
            **strided((*CHUNKS, "state", "channel"), u, exit=exits),
            **strided(ROWS, u, du=du_target, du_earlier=du_earlier, dz=dz_target, dz_earlier=dz_earlier),
            **strided(ROWS, u, ddelta=delta_target, ddelta_earlier=delta_earlier),
            **strided(STATES_OF, u, dinitial=into),
            **pointers(u, bounds=None if pieces is None else pieces.bounds),
            **pointers(u, D=D, saved_states=saved_states, dA=A_sums, dB=B_sums, dC=C_sums, dD=D_sums, dbias=bias_sums, dproj=proj_sums),
            items=items,
            batch=batch,
            CHUNK=chunk,
            SKIP=D is not None,
            ENTRY=entry is not None,
            EXIT=exits is not None,
            INITIAL=into is not None,
            DU_EARLIER=du_earlier is not None,
            DDELTA_EARLIER=delta_earlier is not None,
            DZ_EARLIER=dz_earlier is not None,
            **shared | UNSPILLED | {"K": HELD},
        )
        dA[:, of] = A_sums.sum((0, 1)).t()
        dB[..., of] = B_sums.sum(0)
        dC[..., of] = C_sums.sum(0)
        if D is not None:
            torch.sum(D_sums, (0, 1), out=dD)
        if part.bias is not None:
            _add(dbias, bias_sums.sum((0, 1)), of)
        if low_rank:
            _add(dproj, proj_sums.sum((0, 1)).t(), of)
            delta_sums.append(delta_target.sum(0))
    if low_rank:
        ddelta.copy_(sum(delta_sums[1:], delta_sums[0]))
    if pieces is not None and dinitial is not None:
        dinitial.copy_(pieces.leave(left, dstate, backward=True))


def _carry(values, sums, A, entry, keep, pieces, steps, backward):
    """values (b,chunks,n,d), each chunk's end state from a zero state, become the states that enter the chunks. sums (b,chunks,d): of the chunks'
    steps; entry (b,d,n), or (segments,d,n): the state that enters the first.
    """
    batch, chunks, n, channels = values.shape
    fades = None if keep is None else torch.nn.functional.pad(keep, (0, chunks * steps - keep.shape[0])).view(chunks, steps).amin(1)
    walks = batch if pieces is None else pieces.segments
    carry[walks * n * triton.cdiv(channels, LANES),](
        **strided(CHUNKS, A, values=values),
        **strided(RATES, A, A=A),
        **strided(STATES_OF, A, entry=entry),
        **pointers(A, sums=sums, fades=fades, bounds=None if pieces is None else pieces.bounds),
        channels=channels,
        states=n,
        chunks=chunks,
        TILE=LANES,
        GROUP=min(GROUP, triton.next_power_of_2(chunks)),
        ENTRY=entry is not None,
        KEEP=keep is not None,
        PACKED=pieces is not None,
        BACKWARD=backward,
        **OPTIONS,
    )


def _scan(u, delta, A, B, C, D, z, delta_bias, softplus, delta_proj, index, starts, reverse, initial_state, sequences=None) -> _Scan:
    proj = None if delta_proj is None else _dense(delta_proj.t())  # the lanes read one rank's row of channels
    keep = None if sequences is not None else at_starts(starts, u.shape[1], reverse, -math.inf, torch.float32)
    packed = None if sequences is None else (starts, sequences)
    return _Scan(u, delta, _dense(A), B, C, _dense(D), z, _dense(delta_bias), softplus, proj, index, keep, packed, reverse, initial_state)


def _scan_of_walk(i, walk, x, delta, A, B, C, D, z, delta_bias, softplus, delta_proj) -> _Scan:
    """The scan along walk i of `forward_nd`."""
    D, delta_bias, delta_proj = (None if t is None else t[i] for t in (D, delta_bias, delta_proj))
    index, starts, reverse = walk
    return _scan(_slice(x, i), delta[:, :, i], A[i], B[:, :, i], C[:, :, i], D, z, delta_bias, softplus, delta_proj, index, starts, reverse, None)


def _launches(A) -> int:
    return triton.cdiv(A.shape[-1], STATES)


def _bytes(*rows: torch.Tensor) -> int:
    """How many bytes of rows (b,l,g,n) one load may read, 8 or 4, where the states are adjacent and every row is aligned; else 0: a number a load."""

    def fits(bytes: int) -> bool:
        return all(
            t.stride(-1) == 1
            and t.shape[-1] * t.element_size() % bytes == 0
            and all(stride * t.element_size() % bytes == 0 for stride in (t.data_ptr() // t.element_size(), *t.stride()[:-1]))
            for t in rows
        )

    return next((bytes for bytes in (8, 4) if fits(bytes)), 0)


def _by_chunk(state, pieces):
    """A state (b,d,n) as (b,1,n,d): that which enters the only chunk; (segments,d,n) as (1,segments,n,d): the only chunk of each segment."""
    return None if state is None else state.transpose(1, 2).unsqueeze(1 if pieces is None else 0)


def _add(total, part, of):
    """Adds the part of a launch's states; the first launch sets the total."""
    total.copy_(part) if of.start == 0 else total.add_(part)


def _new(t):
    """A gradient for t: contiguous, whatever t's strides are."""
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


def _floats(like, *shape):
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _dense(t):
    """A weight as the kernels read it: contiguous, in float32."""
    return None if t is None else t.to(torch.float32).contiguous()


def _slice(x, i):
    """The tokens of walk i: x (b,l,k,d) has its own for every walk, x (b,l,d) is the same for all."""
    return x[:, :, i] if x.dim() == 4 else x
