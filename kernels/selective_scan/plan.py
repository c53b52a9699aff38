"""How a scan is cut along time: what every backend and the operators' fake kernels must agree on. Shapes alone decide."""

from __future__ import annotations

TILE = 64  # steps between checkpoints, for at most 16 states


def chunk(state: int) -> int:
    """Steps between two checkpoints of the state: 64 ceil(n / 16), so that all take at most a quarter of u's size in float32."""
    return TILE * -(-state // 16)


def chunks(length: int, state: int) -> int:
    """How many checkpoints of the state a forward saves."""
    return -(-length // chunk(state))
