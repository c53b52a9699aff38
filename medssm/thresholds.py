"""Which GPU backend `auto` asks first, by size: the one table, filled from what bench/gpu.py measures.

FIRST[op]: rows (elements, backend) by rising size; the first row that holds a call's first tensor names the backend. The others follow where it
cannot serve. Not measured yet: an op that has no rows asks CUDA first, whose launches pass through no Python, and Triton where it has no CUDA kernel
or the compiled library is missing.
"""

from __future__ import annotations

FIRST: dict[str, tuple[tuple[float, str], ...]] = {}


def first(op: str, elements: int) -> str:
    """The backend to ask first for a call whose first tensor has so many elements."""
    return next((backend for most, backend in FIRST.get(op, ()) if elements <= most), "cuda")
