"""The CPU kernel of gated linear attention against its reference: every instruction set, strips of rows, blocks of lanes, tiles, starts."""

from __future__ import annotations

import itertools

import pytest
import torch

from medssm.kernels.gated_linear_attention import native, reference

TILE, EXACT = 64, 1024  # steps of a tile, and between two exact sums of the decay's gradient (csrc/gated_linear_attention/cpu_backward.cpp)


def inputs(batch, length, heads, dk, dv, per_key, dtype=torch.float64, initial=True, scale=1.0):
    g = torch.Generator().manual_seed(length * 31 + dk)
    tokens = (batch, length, heads)
    q, k, v, decay, state = (
        torch.randn(s, generator=g, dtype=torch.float64)
        for s in ((*tokens, dk), (*tokens, dk), (*tokens, dv), (*tokens, dk) if per_key else tokens, (batch, heads, dk, dv))
    )
    q, k, v, decay, state = (t.to(dtype) for t in (q, k, v, -scale * decay.abs(), state))
    return q, k, v, decay, state if initial else None


def check(tensors, tolerance, index=None, starts=None, reverse=False, with_dstate=True):
    """Outputs and all gradients equal the float64 reference's."""
    *tokens, initial = tensors
    out, state = native.forward(*tokens, 0.7, index, starts, reverse, initial, True)
    g = torch.Generator().manual_seed(5)
    dout = torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype)
    dstate = torch.randn(state.shape, generator=g, dtype=torch.float64).to(state.dtype) if with_dstate else None
    got = [out, state, *native.backward(dout, dstate, *tokens, 0.7, index, starts, reverse, initial)]
    leaves = [None if t is None else t.double().requires_grad_() for t in tensors]
    want = reference.gated_linear_attention(*leaves[:4], 0.7, index, starts, reverse, leaves[4])
    cotangents = [dout.double(), torch.zeros_like(want[1]) if dstate is None else dstate.double()]
    gradients = iter(torch.autograd.grad(want, [t for t in leaves if t is not None], cotangents))
    want = [*want, *(None if t is None else next(gradients) for t in leaves)]
    for name, a, b in zip(("out", "state", "dq", "dk", "dv", "dg", "dinitial"), got, want, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            error = (a.double() - b).abs().max() / b.abs().max().clamp_min(1e-3)
            assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("per_key", [False, True])
@pytest.mark.parametrize("dk, dv", [(1, 1), (3, 40), (8, 16), (16, 8), (17, 5), (24, 33), (40, 3)])
def test_equals_the_reference(isa, dk, dv, per_key):
    check(inputs(2, TILE + 3, 2, dk, dv, per_key), 1e-12)
    check(inputs(1, TILE, 1, dk, dv, per_key, torch.float32), 3e-6)


@pytest.mark.parametrize("length", [1, 2, TILE - 1, TILE, 2 * TILE + 1, EXACT, EXACT + 1, 2 * EXACT + 70])
@pytest.mark.parametrize("per_key", [False, True])
def test_lengths_on_both_sides_of_every_border(length, per_key):
    check(inputs(1, length, 1, 3, 2, per_key, initial=False), 1e-11)
    check(inputs(1, length, 1, 3, 2, per_key), 1e-11, reverse=True, with_dstate=False)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("per_key", [False, True])
@pytest.mark.parametrize("starts", [[0, 1, 2, 3], [0, 5], [2], [TILE], [TILE - 1, TILE + 1], [2 * TILE - 1], [*range(0, 2 * TILE, 7)]])
def test_the_state_begins_anew_at_every_start(starts, per_key, reverse):
    index = torch.randperm(2 * TILE, generator=torch.Generator().manual_seed(0))
    check(inputs(2, 2 * TILE, 1, 3, 2, per_key), 1e-12, index, torch.tensor(starts), reverse)


def test_walks_of_up_to_five_steps_with_any_starts():
    for length in range(1, 6):
        for count in range(length):
            for starts, reverse, per_key in itertools.product(itertools.combinations(range(1, length), count), (False, True), (False, True)):
                check(inputs(1, length, 1, 2, 2, per_key), 1e-12, None, torch.tensor([0, *starts]), reverse)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("per_key", [False, True])
def test_half_storage_computes_in_float32(isa, dtype, tolerance, per_key):
    check(inputs(2, 90, 2, 20, 17, per_key, dtype), tolerance)


@pytest.mark.parametrize("per_key", [False, True])
def test_the_gradient_of_the_decay_stays_right_over_a_long_walk(per_key):
    """A sum over the walk of differences that cancel: without exact sums in between its rounding would grow with the length."""
    tensors = inputs(1, 20 * EXACT, 1, 4, 4, per_key, torch.float32, initial=False, scale=5.0)[:4]
    dout = torch.randn(tensors[2].shape, generator=torch.Generator().manual_seed(5))
    *_, got, _ = native.backward(dout, None, *tensors, 0.7, None, None, False, None)
    *_, want, _ = native.backward(dout.double(), None, *(t.double() for t in tensors), 0.7, None, None, False, None)
    assert (got - want).abs().max() / want.abs().max() < 2e-6


@pytest.mark.parametrize("per_key", [False, True])
def test_a_decay_of_nothing_has_no_gradient(per_key):
    """One token and no initial state: nothing decays, whatever the gradient of the final state is."""
    q, k, v, g, _ = inputs(1, 1, 2, 64, 64, per_key, torch.float32)
    dstate = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    for decay in (0.0, -0.1, -50.0):
        dg = native.backward(torch.zeros_like(v), dstate, q, k, v, torch.full_like(g, decay), 1.0, None, None, False, None)[3]
        assert not dg.any()


@pytest.mark.parametrize("per_key", [False, True])
@pytest.mark.parametrize("initial", [False, True])
def test_the_gradient_of_a_strong_decay_is_as_small_as_it_should_be(per_key, initial):
    """Next to a final state and its gradient that are far larger."""
    *tensors, state = inputs(1, 4096, 1, 64, 64, per_key, torch.float32)
    dstate, state = torch.full((1, 1, 64, 64), 10.0), state if initial else None
    for decay in (-5.0, -12.0, -18.0):
        tensors[3] = torch.full_like(tensors[3], decay)
        got = native.backward(torch.zeros_like(tensors[2]), dstate, *tensors, 1.0, None, None, False, state)[3]
        double = [t.double() for t in tensors]
        want = native.backward(double[2] * 0, dstate.double(), *double, 1.0, None, None, False, state.double() if initial else None)[3]
        last = want[:, -1].abs().max()
        assert last > 0 and (got - want).abs().max() < 1e-5 * last
        assert (got - want)[:, :-1].abs().max() < 1e-5 * want[:, :-1].abs().max()
    tensors[3] = torch.full_like(tensors[3], -50.0)  # e^-50 is 2e-22
    assert native.backward(torch.zeros_like(tensors[2]), dstate, *tensors, 1.0, None, None, False, state)[3].abs().sum() < 1e-15


@pytest.mark.parametrize("per_key", [False, True])
def test_one_strong_decay_among_weak_ones(per_key):
    """What it separates has no part in its gradient, and the gradients of those behind it do not suffer."""
    tensors = list(inputs(1, 200, 1, 16, 16, per_key, torch.float32, initial=False, scale=0.01)[:4])
    tensors[3][:, 100] = -50.0
    dstate = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    got = native.backward(tensors[2], dstate, *tensors, 1.0, None, None, False, None)[3]
    want = native.backward(tensors[2].double(), dstate.double(), *(t.double() for t in tensors), 1.0, None, None, False, None)[3]
    assert got[:, 100].abs().max() < 1e-15 and (got - want).abs().max() < 1e-5 * want.abs().max()


def test_threads_share_the_lanes_of_a_head():
    tensors = inputs(1, 3000, 1, 16, 80, False, torch.float32)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(
            [
                *native.forward(*tensors[:4], 1.0, None, None, False, tensors[4], True),
                *native.backward(tensors[2], None, *tensors[:4], 1.0, None, None, False, tensors[4]),
            ]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
