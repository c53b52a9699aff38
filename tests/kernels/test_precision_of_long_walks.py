"""Over 32,768 tokens the CPU kernels in float32 stay within 1e-5 of float64 in the outputs and 1e-4 in every gradient, relative to the largest."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn.functional import logsigmoid, normalize

from medssm import ops

LENGTH = 32768


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heads(width=16):
    return {name: draw(1, LENGTH, 2, width, seed=seed) for seed, name in enumerate(("q", "k", "v"))}


def delta():
    tensors = heads()
    return tensors | {"k": normalize(tensors["k"], dim=-1), "beta": draw(1, LENGTH, 2, seed=3).sigmoid()}


def per_key():
    return {"g": logsigmoid(draw(1, LENGTH, 2, 16, seed=4) + 3)}


def replacement():
    """RWKV-7's: a key is taken away in part."""
    kappa, rate = normalize(draw(1, LENGTH, 2, 16, seed=5), dim=-1), draw(1, LENGTH, 2, 16, seed=6).sigmoid()
    return {"erase": kappa, "erase_out": rate * kappa, "beta": torch.ones(1, LENGTH, 2)}


def ssd():
    return {
        "x": draw(1, LENGTH, 2, 16, seed=0),
        "dt": draw(1, LENGTH, 2, seed=1),
        "A": torch.tensor([-1.0, -16.0]),
        "B": draw(1, LENGTH, 1, 16, seed=2),
        "C": draw(1, LENGTH, 1, 16, seed=3),
        "D": draw(2, seed=4),
        "z": draw(1, LENGTH, 2, 16, seed=5),
        "dt_bias": draw(2, seed=6) - 4,
    }


CASES = {
    "linear_attention": (ops.linear_attention, heads),
    "linear_attention, causal": (partial(ops.linear_attention, causal=True), heads),
    "decay per head": (ops.gated_linear_attention, lambda: heads() | {"g": logsigmoid(draw(1, LENGTH, 2, seed=3) + 3)}),
    "decay per key": (ops.gated_linear_attention, lambda: heads() | {"g": logsigmoid(draw(1, LENGTH, 2, 16, seed=3) + 3)}),
    "delta_rule": (ops.delta_rule, delta),
    "delta_rule, decay per key": (ops.delta_rule, lambda: delta() | per_key()),
    "delta_rule, RWKV-7": (partial(ops.delta_rule, erase_first=True), lambda: delta() | per_key() | replacement()),
    "ssd": (partial(ops.ssd, dt_softplus=True), ssd),
}


@pytest.mark.parametrize("case", CASES)
def test_float32_keeps_its_digits(case):
    op, make = CASES[case]
    tensors = make()

    def run(dtype):
        given = {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}
        out = op(**given, backend="native")
        gradients = torch.autograd.grad(out, list(given.values()), draw(*out.shape, seed=9).to(dtype))
        return {"out": out.detach(), **dict(zip(given, gradients, strict=True))}

    single, double = run(torch.float32), run(torch.float64)
    for name, want in double.items():
        error = float((single[name] - want).abs().max() / want.abs().max())
        assert error < (1e-5 if name == "out" else 1e-4), f"{name}: {error:.1e}"
