"""Rows of packed sequences: each op with cu_seqlens, against the same tokens as one sequence by the same kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import logsigmoid, normalize

from medssm import ops
from medssm.bench.measure import Side
from medssm.bench.row import OURS, Row, call
from medssm.bench.scans import scan_inputs

WHOLE = "one sequence"


def bounds(length: int, sequences: int) -> torch.Tensor:
    """Random ends of so many sequences."""
    cuts = torch.randperm(length - 1, generator=torch.Generator().manual_seed(0))[: sequences - 1] + 1
    return torch.cat([torch.tensor([0]), cuts.sort().values, torch.tensor([length])])


def _sides(
    op: Callable[..., torch.Tensor], make: Callable[[int], dict[str, torch.Tensor]], length: int, sequences: int, grad: bool
) -> dict[str, Side]:
    tensors = {name: t.requires_grad_(grad) for name, t in make(length).items()}
    whole = partial(op, backend="native")
    return {OURS: call(partial(whole, cu_seqlens=bounds(length, sequences)), tensors), WHOLE: call(whole, tensors)}


def _draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _scan(length: int) -> dict[str, torch.Tensor]:
    return scan_inputs(1, 96, length, 16)


def _causal(length: int) -> dict[str, torch.Tensor]:
    return {"x": _draw(1, length, 192, seed=0), "weight": _draw(192, 4, seed=1), "bias": _draw(192, seed=2)}


def _heads(length: int, heads: int = 4, width: int = 64) -> dict[str, torch.Tensor]:
    return {name: _draw(1, length, heads, width, seed=seed) for seed, name in enumerate("qkv")}


def _gated(length: int, per_key: bool = False) -> dict[str, torch.Tensor]:
    tensors = _heads(length)
    return tensors | {"g": logsigmoid(_draw(*tensors["k"].shape[: 4 if per_key else 3], seed=3) + 3)}


def _delta(length: int) -> dict[str, torch.Tensor]:
    tensors = _gated(length)
    return tensors | {"k": normalize(tensors["k"], dim=-1), "beta": _draw(1, length, 4, seed=4).sigmoid()}


def _ssd(length: int, heads: int = 4, width: int = 64, state: int = 64) -> dict[str, torch.Tensor]:
    tokens = {"x": _draw(1, length, heads, width, seed=0), "dt": _draw(1, length, heads, seed=1), "z": _draw(1, length, heads, width, seed=2)}
    tokens |= {"B": _draw(1, length, 1, state, seed=3), "C": _draw(1, length, 1, state, seed=4)}
    return tokens | {"A": -torch.linspace(1, 16, heads), "D": _draw(heads, seed=5), "dt_bias": _draw(heads, seed=6) - 4}


_KINDS: dict[str, tuple[str, Callable[..., torch.Tensor], Callable[[int], dict[str, torch.Tensor]]]] = {
    "scan": ("selective_scan, 96 channels, state 16", partial(ops.selective_scan, delta_softplus=True), _scan),
    "causal": ("causal_conv1d of 4 taps with silu, 192 channels", partial(ops.causal_conv1d, activation="silu"), _causal),
    "linear-attention": ("linear_attention, causal, 4 heads of 64", partial(ops.linear_attention, causal=True), _heads),
    "gla": ("gated_linear_attention, decay per head, 4 heads of 64", ops.gated_linear_attention, _gated),
    "gla-keys": ("gated_linear_attention, decay per key, 4 heads of 64", ops.gated_linear_attention, partial(_gated, per_key=True)),
    "delta": ("delta_rule with decay, 4 heads of 64", ops.delta_rule, _delta),
    "ssd": ("ssd, 4 heads of 64, state 64", partial(ops.ssd, dt_softplus=True), _ssd),
}


def _rows(length: int, sequences: int) -> dict[str, Row]:
    rows = {}
    for name, (title, op, make) in _KINDS.items():
        for grad in (False, True):
            what = "forward and backward" if grad else "forward"
            text = f"{sequences} packed sequences of {length:,} tokens together: {title}, {what}"
            rows[f"packed-{name}" + "-train" * grad] = Row(text, partial(_sides, op, make, length, sequences, grad), limit=1.0, kept=True)
    return rows


ROWS = _rows(32768, 64)
QUICK = {name: row for name, row in _rows(256, 4).items() if name == "packed-scan-train"}
