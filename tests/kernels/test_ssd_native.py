"""The CPU kernel of ssd against its reference: every instruction set, strips of rows, blocks of lanes, groups of heads, tiles, starts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from medssm.kernels.ssd import native, reference

TILE, EXACT = 64, 16  # steps of a tile, and between two exact sums of the decay's gradient (csrc/ssd/cpu_backward.cpp)
NAMES = ("dx", "ddt", "dA", "dB", "dC", "dD", "dz", "dbias", "dinitial")


def inputs(batch, length, groups, per, size, state, dtype=torch.float64, initial=True, gated=True, rate=1.0):
    """x, dt, A, B, C, D, z, dt_bias, initial_state; per: heads of a group."""
    g, heads = torch.Generator().manual_seed(length * 31 + size), groups * per
    tokens = (batch, length, heads)
    rows = (batch, length, groups, state)
    shapes = ((*tokens, size), tokens, (heads,), rows, rows, (heads, size), (*tokens, size), (heads,), (batch, heads, size, state))
    x, dt, A, B, C, D, z, bias, S = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    tensors = [t.to(dtype) for t in (x, dt, -rate * A.abs(), B, C, D, z, bias, S)]
    return [*tensors[:6], tensors[6] if gated else None, tensors[7], tensors[8] if initial else None]


def check(tensors, tolerance, index=None, starts=None, reverse=False, softplus=True, limit=(0.0, math.inf), with_dstate=True):
    """Outputs and all gradients equal the float64 reference's."""
    *given, initial = tensors
    walk = (softplus, *limit, index, starts, reverse, initial)
    out, state, y = native.forward(*given, *walk, given[6] is not None, True)
    g = torch.Generator().manual_seed(5)
    dout = torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype)
    dstate = torch.randn(state.shape, generator=g, dtype=torch.float64).to(state.dtype) if with_dstate else None
    got = [out, state, *native.backward(dout, dstate, y, *given, *walk)]
    leaves = [None if t is None else t.double().requires_grad_() for t in tensors]
    want = reference.ssd(*leaves[:8], *walk[:-1], leaves[8])
    cotangents = [dout.double(), torch.zeros_like(want[1]) if dstate is None else dstate.double()]
    gradients = iter(torch.autograd.grad(want, [t for t in leaves if t is not None], cotangents, allow_unused=True))
    want = [*want, *(None if t is None else next(gradients) for t in leaves)]
    for name, a, b in zip(("out", "state", *NAMES), got, want, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            error = (a.double() - b).abs().max() / b.abs().max().clamp_min(1e-3)
            assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("groups, per", [(1, 1), (1, 6), (2, 2)])
@pytest.mark.parametrize("size, state", [(1, 1), (3, 40), (8, 16), (16, 8), (17, 5), (24, 33), (40, 3)])
def test_equals_the_reference(isa, size, state, groups, per):
    check(inputs(2, TILE + 3, groups, per, size, state), 1e-10)
    check(inputs(1, TILE, groups, per, size, state, torch.float32, gated=False), 5e-5)  # dA and dbias are sums that cancel


@pytest.mark.parametrize("length", [1, 2, TILE - 1, TILE, 2 * TILE + 1, EXACT, EXACT + 1, 2 * EXACT + 70])
def test_lengths_on_both_sides_of_every_border(length):
    check(inputs(1, length, 1, 2, 3, 2, initial=False), 1e-10)
    check(inputs(1, length, 1, 1, 3, 2), 1e-10, reverse=True, with_dstate=False)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("starts", [[0, 1, 2, 3], [0, 5], [2], [TILE], [TILE - 1, TILE + 1], [2 * TILE - 1], [*range(0, 2 * TILE, 7)]])
def test_the_state_begins_anew_at_every_start(starts, reverse):
    index = torch.randperm(2 * TILE, generator=torch.Generator().manual_seed(0))
    check(inputs(2, 2 * TILE, 1, 2, 3, 2), 1e-10, index, torch.tensor(starts), reverse)


def test_walks_of_up_to_five_steps_with_any_starts():
    for length in range(1, 6):
        for count in range(length):
            for starts, reverse in itertools.product(itertools.combinations(range(1, length), count), (False, True)):
                check(inputs(1, length, 1, 1, 2, 2), 1e-10, None, torch.tensor([0, *starts]), reverse)


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.2, 0.8), (0.5, 0.5), (-math.inf, math.inf)])
def test_steps_are_clamped_as_the_reference_clamps_them(softplus, limit):
    check(inputs(2, 40, 1, 2, 3, 4, rate=0.2), 1e-10, softplus=softplus, limit=limit)


