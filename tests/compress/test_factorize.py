"""Low rank: the whole rank is the layer itself, a weight of low rank is found exactly, and what is asked for is kept."""

import copy
import sys

import pytest
import torch
from torch import nn

from medssm.compress.cost import costs, multiply_adds
from medssm.compress.factorize import Form, LowRank, _apart, _forms, factorize, restructure
from medssm.errors import UserError
from medssm.nn.convolution import Conv3d
from tests.compress.networks import network_of

CONVOLUTIONS = {
    "3d": lambda: Conv3d(32, 48, 3, padding=1),
    "3d with strides": lambda: nn.Conv3d(32, 40, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False),
    "2d dilated": lambda: nn.Conv2d(32, 32, 3, padding=2, dilation=2),
    "2d of one voxel": lambda: nn.Conv2d(48, 32, 1, 2),
    "2d as its stride": lambda: nn.Conv2d(32, 64, 2, 2),
}


def forced(network, form):
    """The network with its layers written in a form."""
    module = sys.modules[factorize.__module__]
    kept, module._forms = module._forms, lambda layer: [form]
    try:
        return factorize(network, energy=1e-9)
    finally:
        module._forms = kept


@torch.no_grad()
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_form_at_its_full_rank_is_the_layer(name):
    torch.manual_seed(0)
    layer = CONVOLUTIONS[name]()
    x = torch.randn(2, layer.in_channels, *(9,) * (layer.weight.dim() - 2))
    full = {"svd": (min(layer.weight.shape[:2]),), "tucker": (layer.in_channels, layer.out_channels)}
    if layer.weight.dim() > 2 and layer.kernel_size[0] > 1:
        full["spatial"] = (min(_apart(layer.weight).shape),)
    for method, ranks in full.items():
        if (method == "svd") == (layer.weight[0, 0].numel() == 1):
            changed, step = forced(nn.Sequential(copy.deepcopy(layer)), Form(method, ranks, 1.0, 1.0))
            assert step == {"kind": "factorize", "layers": {"0": [method, *ranks]}} and isinstance(changed[0], LowRank)
            torch.testing.assert_close(changed(x), layer(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_weights_of_low_rank_are_found_exactly():
    torch.manual_seed(0)
    conv, linear, split = nn.Conv3d(32, 32, 3, padding=1), nn.Linear(64, 32), nn.Conv2d(32, 32, 3, padding=1)
    conv.weight.copy_(torch.einsum("or,rsxyz,si->oixyz", torch.randn(32, 8), torch.randn(8, 8, 3, 3, 3), torch.randn(8, 32)))
    linear.weight.copy_(torch.randn(32, 8) @ torch.randn(8, 64))
    split.weight.copy_(torch.einsum("ory,rix->oixy", torch.randn(32, 8, 3), torch.randn(8, 32, 3)))
    for layer, x, method in (
        (conv, torch.randn(1, 32, 5, 5, 5), "tucker"),
        (linear, torch.randn(3, 64), "svd"),
        (split, torch.randn(1, 32, 6, 6), "spatial"),
    ):
        small, step = factorize(nn.Sequential(layer), energy=0.999999)
        assert step["layers"]["0"][0] == method and set(step["layers"]["0"][1:]) == {8}
        torch.testing.assert_close(small(x), layer(x), atol=2e-3 * layer(x).abs().max().item(), rtol=1e-4)


@torch.no_grad()
def test_no_layer_keeps_more_than_its_share_and_the_error_grows_as_it_shrinks():
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Conv3d(32, 64, 3, padding=1), nn.Conv3d(64, 32, 2, 2)), torch.randn(1, 32, 6, 6, 6)
    before, errors = multiply_adds(network, x), []
    for share in (0.8, 0.6, 0.4):
        small, _ = factorize(network, share)
        assert multiply_adds(small, x) <= share * before
        errors.append((small(x) - network(x)).norm() / network(x).norm())
    assert errors[0] < errors[1] < errors[2] < 1


@torch.no_grad()
def test_a_step_builds_the_same_structure():
    network, x = network_of("umamba_bot")
    small, step = factorize(network, 0.5)
    assert step["layers"]
    again = restructure(network_of("umamba_bot", seed=1)[0], step)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x)[0], small(x)[0])


def test_a_budget_in_milliseconds_is_kept_with_one_energy_for_all(monkeypatch):
    """With a millisecond for a million multiply-adds, so that a busy machine decides nothing."""
    monkeypatch.setattr(
        sys.modules[factorize.__module__], "costs", lambda *given: {key: cost._replace(milliseconds=1e-6) for key, cost in costs(*given).items()}
    )
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Conv3d(32, 64, 3, padding=1), nn.Conv3d(64, 32, 3, padding=1)), torch.randn(1, 32, 12, 12, 12)
    all_of_it = sum(1e-6 * getattr(*key).numel() for key in costs(network, x))
    small, step = factorize(network, milliseconds=all_of_it / 2, example=x)
    assert len(step["layers"]) == 2 and multiply_adds(small, x) < 0.9 * multiply_adds(network, x)
    with pytest.raises(UserError, match=r"^factorize: expected a budget of at least .* ms, which the smallest ranks take, got 1e-06"):
        factorize(network, milliseconds=1e-6, example=x)


def test_what_stays_as_it_is():
    network = nn.Sequential(nn.Conv3d(16, 64, 3), nn.Conv3d(32, 32, 3, groups=32), nn.Conv2d(32, 32, 3, padding_mode="reflect"), nn.Linear(32, 8))
    assert factorize(network, 0.5)[1] == {"kind": "factorize", "layers": {}}
    assert all(form.cost < 1 for form in _forms(nn.Conv3d(32, 32, 3)))


def test_wrong_input_is_one_clear_line():
    network = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(UserError, match=r"^factorize: expected one of share, energy, milliseconds, got"):
        factorize(network)
    with pytest.raises(UserError, match=r"^factorize: expected a share of each layer's multiply-adds, above 0 and below 1, got 1\.5"):
        factorize(network, 1.5)
    with pytest.raises(UserError, match=r"^factorize: expected an energy above 0 and at most 1, got 0"):
        factorize(network, energy=0)
    with pytest.raises(ValueError, match=r"expected a linear layer or a convolution, got 0 \(ReLU\)"):
        restructure(nn.Sequential(nn.ReLU()), {"layers": {"0": ["svd", 8]}})
