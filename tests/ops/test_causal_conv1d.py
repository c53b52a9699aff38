"""causal_conv1d: what it computes, by PyTorch's own convolution and by hand, and what it refuses. The contract suite covers the rest."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import medssm
from medssm.ops import causal_conv1d, causal_conv1d_step

both = pytest.mark.parametrize("backend", ["reference", "native"])


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@both
@pytest.mark.parametrize("width", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_equals_a_padded_convolution(backend, width, activation):
    x, weight, bias = draw(2, 23, 6), draw(6, width, seed=1), draw(6, seed=2)
    want = functional.conv1d(x.transpose(1, 2), weight.unsqueeze(1), bias, padding=width - 1, groups=6)[..., :23].transpose(1, 2)
    want = functional.silu(want) if activation else want
    torch.testing.assert_close(causal_conv1d(x, weight, bias, activation, backend=backend), want)
    first = causal_conv1d(x.transpose(1, 2), weight, bias, activation, layout="bdl", backend=backend)
    torch.testing.assert_close(first, want.transpose(1, 2))


@both
def test_by_hand(backend):
    x = torch.tensor([1.0, 10.0, 100.0, 1000.0]).reshape(1, 4, 1)
    weight = torch.tensor([[2.0, 3.0]])
    state = torch.tensor([[[7.0]]])
    out, final = causal_conv1d(x, weight, initial_state=state, return_final_state=True, backend=backend)
    assert out.flatten().tolist() == [2 * 7 + 3, 2 + 30, 20 + 300, 200 + 3000] and final.flatten().tolist() == [1000]
    out, final = causal_conv1d(x, weight, initial_state=state, return_final_state=True, reverse=True, backend=backend)
    assert out.flatten().tolist() == [20 + 3, 200 + 30, 2000 + 300, 14 + 3000] and final.flatten().tolist() == [1]
    order = torch.tensor([2, 0, 3, 1])
    out = causal_conv1d(x, weight, order=order, backend=backend)
    assert out.flatten().tolist() == [200 + 3, 2000 + 30, 300, 2 + 3000]


@both
def test_the_final_state_holds_the_last_tokens_oldest_first(backend):
    x, weight, initial = draw(2, 2, 3), draw(3, 4, seed=1), draw(2, 3, 3, seed=2)
    _, state = causal_conv1d(x, weight, initial_state=initial, return_final_state=True, backend=backend)
    assert torch.equal(state, torch.cat([initial[..., 2:], x.transpose(1, 2)], -1))  # shorter than the state: what precedes shows
    _, state = causal_conv1d(x, weight, return_final_state=True, backend=backend)
    assert torch.equal(state, torch.cat([torch.zeros(2, 3, 1), x.transpose(1, 2)], -1))


@both
def test_taps_begin_anew_with_the_order(backend):
    """Dilated phases and windows are sequences of their own."""
    x, weight = draw(1, 6, 3), draw(3, 3, seed=1)
    dilated = causal_conv1d(x, weight, order=medssm.orders.dilated(2), backend=backend)
    for phase in range(2):
        torch.testing.assert_close(dilated[:, phase::2], causal_conv1d(x[:, phase::2], weight, backend=backend))
    windows = causal_conv1d(x, weight, order=medssm.orders.window(3), backend=backend)
    starts = medssm.orders.window(3).starts((6,)).tolist()
    for begin, end in zip(starts, [*starts[1:], 6], strict=True):
        torch.testing.assert_close(windows[:, begin:end], causal_conv1d(x[:, begin:end], weight, backend=backend))


@both
def test_a_nan_stays_in_its_segment(backend):
    x, weight = draw(1, 6, 3), draw(3, 3, seed=1)
    x[0, 2] = torch.nan  # phase 0 of two: tokens 0, 2, 4
    out = causal_conv1d(x, weight, order=medssm.orders.dilated(2), backend=backend)
    assert torch.isfinite(out[:, [0, 1, 3, 5]]).all() and out[:, [2, 4]].isnan().all()


@both
def test_step_equals_one_token_and_keeps_dtype(backend):
    state, x, weight = draw(2, 5, 3).bfloat16(), draw(2, 5, seed=1).bfloat16(), draw(5, 4, seed=2)
    out, new = causal_conv1d_step(state, x, weight, None, "silu", backend=backend)
    assert out.shape == (2, 5) and out.dtype is new.dtype is torch.bfloat16
    assert torch.equal(new, torch.cat([state[..., 1:], x.unsqueeze(-1)], -1))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.zeros(5, 4)}, r"weight: expected \(6, w\), got \(5, 4\)"),
        ({"weight": torch.zeros(6, 0)}, r"weight: expected \(d, w\) with w at least 1, got \(6, 0\)"),
        ({"weight": torch.zeros(6, 1, 4)}, r"weight: expected \(6, w\), got \(6, 1, 4\)"),
        ({"bias": torch.zeros(4)}, r"bias: expected \(6,\), got \(4,\)"),
        ({"initial_state": torch.zeros(2, 6, 4)}, r"initial_state: expected \(2, 6, 3\), got \(2, 6, 4\)"),
        ({"activation": "relu"}, "activation: expected None or 'silu', got 'relu'"),
        ({"layout": "dbl"}, "layout: expected 'bld' or 'bdl', got 'dbl'"),
        ({"x": torch.zeros(2, 6)}, r"x: expected \(b, l, d\), got \(2, 6\)"),
        ({"order": torch.arange(4)}, r"order: expected an int64 tensor \(5,\)"),
        ({"backend": "cuda"}, "backend='cuda' cannot serve this causal_conv1d"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {"x": torch.zeros(2, 5, 6), "weight": torch.zeros(6, 4), **change}
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**arguments)


def test_explain_gives_the_choice():
    x, weight = draw(1, 4, 3), draw(3, 2)
    assert medssm.explain("causal_conv1d", x, weight)["chosen"] == "native"
    assert "got float32 on meta" in medssm.explain("causal_conv1d", x.to("meta"), weight.to("meta"))["native"]
