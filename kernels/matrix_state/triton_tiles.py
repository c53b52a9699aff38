"""Loads that the Triton kernels of the matrix-state recurrences share: segments, log decays, and tiles that are multiplied as they are loaded."""

# ruff: noqa: SIM108 (Triton does not compile every conditional expression)

from __future__ import annotations

import triton
import triton.language as tl

from medssm.kernels.triton_tiles import STRONGEST, tile

NONE, HEAD, KEY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # log decays: none, one a head, one a head and key


@triton.jit
def segment_of(segment, step, length, STARTS: tl.constexpr):
    """How often the state has begun anew up to each step; steps out of range count as the nearest in range."""
    if STARTS:
        return tl.load(segment + tl.minimum(tl.maximum(step, 0), length - 1))
    return step * 0


@triton.jit
def log_decays(g, token, live, keys, here, g_token, DECAY: tl.constexpr):
    """(steps,), or (steps, keys) where the decay is per key; 0 where not live."""
    if DECAY == KEY:
        values = tile(g, token * g_token, keys, live, here)
    else:
        values = tl.load(g + token * g_token, mask=live, other=0.0).to(tl.float32)
    return tl.maximum(values, STRONGEST)


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def stepped_tile(pointer, rows, cols, live, here, steps, of_token, STEPS: tl.constexpr):
    """A tile; with STEPS each token's row times its step."""
    values = tile(pointer, rows, cols, live, here)
    if STEPS:
        values *= tl.load(steps + of_token, mask=live, other=0.0)[:, None]
    return values


@triton.jit
def gated_tile(pointer, rows, cols, live, here, z, z_rows, GATE: tl.constexpr):
    """A tile; with GATE times silu(z), whose rows are at z_rows."""
    values = tile(pointer, rows, cols, live, here)
    if GATE:
        values *= silu(tile(z, z_rows, cols, live, here))
    return values
