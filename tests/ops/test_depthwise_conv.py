"""depthwise_conv: what it computes, by PyTorch's own convolution, and what it refuses. The contract suite covers the rest."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import medssm
from medssm.ops import depthwise_conv

both = pytest.mark.parametrize("backend", ["reference", "native"])
CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@both
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("spatial, kernel", [((19,), (5,)), ((9, 12), (3, 3)), ((9, 12), (7, 1)), ((5, 6, 7), (3, 3, 3)), ((2, 3, 9), (5, 1, 3))])
def test_equals_torch_with_padding_same(backend, activation, spatial, kernel):
    x, weight, bias = draw(2, *spatial, 6), draw(6, *kernel, seed=1), draw(6, seed=2)
    conv = CONVOLUTIONS[len(spatial)]
    want = conv(x.movedim(-1, 1), weight.unsqueeze(1), bias, padding="same", groups=6).movedim(1, -1)
    want = functional.silu(want) if activation else want
    torch.testing.assert_close(depthwise_conv(x, weight, bias, activation, backend=backend), want, rtol=1e-4, atol=1e-5)


@both
def test_a_channels_first_tensor_is_only_a_view_away(backend):
    x, weight = draw(2, 6, 5, 7), draw(6, 3, 3, seed=1)
    want = functional.conv2d(x, weight.unsqueeze(1), padding=1, groups=6)
    torch.testing.assert_close(depthwise_conv(x.movedim(1, -1), weight, backend=backend).movedim(-1, 1), want, rtol=1e-4, atol=1e-5)


def test_four_axes_fall_back_to_the_reference_with_a_reason():
    x, weight = draw(1, 2, 3, 2, 3, 4), draw(4, 3, 1, 3, 1, seed=1)
    report = medssm.explain("depthwise_conv", x, weight)
    assert report["chosen"] == "reference" and "up to three spatial axes" in report["native"]
    assert torch.equal(depthwise_conv(x, weight), depthwise_conv(x, weight, backend="reference"))
    with pytest.raises(ValueError, match="up to three spatial axes"):
        depthwise_conv(x, weight, backend="native")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.zeros(6, 4, 3)}, r"weight: expected odd kernel sides, got \(4, 3\)"),
        ({"weight": torch.zeros(6, 3, 0)}, r"weight: expected odd kernel sides, got \(3, 0\)"),
        ({"weight": torch.zeros(5, 3, 3)}, r"weight: expected \(6, \*kernel\), got \(5, 3, 3\)"),
        ({"weight": torch.zeros(6, 3)}, r"weight: expected \(d, \*kernel\) with 2 sides, got \(6, 3\)"),
        ({"weight": torch.zeros(6, 1, 3, 3)}, r"weight: expected \(d, \*kernel\) with 2 sides, got \(6, 1, 3, 3\)"),
        ({"bias": torch.zeros(4)}, r"bias: expected \(6,\), got \(4,\)"),
        ({"activation": "gelu"}, "activation: expected None or 'silu', got 'gelu'"),
        ({"x": torch.zeros(2, 6)}, r"x: expected \(b, \*spatial, d\), got \(2, 6\)"),
        ({"backend": "triton"}, "backend='triton' cannot serve this depthwise_conv"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {"x": torch.zeros(2, 5, 5, 6), "weight": torch.zeros(6, 3, 3), **change}
    with pytest.raises(ValueError, match=message):
        depthwise_conv(**arguments)
