"""The Triton kernels of linear_attention, which have the form over all tokens: what the contract suite asks of a whole op.

They run in Triton's interpreter, which TRITON_INTERPRET=1 chooses when Python starts.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medssm.kernels import triton as backend

if not backend.INTERPRETED:
    pytest.skip("the interpreter is chosen by TRITON_INTERPRET=1 before Python starts", allow_module_level=True)

from tests.ops.calls import Call, compare
from tests.ops.cases import calls

OP = "linear_attention"
whole = calls(OP).map(lambda call: call.with_options(causal=False))


@given(call=whole)
def test_float32_equals_the_float64_reference(call):
    call = call.to(torch.float32)
    compare(call.results("triton"), call.to(torch.float64).results("reference"), 2e-6, 1e-5)


@given(call=whole, dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_storage_computes_in_float32(call, dtype):
    """Forward only: a state that is cut to half has no exact cotangent."""
    call = call.to(dtype).with_options(return_final_state=False)
    got, want = call.results("triton", gradients=False), call.to(torch.float64).results("reference", gradients=False)
    assert got["output 0"].dtype is dtype
    compare(got, want, torch.finfo(dtype).eps + 1e-5, 0.0)


@pytest.mark.parametrize("lengths", [pytest.param((150, 300), marks=pytest.mark.thorough), (33, 7)])
def test_several_segments_tiles_and_another_number_of_queries(lengths):
    generator = torch.Generator().manual_seed(0)
    tensors = {"v": (1, lengths[1], 2, 37), "q": (1, lengths[0], 4, 40), "k": (1, lengths[1], 2, 40)}
    call = Call(OP, {name: torch.randn(shape, generator=generator) for name, shape in tensors.items()}, {"return_final_state": True})
    got, want = call.results("triton"), call.to(torch.float64).results("reference")
    compare(got, want, 2e-6, 1e-5)
    assert all(torch.equal(t, got[name]) for name, t in call.results("triton").items())


def test_causal_over_several_chunks():
    generator = torch.Generator().manual_seed(0)
    tensors = {"v": (1, 70, 1, 37), "q": (1, 70, 2, 40), "k": (1, 70, 1, 40)}
    call = Call(OP, {name: torch.randn(shape, generator=generator) for name, shape in tensors.items()}, {"causal": True, "return_final_state": True})
    compare(call.results("triton"), call.to(torch.float64).results("reference"), 2e-6, 1e-5)
