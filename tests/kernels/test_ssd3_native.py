"""The CPU kernel of ssd3 (one rank, adjacent pairs) against the reference: every instruction set, blocks of lanes, groups, borders, states."""

from __future__ import annotations

import pytest
import torch

from medssm import ops
from medssm.kernels.ssd3 import native

TILE = 64  # steps of a tile
NAMES = ("x", "dt", "A", "B", "C", "trap", "angles", "D", "z", "B_bias", "C_bias")


def inputs(length, batch=1, groups=1, per=2, size=3, state=4, angles=2, shared=False, plain=False, rows=None):
    """The tensors of a call by name, and its initial states; plain: without what is optional; rows: of the states."""
    g, heads = torch.Generator().manual_seed(length * 31 + size), groups * per
    tokens = (batch, length, heads)
    turned = ((batch, length) if shared else tokens, angles)
    shapes = ((*tokens, size), tokens, tokens, *((batch, length, groups, state),) * 2, tokens, (*turned[0], angles))
    optional = () if plain else ((heads,), (*tokens, size), (heads, state), (heads, state))
    drawn = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in (*shapes, *optional)]
    drawn[1], drawn[2] = torch.sigmoid(drawn[1]), -drawn[2].abs()
    shapes = (heads, angles), (heads, size, state), (1, heads, state), (heads, size)
    return dict(zip(NAMES, drawn, strict=False)), [torch.randn(rows or batch, *shape, generator=g, dtype=torch.float64) for shape in shapes]


def check(given, tolerance=1e-10, dtype=torch.float64, initial=True, **options):
    """Outputs, states and all gradients equal the float64 reference's."""
    tensors, states = given

    def run(backend, dtype):
        leaves = {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}
        before = [t.to(dtype).requires_grad_() for t in states] if initial else None
        out, last = ops.ssd3(**leaves, initial_state=before, return_final_state=True, backend=backend, **options)
        g = torch.Generator().manual_seed(5)
        cotangents = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in (out, *last)]
        gradients = torch.autograd.grad([out, *last], [*leaves.values(), *(before or [])], cotangents)
        return [out, *last, *gradients]

    names = ["out", "angle", "S", "k", "v", *tensors, *(f"initial {i}" for i in range(4))]
    for name, got, want in zip(names, run("native", dtype), run("reference", torch.float64), strict=False):
        error = (got.double() - want).abs().max() / want.abs().max().clamp_min(1e-3)
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("groups, per", [(1, 1), (2, 2)])
@pytest.mark.parametrize("size, state, angles", [(1, 2, 1), (3, 41, 20), (16, 8, 3), (17, 34, 9)])
def test_equals_the_reference(isa, size, state, angles, groups, per):
    given = inputs(TILE + 3, 2, groups, per, size, state, angles)
    check(given)
    check(given, 1e-5, torch.float32)


def test_nothing_optional_and_angles_that_heads_share(isa):
    check(inputs(TILE + 3, 2, plain=True), initial=False)
    check(inputs(TILE + 3, 2, shared=True), reverse=True)


@pytest.mark.parametrize("length", [1, 2, TILE - 1, TILE, 3 * TILE + 1])
def test_lengths_on_both_sides_of_every_border(length):
    check(inputs(length))
    check(inputs(length), reverse=True, initial=False)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bounds", [[0, 5], [0, 0, TILE, TILE, 2 * TILE + 5], [0, TILE - 1, TILE + 1, 2 * TILE + 5, 2 * TILE + 5]])
def test_packed_sequences_in_any_order(bounds, reverse):
    order = torch.randperm(bounds[-1], generator=torch.Generator().manual_seed(0))
    check(inputs(bounds[-1], rows=len(bounds) - 1), order=order, reverse=reverse, cu_seqlens=torch.tensor(bounds))


def test_any_number_of_threads_gives_the_same_bits():
    tensors, states = inputs(700, groups=1, per=4, size=40, state=70, angles=30)

    def run(threads):
        torch.set_num_threads(threads)
        leaves = [t.float().requires_grad_() for t in (*tensors.values(), *states)]
        given = dict(zip(tensors, leaves, strict=False))
        out, last = ops.ssd3(**given, initial_state=leaves[len(tensors) :], return_final_state=True, backend="native")
        return [out, *last, *torch.autograd.grad([out, *last], leaves, [torch.ones_like(t) for t in (out, *last)])]

    before = torch.get_num_threads()
    try:
        assert all(torch.equal(a, b) for a, b in zip(run(1), run(5), strict=True))
    finally:
        torch.set_num_threads(before)


def test_the_angle_of_a_long_walk_is_that_of_exact_numbers():
    """A float32 sum of 50,000 turns would have lost 4 digits."""
    tensors, _ = inputs(50_000, plain=True, per=1, size=1, state=2, angles=1)
    tensors = {name: t.float() for name, t in tensors.items()}
    _, (angle, *_) = ops.ssd3(**tensors, return_final_state=True, backend="native")
    exact = (torch.pi * torch.tanh(tensors["angles"].double()) * tensors["dt"].double().unsqueeze(-1)).sum(1) % (2 * torch.pi)
    assert (angle.double() - exact).abs().max() < 2e-4


def test_what_the_kernel_leaves_to_gated_linear_attention():
    arguments = {"B": torch.empty(1, 5, 1, 1, 4), "x": torch.empty(1, 5, 1, 3), "pairs": "adjacent", "mimo_x": None, "mimo_z": None, "mimo_o": None}
    assert native._has_kernel(arguments)
    for other in ({"B": torch.empty(1, 5, 2, 1, 4)}, {"pairs": "halves"}, {"mimo_o": torch.empty(1, 1, 3)}, {"x": torch.empty(1, 0, 1, 3)}):
        assert not native._has_kernel(arguments | other)
