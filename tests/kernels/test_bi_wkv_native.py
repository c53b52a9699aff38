"""The CPU kernel of bi_wkv against its reference: every instruction set, tile and chunk borders, segments, keys that no one shift serves."""

from __future__ import annotations

import pytest
import torch

from medssm.kernels.bi_wkv import native, reference

TILE = 32  # steps (csrc/bi_wkv/problem.h)


def inputs(length, channels=19, batch=2, decay=0.03, spread=1.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(length)
    shapes = ((channels,), (channels,), (batch, length, channels), (batch, length, channels))
    w, u, k, v = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    return [t.to(dtype) for t in (decay * w, u, spread * k, v)]


def check(tensors, mode, tolerance, index=None, starts=None, reverse=False):
    """The output and all gradients equal the float64 reference's."""
    dout = torch.randn(tensors[3].shape, generator=torch.Generator().manual_seed(1)).to(tensors[3])
    got = [native.forward(*tensors, mode, index, starts, reverse), *native.backward(dout, *tensors, mode, index, starts, reverse)]
    leaves = [t.double().requires_grad_() for t in tensors]
    out = reference.bi_wkv(*leaves, mode, index, starts, reverse)
    want = [out, *torch.autograd.grad(out, leaves, dout.double(), allow_unused=True, materialize_grads=True)]
    for name, g, w in zip(("out", "dw", "du", "dk", "dv"), got, want, strict=True):
        error = (g.double() - w).abs().max() / w.abs().max().clamp_min(0.1)
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("mode", ["exact", "upstream"])
@pytest.mark.parametrize("length", [1, 2, TILE - 1, TILE, TILE + 1, 2 * TILE, 3 * TILE + 5, 197])
def test_equals_the_reference(isa, mode, length):
    check(inputs(length), mode, 1e-11)
    check(inputs(length, dtype=torch.float32), mode, 2e-5)


def test_chunks_of_several_tiles(isa):
    """Mode "upstream" cuts 1100 steps into chunks of 35: the last is shorter, and has fewer tiles."""
    check(inputs(1100, channels=3, batch=1, decay=0.01), "upstream", 1e-11)


@pytest.mark.parametrize("mode", ["exact", "upstream"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("starts", [[0, 1, 2, 3], [0, TILE], [0, TILE - 1, TILE + 1], [*range(0, 80, 7)]])
def test_segments_begin_anywhere(mode, starts, reverse):
    index = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    check(inputs(80, channels=5), mode, 1e-11, index, torch.tensor(starts), reverse)


@pytest.mark.parametrize("decay, spread", [(3.0, 1.0), (0.01, 40.0), (-3.0, 10.0), (0.7, 10.0)])
def test_keys_and_decays_of_any_size(isa, decay, spread):
    check(inputs(150, decay=decay, spread=spread), "exact", 1e-10)


def test_a_few_heavy_keys_among_level_ones(isa):
    """Tiles with one shift beside tiles without, both ways."""
    tensors = inputs(260, batch=1)
    tensors[2][:, 70], tensors[2][:, 190:] = 90.0, tensors[2][:, 190:] - 60.0
    check(tensors, "exact", 1e-10)


def test_long_sums_keep_float32s_precision():
    """What matters is the distance of 16384 steps: a recurrence that rounds at each one loses three digits of its weights."""
    w, u, k, v = inputs(16384, channels=4, batch=1, decay=5 / 16384, dtype=torch.float32)
    k[:, 0] = 12.0
    got = native.forward(w, u, k, v, "exact", None, None, False)
    want = native.forward(*(t.double() for t in (w, u, k, v)), "exact", None, None, False)
    assert (got - want).abs().max() / want.abs().max() < 3e-6


@pytest.mark.parametrize("mode", ["exact", "upstream"])
@pytest.mark.parametrize("mean, spread, keys", [(0.0, 1.0, 0.0), (1.0, 1.0, 0.0), (0.0, 0.01, 3.7), (0.0, 12.0, 0.0)])
def test_float32_at_16384_tokens(isa, mode, mean, spread, keys):
    """Decay and bonus scaled by the length. Values and gradients with a mean of their own; keys about equal, each may be the heaviest; keys that
    no one shift serves."""
    length = 16384
    w, u, k, v = inputs(length, channels=5, batch=1, decay=1 / length, spread=spread, dtype=torch.float32)
    tensors = [w, u / length, k + keys, v + mean]
    dout = mean + torch.randn(v.shape, generator=torch.Generator().manual_seed(1))

    def run(dtype):
        given = [t.to(dtype) for t in tensors]
        return [native.forward(*given, mode, None, None, False), *native.backward(dout.to(dtype), *given, mode, None, None, False)]

    for name, got, want in zip(("out", "dw", "du", "dk", "dv"), run(torch.float32), run(torch.float64), strict=True):
        error = (got - want).abs().max() / want.abs().max()
        assert error < (1e-5 if name == "out" else 1e-4), f"{name}: {error:.1e}"


def test_segments_do_not_see_each_others_infinities():
    """Nor do the gradients' sums, which take the values less a mean over all segments."""
    w, u, k, v = inputs(2 * TILE, channels=3, batch=1)
    v[:, 0] = float("inf")
    dk, dv = native.backward(torch.ones_like(v), w, u, k, v, "exact", None, torch.tensor([0, TILE]), False)[2:]
    assert dk[:, TILE:].isfinite().all()
    assert dv[:, TILE:].isfinite().all()
