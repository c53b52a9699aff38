"""Which GPU backend `auto` asks first, by size: the one table.

FIRST[op]: rows (elements, backend) by rising size; the first row that holds a call's first tensor names the backend. The others follow where it
cannot serve. No GPU has measured it yet: bench/gpu.py does. Until then it follows docs/gpu-predicted.md, where both backends of an op are counted.
An op that has no rows asks CUDA first, whose launches pass through no Python, and Triton where it has no CUDA kernel or the compiled library is
missing.
"""

from __future__ import annotations

# Selective scan, counted for sm_90: CUDA 21.3 ps for a token and channel forward, Triton 10.7; backward 52.4 and 26.3. Triton's three launches take
# some 20 microseconds of Python each (assumed), which these 10.6 ps outweigh from about 2**22 elements on.
_SCAN = ((2.0**22, "cuda"), (float("inf"), "triton"))

FIRST: dict[str, tuple[tuple[float, str], ...]] = {"selective_scan": _SCAN, "selective_scan_nd": _SCAN}


def first(op: str, elements: int) -> str:
    """The backend to ask first for a call whose first tensor has so many elements."""
    return next((backend for most, backend in FIRST.get(op, ()) if elements <= most), "cuda")
