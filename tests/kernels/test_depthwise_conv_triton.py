"""What is special to the Triton kernels of depthwise_conv: the offsets along x that one program of the weights' gradient takes, and tiles.

They run in Triton's interpreter, which TRITON_INTERPRET=1 chooses when Python starts.
"""

from __future__ import annotations

import pytest
import torch

from medssm.kernels import triton as backend
from medssm.kernels.depthwise_conv import reference

if not backend.INTERPRETED:
    pytest.skip("the interpreter is chosen by TRITON_INTERPRET=1 before Python starts", allow_module_level=True)

from medssm.kernels.depthwise_conv import triton as kernel


@pytest.mark.parametrize("sides", [(1,), (3,), (5,), (9,), (3, 7), (5, 1), (1, 3, 5)])
def test_every_width_along_x(sides, monkeypatch):
    """Up to TAPS offsets are one program's; of 5, 7 and 9 the last program has fewer. Tiles end within the volume and within the channels."""
    monkeypatch.setattr(kernel, "POSITIONS", 16)
    monkeypatch.setattr(kernel, "SHARE", 32)
    g = torch.Generator().manual_seed(len(sides) + sides[-1])
    x = torch.randn(2, *(7,) * len(sides), 5, generator=g)
    weight, bias = torch.randn(5, *sides, generator=g), torch.randn(5, generator=g)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    want = reference.depthwise_conv(*leaves, None)
    dout = torch.randn(x.shape, generator=g)
    torch.testing.assert_close(kernel.forward(x, weight, bias, None), want.float(), rtol=1e-5, atol=1e-5)
    for got, expected in zip(kernel.backward(dout, x, weight, bias, None), torch.autograd.grad(want, leaves, dout.double()), strict=True):
        torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-4)
