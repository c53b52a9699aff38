"""The CPU kernel of causal_conv1d against its reference: every instruction set, walks with starts, task and tile borders."""

from __future__ import annotations

import itertools

import pytest
import torch

from medssm.kernels.causal_conv1d import native, reference

STEPS = 128  # of one task of the kernel (csrc/causal_conv1d/cpu.cpp): lengths on both sides of it


def inputs(batch, length, channels, width, dtype=torch.float64, initial=True):
    g = torch.Generator().manual_seed(length * 31 + width)
    shapes = ((batch, length, channels), (channels, width), (channels,), (batch, channels, width - 1))
    x, weight, bias, state = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    return x, weight, bias, state if initial else None


def check(x, weight, bias, activation, index, starts, reverse, initial, dout, dstate, tolerance):
    """Outputs and all gradients equal the float64 reference's."""
    out, state = native.forward(x, weight, bias, activation, index, starts, reverse, initial, True)
    got = [out, state, *native.backward(dout, dstate, x, weight, bias, activation, index, starts, reverse, initial)]
    leaves = [None if t is None else t.double().requires_grad_() for t in (x, weight, bias, initial)]
    want = reference.causal_conv1d(*leaves[:3], activation, index, starts, reverse, leaves[3])
    given = [t for t in leaves if t is not None]
    cotangents = [dout.double(), torch.zeros_like(want[1]) if dstate is None else dstate.double()]
    gradients = iter(torch.autograd.grad(want, given, cotangents, allow_unused=True, materialize_grads=True))
    want = [*want, *(None if t is None else next(gradients) for t in leaves)]
    for name, g, w in zip(("out", "state", "dx", "dweight", "dbias", "dinitial"), got, want, strict=True):
        assert (g is None) == (w is None), name
        if g is not None and g.numel():
            error = (g.double() - w).abs().max() / w.abs().max().clamp_min(1e-3)
            assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("length", [1, 3, 4, 5, STEPS - 1, STEPS, 2 * STEPS + 3])
def test_equals_the_reference(isa, width, length):
    x, weight, bias, initial = inputs(2, length, 21, width)
    dout, dstate = torch.randn_like(x), torch.randn_like(initial)
    check(x, weight, bias, "silu", None, None, False, initial, dout, dstate, 1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("starts", [[0, 1, 2, 3, 4], [0, 5], [2], [STEPS], [STEPS - 1, STEPS + 1], [2 * STEPS - 1], [*range(0, 2 * STEPS, 7)]])
def test_taps_begin_anew_at_every_start(starts, reverse):
    length = 2 * STEPS
    x, weight, bias, initial = inputs(1, length, 5, 4)
    index = torch.randperm(length, generator=torch.Generator().manual_seed(0))
    check(x, weight, bias, "silu", index, torch.tensor(starts), reverse, initial, torch.randn_like(x), torch.randn_like(initial), 1e-12)


def test_walks_of_up_to_seven_steps_with_any_starts():
    """Every set of starts of a short walk: all that can overlap with a tile, the initial state and the final one."""
    x, weight, bias, initial = inputs(1, 7, 2, 4)
    dout, dstate = torch.randn_like(x), torch.randn_like(initial)
    for length in range(1, 8):
        for count in range(length):
            for starts, reverse in itertools.product(itertools.combinations(range(1, length), count), (False, True)):
                starts = torch.tensor([0, *starts])
                check(x[:, :length], weight, bias, None, None, starts, reverse, initial, dout[:, :length], dstate, 1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
@pytest.mark.parametrize("channels", [1, 16, 40, 300])
def test_storage_types_compute_in_float32(isa, dtype, tolerance, channels):
    x, weight, bias, initial = inputs(2, 150, channels, 4, dtype)
    dout = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    check(x, weight, bias, "silu", None, None, False, initial, dout, torch.ones_like(initial), tolerance)


def test_absent_arguments():
    x, weight, _, _ = inputs(2, 70, 9, 3)
    check(x, weight, None, None, None, None, False, None, torch.randn_like(x), None, 1e-12)
    out, state = native.forward(x, weight, None, None, None, None, False, None, False)
    assert state is None and torch.isfinite(out).all()


@pytest.mark.parametrize("dstate", [None, torch.ones(2, 5, 3)])
def test_an_empty_walk_hands_the_state_on(dstate):
    x, weight, bias, initial = inputs(2, 0, 5, 4, torch.float32)
    out, state = native.forward(x, weight, bias, None, None, None, False, initial, True)
    assert out.shape == (2, 0, 5) and torch.equal(state, initial) and state.data_ptr() != initial.data_ptr()
    _, dweight, dbias, dinitial = native.backward(out, dstate, x, weight, bias, None, None, None, False, initial)
    assert not dweight.any() and not dbias.any()
    assert torch.equal(dinitial, torch.zeros_like(initial) if dstate is None else dstate)


def test_the_same_bits_for_any_number_of_threads():
    x, weight, bias, initial = inputs(3, 700, 40, 4, torch.float32)
    dout = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        arguments = (x, weight, bias, "silu", None, None, False, initial)
        results.append([*native.forward(*arguments, True), *native.backward(dout, None, *arguments)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
