"""Which GPU backend `auto` asks first, by size: the one table, filled from what bench/gpu.py measures.

FIRST[op]: rows (elements, backend) by rising size; the first row that holds a call's first tensor names the backend. The others follow where it
cannot serve. Not measured yet: every size asks CUDA first, whose launches pass through no Python, and Triton where the compiled library is missing.
"""

from __future__ import annotations

import math

FIRST: dict[str, tuple[tuple[float, str], ...]] = {
    "selective_scan": ((math.inf, "cuda"),),
    "selective_scan_nd": ((math.inf, "cuda"),),
    "causal_conv1d": ((math.inf, "cuda"),),
    "depthwise_conv": ((math.inf, "cuda"),),
    "delta_rule": ((math.inf, "triton"),),
    "bi_wkv": ((math.inf, "triton"),),
    "linear_attention": ((math.inf, "triton"),),
    "ssd": ((math.inf, "triton"),),
    "gated_linear_attention": ((math.inf, "triton"),),
}


def first(op: str, elements: int) -> str:
    """The backend to ask first for a call whose first tensor has so many elements."""
    return next(backend for most, backend in FIRST[op] if elements <= most)
