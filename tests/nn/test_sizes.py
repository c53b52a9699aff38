"""The operators that pad and crop while PyTorch traces."""

import pytest
import torch

from medssm.nn import sizes


@pytest.mark.parametrize("size", [(8, 4), (7, 3)])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_their_outputs_are_contiguous_as_tracers_are_told(memory, size):
    x = torch.randn(2, 3, *size).contiguous(memory_format=memory)
    padded = torch.ops.medssm.pad(x, [4, 4], False, 1)
    y = padded.contiguous(memory_format=memory)
    cropped = torch.ops.medssm.crop(y, padded, x)
    assert torch.equal(padded, sizes.pad_to(x, (4, 4))) and torch.equal(cropped, x) and padded.is_contiguous() and cropped.is_contiguous()
    torch.library.opcheck(torch.ops.medssm.pad.default, (x.requires_grad_(), [4, 4], False, 1))
    torch.library.opcheck(torch.ops.medssm.crop.default, (y.detach().requires_grad_(), padded, x.detach()))