def test_a_step_on_its_limit_has_a_gradient():
    tensors = inputs(1, 20, 1, 1, 3, 4)
    tensors[1], tensors[7] = torch.full_like(tensors[1], 0.25), torch.full_like(tensors[7], 0.25)
    check(tensors, 1e-10, softplus=False, limit=(0.5, 1.0))
    check(tensors, 1e-10, softplus=False, limit=(0.0, 0.5))


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_half_storage_computes_in_float32(isa, dtype, tolerance):
    check(inputs(2, 90, 1, 2, 20, 17, dtype), tolerance)


@pytest.mark.parametrize("rate", [50.0, 1e6])
def test_a_decay_that_kills_the_state_leaves_no_rounding_in_its_gradient(rate):
    check(inputs(1, 200, 1, 2, 8, 8, torch.float32, rate=rate), 1e-5)


def test_the_gradient_of_the_decay_stays_right_over_a_long_walk():
    """A sum over the walk of differences that cancel: without exact sums in between its rounding would grow with the length."""
    *tensors, _ = inputs(1, 20000, 1, 2, 4, 4, torch.float32, gated=False)
    tensors[1] = tensors[1] * 0.5 - 5  # steps as Mamba has them at the start
    walk, dout = (True, 0.0, math.inf, None, None, False, None), torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(5))
    got = native.backward(dout, None, None, *tensors, *walk)
    want = native.backward(dout.double(), None, None, *(None if t is None else t.double() for t in tensors), *walk)
    for i in (1, 2, 7):
        assert (got[i] - want[i]).abs().max() / want[i].abs().max() < 2e-5, NAMES[i]


@pytest.mark.parametrize("length", [1, 500])
@pytest.mark.parametrize("initial", [False, True])
def test_the_gradient_of_a_strong_decay_is_as_small_as_it_should_be(length, initial):
    """Next to a final state and its gradient that are far larger: of A, which reaches the loss through the decays alone. Steps are 1."""
    *tensors, state = inputs(1, length, 1, 1, 64, 64, torch.float32, initial, gated=False)
    tensors[1], tensors[7] = torch.ones_like(tensors[1]), None
    dout, dstate = torch.zeros_like(tensors[0]), torch.full((1, 1, 64, 64), 10.0)
    for rate in (-5.0, -12.0, -18.0, -50.0):
        tensors[2] = torch.full_like(tensors[2], rate)
        walk = (False, 0.0, math.inf, None, None, False)
        got = native.backward(dout, dstate, None, *tensors, *walk, state)[2]
        double = [None if t is None else t.double() for t in tensors]
        want = native.backward(dout.double(), dstate.double(), None, *double, *walk, state.double() if initial else None)[2]
        if length == 1 and not initial:
            assert got == 0 and want == 0
        elif rate == -50.0:
            assert abs(got) < 1e-15
        else:
            assert abs(got - want) < 1e-5 * abs(want)


@pytest.mark.parametrize("heads, size, state", [(1, 80, 40), (8, 8, 8)])
def test_threads_share_the_lanes_of_a_head_and_the_heads_of_a_group(heads, size, state):
    *tensors, initial = inputs(1, 3000, 1, heads, size, state, torch.float32)
    walk, results = (True, 0.0, math.inf, None, None, False, initial), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        out, state, y = native.forward(*tensors, *walk, True, True)
        results.append([out, state, y, *native.backward(out, None, y, *tensors, *walk)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
