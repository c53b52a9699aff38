"""What is special to the Triton kernels of delta_rule: chunks, their inverses, begins within a chunk, decays of any strength, segments of chunks.

They run in Triton's interpreter, which TRITON_INTERPRET=1 chooses when Python starts.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from medssm.kernels import triton as backend
from medssm.kernels.delta_rule import reference

if not backend.INTERPRETED:
    pytest.skip("the interpreter is chosen by TRITON_INTERPRET=1 before Python starts", allow_module_level=True)

from medssm.kernels.delta_rule import triton as kernel


def equals_the_reference(length=37, dk=5, dv=7, heads=1, decay=None, alike=False, index=None, starts=None, reverse=False):
    """Outputs and gradients of one call, against float64."""
    for i, error in enumerate(errors(length, dk, dv, heads, decay, alike, index, starts, reverse)):
        assert error < (2e-6 if i < 2 else 5e-6), (i, error)


def errors(length=37, dk=5, dv=7, heads=1, decay=None, alike=False, index=None, starts=None, reverse=False, longer=1.0):
    """Of the outputs, the final state and the gradients of one call, against float64; `longer`: the keys."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    k = normal(1, 1 if alike else length, heads, dk).expand(1, length, heads, dk) + 1e-3 * normal(1, length, heads, dk)
    beta = torch.ones(1, length, heads) if alike else normal(1, length, heads).sigmoid()
    tensors = [normal(1, length, heads, dk), longer * functional.normalize(k, dim=-1), normal(1, length, heads, dv), beta]
    tensors += [None if decay is None else decay * normal(1, length, heads).abs(), normal(1, heads, dk, dv)]
    dout, dstate = normal(1, length, heads, dv), normal(1, heads, dk, dv)
    *given, initial = tensors
    rest = (0.7, index, starts, reverse, initial)

    out, state, recalled = kernel.forward(*given, *rest, True, True)
    got = [out, state, *(t for t in kernel.backward(dout, dstate, recalled, *given, *rest) if t is not None)]
    leaves = [None if t is None else t.double().requires_grad_() for t in tensors]
    outputs = reference.delta_rule(*leaves[:5], *rest[:4], leaves[5])
    want = [*outputs, *torch.autograd.grad(outputs, [t for t in leaves if t is not None], [dout.double(), dstate.double()])]
    return [float((g - w).detach().abs().max() / w.detach().abs().max().clamp_min(0.1)) for g, w in zip(got, want, strict=True)]


@pytest.mark.parametrize("length", [1, 16, 33])
def test_chunks_equal_the_reference(length):
    equals_the_reference(length)


@pytest.mark.parametrize("dk", [33, 67])
def test_keys_and_values_of_several_tiles(dk):
    """67: more tiles of keys than are in registers."""
    equals_the_reference(17, dk=dk, dv=50, decay=-0.1)


def test_keys_that_are_alike_do_not_cancel_in_the_inverse():
    equals_the_reference(64, alike=True)


@pytest.mark.parametrize("decay", [-0.01, -1.0, -50.0, -float("inf")])
def test_decays_of_any_strength(decay):
    equals_the_reference(decay=decay, reverse=True)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("decay", [None, -0.3])
def test_the_state_begins_anew_within_a_chunk(decay, reverse):
    equals_the_reference(decay=decay, starts=torch.tensor([0, 3, 10, 16, 31]), reverse=reverse, index=torch.randperm(37))


def test_the_gradient_of_a_strong_decay_is_0_where_nothing_comes_before():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((1, 1, 1, 8), generator=generator) for _ in range(3))
    beta, g, dstate = torch.full((1, 1, 1), 0.5), torch.full((1, 1, 1), -50.0), torch.randn((1, 1, 8, 8), generator=generator)
    _, _, recalled = kernel.forward(q, k, v, beta, g, 0.3, None, None, False, None, True, False)
    assert not kernel.backward(torch.zeros_like(v), dstate, recalled, q, k, v, beta, g, 0.3, None, None, False, None)[4].any()


# -- in two levels --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "decay, reverse", [(None, False), (-0.3, True), *(pytest.param(*of, marks=pytest.mark.thorough) for of in ((None, True), (-0.3, False)))]
)
def test_segments_equal_the_reference(monkeypatch, decay, reverse):
    """Five chunks in segments of two, the last of which is shorter."""
    monkeypatch.setattr(kernel, "segment", lambda *_: 2)
    equals_the_reference(69, dk=9, dv=7, heads=2, decay=decay, reverse=reverse)


