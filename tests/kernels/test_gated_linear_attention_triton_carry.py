"""The carry of the matrix-state recurrences in two levels: alone, and under every op that has it, cut at sizes where one level would do."""

import pytest
import torch

from medssm.kernels import triton

if triton.reason() is not None:
    pytest.skip(triton.reason(), allow_module_level=True)

from test_gated_linear_attention_triton import compare_with_the_reference

from medssm.kernels.matrix_state import triton_carry, triton_core
from tests.ops.calls import compare
from tests.ops.cases import example


@pytest.fixture
def cut(monkeypatch):
    """Cuts every carry in spans of so many chunks; returns the list of what was cut."""
    cuts = []

    def into(length):
        def span(numbers, chunks):
            cuts.append((length, chunks))
            return min(length, chunks)

        monkeypatch.setattr(triton_carry, "span", span)
        cuts.clear()
        return cuts

    return into


def recurrence(states, decays, backward):
    """What carry_over makes of states, in float64."""
    states, chunks = states.double(), decays.shape[1]
    decays = decays.double().reshape(*decays.shape[:2], -1, 1)
    for c in reversed(range(chunks)) if backward else range(chunks):
        before, after = (c + 1, c) if backward else (c, c + 1)
        states[:, after] += decays[:, c] * states[:, before]
    return states


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("decay", ["none", "head", "key"])
@pytest.mark.parametrize("chunks, length", [(7, 3), (5, 4), *(pytest.param(*sizes, marks=pytest.mark.thorough) for sizes in ((37, 16), (9, 1)))])
def test_spans_equal_one_level_and_the_recurrence(chunks, length, decay, backward, cut):
    """Of 65 numbers, a tile and one; without decays, 0 where the walk begins anew."""
    generator = torch.Generator().manual_seed(chunks)
    states = torch.randn((2, chunks + 1, 5, 13), generator=generator).to(triton.DEVICE)
    decays = torch.rand((2, chunks, *([5] if decay == "key" else [])), generator=generator).to(triton.DEVICE)
    if decay == "none":
        decays = (decays > 0.3).float()
    want, found = recurrence(states, decays, backward), {}
    for spans in (length, chunks):
        assert cut(spans) == []
        found[spans] = states.clone()
        triton_carry.carry_over(found[spans], decays, backward)
        assert (found[spans].double() - want).abs().max() < 1e-6 * want.abs().max()
    assert (found[length] - found[chunks]).abs().max() < 1e-6 * want.abs().max()
    first = [-1 if backward else 0]
    assert torch.equal(found[length][:, first], states[:, first])


def test_decays_that_vanish_over_a_span_forget_what_was_before(cut):
    cut(4)
    states, decays = torch.randn(1, 13, 3, 3, device=triton.DEVICE), torch.full((1, 12), 1e-30, device=triton.DEVICE)
    states[:, 0] = 1e30
    want = recurrence(states, decays, False)
    triton_carry.carry_over(states, decays)
    assert (states.double() - want)[:, 1:].abs().max() < 1e-6 * want[:, 1:].abs().max()


@pytest.mark.parametrize("per_key", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_starts_inside_and_at_the_edges_of_chunks_and_spans(per_key, reverse, cut, monkeypatch):
    """9 chunks of 16 steps, in spans of 48."""
    monkeypatch.setattr(triton_core, "CHUNK", 16)
    cuts = cut(3)
    compare_with_the_reference(133, 1, 5, 7, per_key, [0, 16, 20, 48, 64, 97] if per_key else [0, 33, 112, 132], reverse)
    assert (3, 9) in cuts


@pytest.mark.parametrize("strongest", [-50.0, float("-inf")])
def test_decays_that_forget_everything(strongest, cut, monkeypatch):
    monkeypatch.setattr(triton_core, "CHUNK", 16)
    cut(2)
    compare_with_the_reference(100, 1, 20, 5, True, strongest=strongest)


@pytest.mark.parametrize(
    "op, options",
    [
        ("ssd", {"reverse": True}),
        *(pytest.param(*of, marks=pytest.mark.thorough) for of in (("gated_linear_attention", {}), ("linear_attention", {"causal": True}))),
    ],
)
def test_ops_whose_carry_is_cut_equal_the_reference(op, options, cut, monkeypatch):
    """With every option, the initial and final states' gradients too."""
    monkeypatch.setattr(triton_core, "CHUNK", 16)
    call = example(op, 35).with_options(order=torch.randperm(35, generator=torch.Generator().manual_seed(0)), **options)
    call = call.with_options(order=call.options["order"].to(triton.DEVICE)).but(**{name: t.to(triton.DEVICE) for name, t in call.tensors.items()})
    cuts = cut(2)
    got = call.results("triton")
    assert (2, 3) in cuts
    compare(got, call.to(torch.float64).results("reference"), 2e-6, 1e-5)


def test_there_are_two_levels_where_one_leaves_a_gpu_idle_and_the_chunks_are_many():
    assert triton_carry.span(4 * 32 * 32, 4096) == 256
    assert triton_carry.span(4 * 32 * 32, triton_carry.FEWEST - 1) == triton_carry.FEWEST - 1
    assert triton_carry.span(4 * 64 * 64, 4096) == 4096


@pytest.mark.thorough
def test_two_levels_uncut():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn((1, triton_carry.FEWEST + 6, 3, 4), generator=generator).to(triton.DEVICE)
    decays = torch.rand((1, triton_carry.FEWEST + 5, 3), generator=generator).to(triton.DEVICE)
    want = recurrence(states, decays, True)
    triton_carry.carry_over(states, decays, True)
    assert (states.double() - want).abs().max() < 1e-6 * want.abs().max()


@pytest.mark.parametrize("numbers", [1, 96, 4096, 10_000, 10_922])
@pytest.mark.parametrize("chunks", [1024, 1025, 4097, 100_000])
def test_spans_fill_a_gpu_unless_they_would_be_short(numbers, chunks):
    length = triton_carry.span(numbers, chunks)
    spans = -(-chunks // length)
    assert spans > 2 and length % triton_carry.GROUP == 0 and length >= triton_carry.SHORTEST
    assert length == triton_carry.SHORTEST or 2 * triton_carry.IN_FLIGHT < 4 * triton_carry.GROUP * numbers * spans <= 4 * triton_carry.IN_FLIGHT
