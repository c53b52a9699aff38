"""How a scan is cut along time. Every backend and the fake kernels of the operators must agree on it. Shapes alone decide."""

from __future__ import annotations

TILE = 64  # steps between checkpoints, for at most 16 states


def chunk(state: int) -> int:
    """Steps between two checkpoints of the state: 64 ceil(n / 16), so that all checkpoints take at most a quarter of u's size in float32."""
    return TILE * -(-state // 16)


def chunks(length: int, state: int) -> int:
    """How many checkpoints of the state a forward saves."""
    return -(-length // chunk(state))


# Programs of one warp that fill a large GPU, some 16 on each multiprocessor. A constant, so that every GPU gives the same bits.
PROGRAMS = 2048
# With fewer chunks, reading everything twice costs more than it gains.
FEWEST = 4


def steps(programs: int, length: int, state: int) -> int:
    """Steps that a program on a GPU walks, a multiple of `chunk`. All of them if the `programs` of batch and channels alone fill the GPU."""
    pieces = min(PROGRAMS // max(programs, 1), chunks(length, state))
    return chunk(state) * -(-chunks(length, state) // (pieces if pieces >= FEWEST else 1))
