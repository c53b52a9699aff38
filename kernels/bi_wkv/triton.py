"""Bidirectional WKV on a GPU, in Triton: cuts the walk into chunks, allocates, launches triton_forward.py and triton_backward.py.

The caller has checked shapes, dtypes and the walk.
"""

from __future__ import annotations

import functools

import torch
import triton

from medssm.kernels.bi_wkv.reference import CHUNKS
from medssm.kernels.bi_wkv.segments import bounds
from medssm.kernels.bi_wkv.triton_backward import tokens_adjoint
from medssm.kernels.bi_wkv.triton_forward import carry, local, outputs
from medssm.kernels.triton import INTERPRETED, on, plain, pointers, strided

# Steps that are in registers at a time, and channels of a program.
STEPS, CHANNELS = (2, 64) if INTERPRETED else (8, 32)
TOKENS = ("batch", "token", "channel")  # the names of strides
GROUP = 4  # chunks that `carry` reads ahead
REGISTERS = 255  # of `outputs`: without this limit the assembler for sm_80 uses 168 and spills
PROGRAMS = 4096  # of one warp: these fill a large GPU. A constant, so that every GPU gives the same bits


def forward(w, u, k, v, mode, index, starts, reverse):
    """Arguments as in `reference.bi_wkv`. Returns out (b,l,d), contiguous."""
    w, u, k, v = plain(w, u, k, v)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if out.numel():
        with on(v):
            _Pass(w, u, k, v, mode, index, starts, reverse, adjoint=False).outputs(out=out)
    return out


def backward(dout, w, u, k, v, mode, index, starts, reverse):
    """Gradients of w, u, k and v, each in its input's dtype and contiguous."""
    dout, w, u, k, v = plain(dout, w, u, k, v)
    dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (k, v))
    if not v.numel():
        return torch.zeros_like(w), torch.zeros_like(u), dk, dv
    with on(v):
        both = _Pass(w, u, k, v, mode, index, starts, reverse, adjoint=True)
        dw, du = both.outputs(dout=dout)
        both.tokens(dk, dv)
    return dw.to(w.dtype), du.to(u.dtype), dk, dv


