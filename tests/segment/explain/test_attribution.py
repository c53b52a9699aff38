"""Attributions and checks of functions whose maps are known."""

import importlib.util
import math

import pytest
import torch
from torch import nn

from medssm.errors import UserError
from medssm.segment.explain import attribution, sanity
from medssm.segment.explain.attribution import integrated_gradients, occlusion

needs_captum = pytest.mark.skipif(importlib.util.find_spec("captum") is None, reason="captum is not installed")
SHAPE = (2, 4, 5, 6)


def linear(weights):
    return lambda inputs: (weights * inputs).flatten(1).sum(1) + 7


@needs_captum
def test_integrated_gradients_of_a_linear_score_are_weight_times_input():
    weights, x, baseline = (torch.randn(SHAPE) for _ in range(3))
    found = integrated_gradients(linear(weights), x, baseline, steps=3)
    torch.testing.assert_close(found.values, weights * (x - baseline), rtol=1e-4, atol=1e-4)
    assert found.difference == pytest.approx(float((weights * (x - baseline)).sum()), rel=1e-4)


@needs_captum
def test_integrated_gradients_are_complete_where_the_gradient_changes():
    x, baseline = torch.rand(SHAPE), torch.zeros(SHAPE)
    found = integrated_gradients(lambda inputs: inputs.pow(3).flatten(1).sum(1), x, baseline, steps=8, batch=3)
    torch.testing.assert_close(found.values, x**3, rtol=1e-4, atol=1e-5)  # the gradient's mean on the way is x^2
    assert float(found.values.sum()) == pytest.approx(found.difference, rel=1e-4)


@needs_captum
@pytest.mark.parametrize("batch", [1, 4])
def test_occlusion_of_a_linear_score_is_what_a_box_adds(batch):
    weights, x, baseline = (torch.randn(SHAPE) for _ in range(3))
    shown = []
    found = occlusion(linear(weights), x, baseline, (2, 2, 4), batch=batch, show=shown.append)
    adds = weights * (x - baseline)
    for i in (0, 2):
        for j in (0, 2, 4):  # the last box of an axis is what is left
            for k in (0, 4):
                box = (slice(None), slice(i, i + 2), slice(j, j + 2), slice(k, k + 4))
                wanted = adds[box].sum((1, 2, 3)).reshape(-1, 1, 1, 1).expand_as(adds[box])  # of each channel alone
                torch.testing.assert_close(found.values[box], wanted, rtol=1e-4, atol=1e-4)
    assert shown == sorted(shown) and shown[-1] == 1


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(attribution.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^explain: needs the package captum: pip install '\.\[explain\]'"):
        attribution.check_installed()


def test_deletion_removes_the_largest_values_first():
    weights = torch.arange(100.0).reshape(1, 10, 10) / 4950
    x, baseline, inside = torch.ones(1, 10, 10), torch.zeros(1, 10, 10), torch.ones(10, 10, dtype=torch.bool)
    found = sanity.deletion(lambda inputs: (weights * inputs).flatten(1).sum(1), x, baseline, weights, inside, (1, 1))
    left = [sum(range(100 - round(part * 100))) / 4950 for part in found["parts"]]
    assert found["first"] == pytest.approx(left, abs=1e-5)
    assert found["random"] == pytest.approx([1 - part for part in found["parts"]], abs=0.1)
    steps = zip(found["parts"], found["parts"][1:], left, left[1:], strict=False)
    assert found["area"] == pytest.approx(sum((b - a) * (f + g) / 2 for a, b, f, g in steps), abs=1e-5) and found["area"] < found["random_area"] - 0.1
    other = sanity.deletion(lambda inputs: (weights * inputs).flatten(1).sum(1), x, baseline, -weights, inside, (1, 1))
    assert other["area"] > found["random_area"] + 0.1


def test_deletion_takes_boxes_and_leaves_what_is_outside():
    x, baseline, inside = torch.ones(1, 4, 6), torch.zeros(1, 4, 6), torch.ones(4, 6, dtype=torch.bool)
    inside[:, 4:] = False
    values = torch.zeros(1, 4, 6)
    values[:, 2, 1] = 1
    values[:, :, 4:] = 9
    seen = []
    sanity.deletion(lambda inputs: seen.append(inputs[0, 0].clone()) or inputs.sum((1, 2, 3)), x, baseline, values, inside, (2, 2))
    assert all(one[:, 4:].all() for one in seen)
    first = seen[sanity.PARTS.index(0.2)]  # one box of four
    assert not first[2:, :2].any() and first.sum() == 20
    assert seen[len(sanity.PARTS) - 1].sum() == 8


def test_shuffled_weights_are_the_same_numbers_in_another_order():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    before = [weight.clone() for weight in network.parameters()]
    other = sanity.shuffled(network)
    for weight, old, new in zip(network.parameters(), before, other.parameters(), strict=True):
        assert torch.equal(weight, old)
        assert torch.equal(weight.flatten().sort().values, new.flatten().sort().values)
    assert not torch.equal(network[0].weight, other[0].weight)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), sanity.shuffled(network).parameters(), strict=True))


def test_rank_correlation():
    values, inside = torch.randn(1, 20, 20), torch.ones(20, 20, dtype=torch.bool)
    assert sanity.rank_correlation(values, values**3, inside) == pytest.approx(1)
    assert sanity.rank_correlation(values, -values, inside) == pytest.approx(-1)
    assert abs(sanity.rank_correlation(values, torch.randn(1, 20, 20), inside)) < 0.2
    assert sanity.rank_correlation(values, torch.zeros(1, 20, 20), inside) == 0
    other = values.clone()
    other[:, :10] = 0
    inside[:10] = False
    assert math.isclose(sanity.rank_correlation(values, other, inside), 1)
