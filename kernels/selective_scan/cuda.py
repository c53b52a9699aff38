"""Selective scan on a GPU: allocates scratch, packs one argument block, calls csrc/selective_scan. See scans.py for what the functions take."""

from __future__ import annotations

import torch

from medssm.kernels import cuda
from medssm.kernels.native import fields, pointer
from medssm.kernels.selective_scan import plan
from medssm.kernels.selective_scan.arguments import OUTPUT, PROBLEM, TOKENS, dense, output, problem
from medssm.kernels.selective_scan.scans import Scans

# The Arguments of csrc/selective_scan/cuda_forward.cu and cuda_backward.cu.
_forward = cuda.Kernel(
    "selective_scan", "forward", fields(("problem", PROBLEM), ("out", OUTPUT), "state checkpoints", "checkpoint_batch spacing chunk", "ends sums")
)
_backward = cuda.Kernel(
    "selective_scan",
    "backward",
    fields(
        ("problem", PROBLEM),
        ("dout", TOKENS),
        "dstate checkpoints checkpoint_batch",
        ("du ddelta dz", OUTPUT),
        "dinitial chunk ends sums",
        "dB dC dlow dA dD dbias dproj",
    ),
)

#: Blocks that fill a GPU: where fewer scan the whole time, it is cut into chunks until that many do.
ENOUGH, WANTED = 256, 1024


# Up to how many states a thread of a channel has how many, and threads of a block: csrc/selective_scan/cuda.h's with_shape.
_SHAPES = ((1, 1, 64), (4, 4, 64), (8, 4, 128), (16, 4, 192), (128, 4, 64), (256, 8, 128))


def _tiles(state: int, width: int, wide: bool) -> int:
    """Tiles of channels of a group of `width`: what csrc/selective_scan/cuda.h's Cut makes of it."""
    states, threads = (8, 64) if wide else next(shape for most, *shape in _SHAPES if state <= most)
    share = 1 << (-(-state // states) - 1).bit_length()
    return -(-width // min(64, threads // share))


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _chunk(length: int, state: int, blocks: int) -> int:
    """Steps that a block scans, from the number of blocks if each scanned all: shapes alone decide."""
    if blocks >= ENOUGH:
        return length
    return min(length, _round_up(-(-length * blocks // WANTED), plan.chunk(state)))


class _Cut:
    """How a scan is cut, and what its passes hand to each other."""

    def __init__(self, dtype, u, A, groups):
        self.batch, self.length, channels = u.shape
        self.state, self.channels, self.device, self.dtype = A.shape[1], channels, u.device, dtype
        self.per_group = _tiles(self.state, channels // groups, dtype is torch.float64)
        self.tiles = self.per_group * groups
        self.chunk = _chunk(self.length, self.state, self.batch * self.tiles)
        self.chunks = -(-self.length // self.chunk)

    def empty(self, *shape):
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def ends(self):
        """(b, chunks, n, d) and (b, chunks, d), where there is more than one chunk."""
        if self.chunks == 1:
            return None, None
        return self.empty(self.batch, self.chunks, self.state, self.channels), self.empty(self.batch, self.chunks, self.channels)


def _weights(dtype, A, D, delta_bias, delta_proj, initial_state):
    """As the kernels read them; delta_proj as (r, d), so that neighbouring channels lie side by side."""
    proj = None if delta_proj is None else delta_proj.to(dtype).t().contiguous()
    return dense(A, dtype), dense(D, dtype), dense(delta_bias, dtype), proj, dense(initial_state, dtype)


def _scan(
    dtype,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    softplus,
    delta_proj,
    index,
    starts,
    reverse,
    sequences,
    initial_state,
    scale,
    out,
    earlier,
    state,
    checkpoints,
    spacing=None,
):
    """spacing: steps between checkpoints, if not plan.chunk's."""
    weights = _weights(dtype, A, D, delta_bias, delta_proj, initial_state)
    cut = _Cut(dtype, u, A, B.shape[2])
    ends, sums = cut.ends()
    arguments = problem(dtype, u, delta, z, B, C, weights, softplus, index, starts, sequences, reverse, scale, 0)
    _forward(
        u,
        *arguments,
        *output(out, earlier),
        pointer(state),
        pointer(checkpoints),
        0 if checkpoints is None else checkpoints.stride(0),
        spacing or plan.chunk(cut.state),
        cut.chunk,
        pointer(ends),
        pointer(sums),
    )


def _scan_backward(
    dtype,
    dout,
    dstate,
    checkpoints,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    softplus,
    delta_proj,
    index,
    starts,
    reverse,
    sequences,
    initial_state,
    scale,
    du,
    du_earlier,
    ddelta,
    dB,
    dC,
    dz,
    dz_earlier,
    dA,
    dD,
    dbias,
    dproj,
    dinitial,
):
    weights = _weights(dtype, A, D, delta_bias, delta_proj, initial_state)
    cut = _Cut(dtype, u, A, B.shape[2])
    if plan.chunk(cut.state) > plan.TILE:  # forward left the states of so many too far apart
        checkpoints = cut.empty(cut.batch, -(-cut.length // plan.TILE), cut.state, cut.channels)
        _scan(
            dtype,
            u,
            delta,
            A,
            B,
            C,
            None,
            None,
            delta_bias,
            softplus,
            delta_proj,
            index,
            starts,
            reverse,
            sequences,
            initial_state,
            1.0,
            None,
            None,
            None,
            checkpoints,
            plan.TILE,
        )
    dstate = dense(dstate, dtype)
    ends, sums = cut.ends()
    rows = cut.per_group, *B.shape
    dB_parts, dC_parts = cut.empty(*rows), cut.empty(*rows)
    chunks = cut.batch, cut.chunks
    dA_parts = cut.empty(*chunks, cut.state, cut.channels)
    dD_parts, dbias_parts = (None if t is None else cut.empty(*chunks, cut.channels) for t in (D, delta_bias))
    dlow_parts = dproj_parts = None
    if delta_proj is not None:
        dlow_parts, dproj_parts = cut.empty(cut.tiles, *delta.shape), cut.empty(*chunks, delta.shape[2], cut.channels)
    arguments = problem(dtype, u, delta, z, B, C, weights, softplus, index, starts, sequences, reverse, scale, 0)
    _backward(
        u,
        *arguments,
        dout.data_ptr(),
        cuda.DTYPES[dout.dtype],
        *dout.stride(),
        pointer(dstate),
        checkpoints.data_ptr(),
        checkpoints.stride(0),
        *output(du, du_earlier),
        *output(ddelta if delta_proj is None else None),
        *output(dz, dz_earlier),
        pointer(dinitial),
        cut.chunk,
        pointer(ends),
        pointer(sums),
        *(pointer(t) for t in (dB_parts, dC_parts, dlow_parts, dA_parts, dD_parts, dbias_parts, dproj_parts)),
    )
    dB.copy_(_sum(dB_parts))
    dC.copy_(_sum(dC_parts))
    dA.copy_(dA_parts.sum((0, 1)).t())
    if delta_proj is not None:
        ddelta.copy_(_sum(dlow_parts))
        dproj.copy_(dproj_parts.sum((0, 1)).t())
    for total, parts in ((dD, dD_parts), (dbias, dbias_parts)):
        if total is not None:
            total.copy_(parts.sum((0, 1)))


def _sum(parts):
    """Over tiles of channels."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


_scans = Scans(_scan, _scan_backward)
forward, backward, forward_nd, backward_nd = _scans.forward, _scans.backward, _scans.forward_nd, _scans.backward_nd
