"""What every Triton kernel of the matrix-state recurrences does: find a chunk's segment, load its log decays, load tiles multiplied by something."""

# ruff: noqa: SIM108 (Triton does not compile every conditional expression)

from __future__ import annotations

import triton
import triton.language as tl

from medssm.kernels.triton_tiles import STRONGEST, tile

NONE, HEAD, KEY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # decays: none, one a head, one a head and key
BY_NOTHING, BY_STEPS, BY_GATE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what a tile is multiplied by as it is loaded


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
def scaled_tile(pointer, token, step, cols, live, here, steps, of_steps, z, z_token, BY: tl.constexpr):
    """A tile times nothing, or each token's step, or silu(z)."""
    values = tile(pointer, token * step, cols, live, here)
    if BY == BY_STEPS:
        values *= tl.load(steps + of_steps, mask=live, other=0.0)[:, None]
    if BY == BY_GATE:
        values *= silu(tile(z, token * z_token, cols, live, here))
    return values