class _Pass:
    """The launches of one call."""

    def __init__(self, w, u, k, v, mode, index, starts, reverse, adjoint):
        batch, self.length, self.channels = v.shape
        self.batch, self.k, self.v, self.index, self.adjoint = batch, k, v, index, adjoint
        self.w, self.u = (t.to(torch.float32).contiguous() for t in (w, u))
        self.upstream = mode == "upstream"
        tiles = triton.cdiv(self.channels, CHANNELS)
        self.begins, self.fresh = _chunks(bounds(starts, self.length, reverse), self.length, batch * tiles, self.upstream, str(v.device))
        self.chunks = self.fresh.shape[0]
        self.grid, self.rows = (batch * self.chunks * tiles,), (batch * tiles,)
        self.sizes = {"begins": self.begins, "length": self.length, "channels": self.channels, "chunks": self.chunks}
        self.walk = {"WALK": index is not None, "REVERSE": reverse, "K": STEPS, "TILE": CHANNELS, "num_warps": 1}
        self.slots = self.length // STEPS + self.chunks + 1

    def new(self, *shape):
        return torch.empty(shape, dtype=torch.float32, device=self.v.device)

    def carried(self, sums):
        """Turns each chunk's sums, (2 directions, fields, b, chunks, d), into the sums before it and after it."""
        for direction, of_chunks in enumerate(sums):
            carry[self.rows](
                **strided(("field",), sums, sums=of_chunks),
                w=self.w,
                begins=self.begins,
                fresh=self.fresh,
                channels=self.channels,
                chunks=self.chunks,
                GROUP=GROUP,
                TILE=CHANNELS,
                SLOPE=sums.shape[1] == 6,
                BACK=direction == 1,
                num_warps=1,
            )
        return sums

    def outputs(self, out=None, dout=None):
        """Fills out. With dout it saves what `tokens` needs instead, and returns the gradients of w and u."""
        fields, k, v, entry = 6 if self.adjoint else 4, self.k, self.v, None
        if self.chunks > 1:
            entry = self.new(2, fields, self.batch, self.chunks, self.channels)
            local[self.grid](
                **strided(TOKENS, k, k=k, v=v),
                y=v,
                w=self.w,
                **pointers(k, index=self.index),
                **strided(("direction", "field"), k, sums=entry),
                **self.sizes,
                ONES=True,
                SLOPE=self.adjoint,
                **self.walk,
            )
            self.carried(entry)
        kept = self.new(fields, self.batch, self.slots, self.channels)
        top = self.new(3, *v.shape) if self.adjoint else None
        weights = self.new(2, self.batch, self.chunks, self.channels) if self.adjoint else None
        outputs[self.grid](
            **strided(TOKENS, k, k=k, v=v, dout=dout),
            **pointers(k, w=self.w, u=self.u, index=self.index, out=out),
            **strided(("direction", "field"), k, entry=entry),
            **strided(("field", "batch"), k, kept=kept),
            **strided(("field",), k, top=top, weights=weights),
            **self.sizes,
            UPSTREAM=self.upstream,
            ENTRY=entry is not None,
            ADJOINT=self.adjoint,
            maxnreg=REGISTERS,
            **self.walk,
        )
        self.top = top
        return None if weights is None else weights.sum((1, 2)).unbind()

    def tokens(self, dk, dv):
        """The gradients of k and v, after `outputs`: the same sums over the outputs, whose keys, x and y are rows in the order of the walk."""
        k, v, entry = self.k, self.v, None
        if self.chunks > 1:
            entry = self.new(2, 4, self.batch, self.chunks, self.channels)
            keys, x, y = self.top
            local[self.grid](
                **strided(TOKENS, k, k=keys, v=x),
                y=y,
                w=self.w,
                index=keys,
                **strided(("direction", "field"), k, sums=entry),
                **self.sizes,
                ONES=False,
                SLOPE=False,
                **self.walk | {"WALK": False, "REVERSE": False},
            )
            self.carried(entry)
        kept = self.new(4, self.batch, self.slots, self.channels)
        tokens_adjoint[self.grid](
            **strided(TOKENS, k, k=k, v=v),
            **pointers(k, w=self.w, u=self.u, index=self.index, dk=dk, dv=dv),
            **strided(("field",), k, top=self.top),
            **strided(("direction", "field"), k, entry=entry),
            **strided(("field", "batch"), k, kept=kept),
            **self.sizes,
            UPSTREAM=self.upstream,
            ENTRY=entry is not None,
            **self.walk,
        )


def _chunks(ends, length, rows, upstream, device):
    """(chunks + 1,) the first step of each chunk, and the length; (chunks,) 1 where a segment begins there. A chunk may be empty."""
    if ends is None:
        return _even(length, rows, upstream, device)
    if upstream:
        size = (ends.diff() + CHUNKS - 1) // CHUNKS
        begins = torch.minimum(ends[:-1, None] + size[:, None] * torch.arange(CHUNKS, device=ends.device), ends[1:, None]).flatten()
    else:
        begins = torch.cat([ends[1:-1], torch.arange(0, length, _steps(length, rows), device=ends.device)]).sort().values
    fresh = torch.isin(begins, ends[:-1]).to(torch.int64)
    return torch.cat([begins, ends[-1:]]), fresh


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)  # kept, also for calls with gradients
def _even(length, rows, upstream, device):
    """Chunks of one segment."""
    size = -(-length // CHUNKS) if upstream else _steps(length, rows)
    begins = torch.arange(0, length + size, size, device=device).clamp(max=length)
    fresh = torch.zeros(begins.shape[0] - 1, dtype=torch.int64, device=device)
    fresh[0] = 1
    return begins, fresh


def _steps(length: int, rows: int) -> int:
    """Steps of a chunk, a multiple of STEPS. All of them if the programs of batch and channels alone fill the GPU."""
    groups = -(-length // STEPS)
    pieces = min(PROGRAMS // max(rows, 1), -(-groups // 8))
    return STEPS * -(-groups // (pieces if pieces >= 4 else 1))
