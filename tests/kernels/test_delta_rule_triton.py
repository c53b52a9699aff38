"""What is special to the Triton kernels of delta_rule: chunks, their inverses, begins within a chunk, decays of any strength.

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
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    k = normal(1, 1 if alike else length, heads, dk).expand(1, length, heads, dk) + 1e-3 * normal(1, length, heads, dk)
    beta = torch.ones(1, length, heads) if alike else normal(1, length, heads).sigmoid()
    tensors = [normal(1, length, heads, dk), functional.normalize(k, dim=-1), normal(1, length, heads, dv), beta]
    tensors += [None if decay is None else decay * normal(1, length, heads).abs(), normal(1, heads, dk, dv)]
    dout, dstate = normal(1, length, heads, dv), normal(1, heads, dk, dv)
    *given, initial = tensors
    rest = (0.7, index, starts, reverse, initial)

    out, state, recalled = kernel.forward(*given, *rest, True, True)
    got = [out, state, *(t for t in kernel.backward(dout, dstate, recalled, *given, *rest) if t is not None)]
    leaves = [None if t is None else t.double().requires_grad_() for t in tensors]
    outputs = reference.delta_rule(*leaves[:5], *rest[:4], leaves[5])
    want = [*outputs, *torch.autograd.grad(outputs, [t for t in leaves if t is not None], [dout.double(), dstate.double()])]
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        error = float((g - w).abs().max() / w.abs().max().clamp_min(0.1))
        assert error < (2e-6 if i < 2 else 5e-6), (i, error)


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