@pytest.mark.parametrize("chunks", [3, pytest.param(1, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("dk", [67, pytest.param(33, marks=pytest.mark.thorough)])
def test_segments_of_keys_and_values_of_several_tiles(monkeypatch, dk, chunks):
    """67: more tiles of keys than are in registers."""
    monkeypatch.setattr(kernel, "segment", lambda *_: chunks)
    equals_the_reference(53, dk=dk, dv=20, decay=-0.1)


@pytest.mark.parametrize("reverse", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_the_state_begins_anew_within_a_segment_and_with_it(monkeypatch, reverse):
    monkeypatch.setattr(kernel, "segment", lambda *_: 2)
    equals_the_reference(100, decay=-0.1, starts=torch.tensor([0, 3, 32, 40]), reverse=reverse, index=torch.randperm(100))


def test_decays_that_forget_everything_in_segments(monkeypatch):
    monkeypatch.setattr(kernel, "segment", lambda *_: 1)
    equals_the_reference(decay=-float("inf"))


def test_segments_where_keys_make_the_state_grow_are_as_exact_as_one_level(monkeypatch):
    """Keys of 2.5 times the length that keeps the rule stable: what rounding makes of it grows alike."""
    arguments = {"length": 64, "dk": 4, "dv": 4, "longer": 2.5}
    whole = errors(**arguments)
    monkeypatch.setattr(kernel, "segment", lambda *_: 1)
    for i, (error, bound) in enumerate(zip(errors(**arguments), whole, strict=True)):
        assert error < 4 * bound + 2e-6, (i, error, bound)


def test_shapes_alone_decide_how_many_levels():
    """Few programs and many chunks: segments enough to fill a GPU, none of them too short. Else all chunks in one."""
    assert kernel.segment(rows=4, chunks=16384, dk=64, dv=64) == 1024
    assert kernel.segment(rows=4, chunks=256, dk=64, dv=64) == 32
    assert kernel.segment(rows=4, chunks=128, dk=64, dv=64) == 128
    assert kernel.segment(rows=64, chunks=16384, dk=64, dv=64) == 16384
    assert kernel.segment(rows=1000, chunks=16384, dk=64, dv=64) == 16384


# -- the general form -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_key, first", [(True, True), pytest.param(False, False, marks=pytest.mark.thorough)])
def test_the_general_form_equals_the_reference(per_key, first):
    """Two chunks, several tiles of value channels, begins within a chunk, against the walk."""
    generator, length, dk, dv = torch.Generator().manual_seed(0), 34, 5, 130

    def normal(*shape):
        return torch.randn(1, length, 1, *shape, generator=generator)

    unit = functional.normalize
    tensors = {"q": normal(dk), "k": unit(normal(dk), dim=-1), "v": normal(dv), "beta": normal().sigmoid()}
    tensors["g"] = -normal(dk).abs() if per_key else -normal().abs()
    tensors |= {"erase": 0.5 * unit(normal(dk), dim=-1), "erase_out": unit(normal(dk), dim=-1)} if per_key else {}
    tensors |= {"write": normal(dv).sigmoid() if per_key else normal().sigmoid(), "initial_state": torch.randn(1, 1, dk, dv, generator=generator)}
    walk = {"index": torch.randperm(length, generator=generator), "starts": torch.tensor([0, 3, 32]), "reverse": True}
    options = {"scale": 0.7, "erase_first": first, **walk}
    out, state, recalled = kernel.forward(**tensors, **options, save=True, final=True)
    absent = {name: None for name in ("erase", "erase_out") if name not in tensors}
    gradients = kernel.backward(out, state, recalled, **tensors, **absent, **options)
    got = [out, state, *(t for t in gradients if t is not None)]
    leaves = {name: t.double().requires_grad_() for name, t in tensors.items()}
    outputs = reference.delta_rule(**leaves, **options)
    want = torch.autograd.grad(outputs, list(leaves.values()), [out.double(), state.double()], allow_unused=True, materialize_grads=True)
    for g, w in zip(got, [*outputs, *want], strict=True):
        assert (g - w).detach().abs().max() < 5e-6 * w.detach().abs().max().clamp_min(0.1)
