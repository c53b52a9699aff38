"""Packed sequences in the Triton kernels: beginnings and ends at the edges of chunks and beside them, and nothing that passes from one to another."""

import pytest
import torch

from medssm.kernels import triton

if triton.reason() is not None:
    pytest.skip(triton.reason(), allow_module_level=True)

from medssm.kernels.matrix_state import triton_carry, triton_core
from medssm.kernels.selective_scan import plan
from tests.ops.calls import DEVICE, compare, flat, permutation
from tests.ops.cases import SEQUENCE, tokens
from tests.ops.packed import single

BOUNDS = [0, 0, 1, 17, 33, 33, 40]  # chunks have 16 steps
thorough = pytest.mark.thorough


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(triton_core, "CHUNK", 16)
    monkeypatch.setattr(plan, "TILE", 8)


def packed(op: str, **options):
    bounds = torch.tensor(BOUNDS, device=DEVICE)
    return single(op, BOUNDS[-1], len(BOUNDS) - 1).with_options(cu_seqlens=bounds, **options)


def equals_the_reference(call):
    compare(call.results("triton"), call.to(torch.float64).results("reference"), 1e-5, 5e-5)


def some(*names: str) -> list:
    """The ops with a state; those that are not named in `make test-all` alone."""
    return [op if op in names else pytest.param(op, marks=thorough) for op in SEQUENCE]


@pytest.mark.parametrize("reverse", [False, pytest.param(True, marks=thorough)])
@pytest.mark.parametrize("op", some("causal_conv1d", "delta_rule"))
def test_sequences_at_the_edges_of_chunks(op, reverse):
    equals_the_reference(packed(op, reverse=reverse, order=permutation(BOUNDS[-1], 0)))


@thorough
@pytest.mark.parametrize("op", ["gated_linear_attention", "ssd", "linear_attention"])
def test_a_carry_in_two_levels(op, monkeypatch):
    monkeypatch.setattr(triton_carry, "span", lambda numbers, chunks: min(3, chunks))
    equals_the_reference(packed(op))


@pytest.mark.parametrize("op", some("causal_conv1d", "gated_linear_attention"))
def test_infinity_in_one_sequence_does_not_reach_the_others(op):
    call = packed(op)
    inside = slice(BOUNDS[2], BOUNDS[3])
    main = next(iter(tokens(call)))
    values = call.tensors[main].clone()
    values[:, inside] = torch.inf
    (want, *wanted), (got, *states) = (flat(c.run("triton")) for c in (call, call.but(**{main: values})))
    others = torch.ones(BOUNDS[-1], dtype=torch.bool)
    others[inside] = False
    assert torch.equal(got[:, others], want[:, others]) and not got[:, inside].isfinite().all()
    for one, other in zip(states, wanted, strict=True):
        rows = [i for i in range(len(BOUNDS) - 1) if i != 2]
        assert torch.equal(one[rows], other[rows])
