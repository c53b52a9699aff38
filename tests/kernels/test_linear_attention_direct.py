"""Linear attention on the CPU where heads of one vector are read where they lie (csrc/linear_attention/direct.h): against the reference."""

from __future__ import annotations

import pytest
import torch

from medssm.kernels.linear_attention import native, reference

LANES = {"base": 4, "v3": 8, "v4": 16}  # of float32


@pytest.mark.parametrize("features", [("elu", True), ("relu", True), (None, False)])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 1100])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-6), (torch.float64, 1e-13)])
def test_equals_the_reference_with_any_number_of_threads(isa, dtype, tolerance, length, features):
    width = LANES[isa] * 4 // dtype.itemsize
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(2, 4, length, width + 3, generator=generator, dtype=dtype)[..., :width].transpose(1, 2)
    k, v = (torch.randn(2, length, heads, width, generator=generator, dtype=dtype)[:, :, :: heads // 2] for heads in (2, 4))
    feature_map, normalize = features
    options = (None, None, None, None, feature_map, False, normalize, 0.7, 0.5, None, None, False)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(native.forward(q, k, v, *options))
    finally:
        torch.set_num_threads(threads)
    want = reference.linear_attention(q.double(), k.double(), v.double(), *options)
    for one, two, expected in zip(*results, want, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one.double(), expected, rtol=0, atol=tolerance * expected.abs().max().item())
