"""Batch norms folded: the same values, and only where the norm alone takes the convolution's output."""

import copy

import pytest
import torch
from torch import nn

import medssm
from medssm.compress import steps
from medssm.compress.fold import fold

TINY = {"features": [4, 8, 8], "depths": [1, 1, 1], "decoder_depths": [1, 1], "mixer": "none"}


def trained(network):
    """With statistics that a norm of a trained network could have."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return network.eval()


def norms(network):
    return [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.detach().abs().max()) + 1e-6)


@pytest.mark.parametrize("dims", [2, 3])
def test_medssm_unet_has_no_batch_norm_left_and_the_same_logits(dims):
    network = trained(medssm.create_model("medssm_unet", dims, 1, 3, **TINY))
    x = torch.randn(2, 1, *[16] * dims)
    before = network(x)
    assert norms(network)
    folded, step = fold(network)
    assert not norms(folded)
    assert step["kind"] == "fold"
    close(folded(x), before)


@pytest.mark.parametrize("name", ["mlla", "medmamba"])
def test_other_networks_give_the_same(name):
    facts = medssm.models.model_facts(name)
    network = trained(medssm.create_model(name, 2, facts.input[0], facts.classes, **facts.small))
    x = torch.randn(1, facts.input[0], 32, 32)
    before, count = network(x), len(norms(network))
    folded, step = fold(network)
    assert len(norms(folded)) == count - len(step["pairs"]) < count
    close(folded(x), before)


def test_monai_s_blocks_are_seen_through():
    nets = pytest.importorskip("monai.networks.nets")
    network = trained(nets.UNet(3, 1, 2, (4, 8), (2,), norm="batch"))
    x = torch.randn(1, 1, 8, 8, 8)
    before = network(x)
    folded, _ = fold(network)
    assert not norms(folded)
    close(folded(x), before)


def test_the_step_restores_the_structure():
    network = trained(medssm.create_model("medssm_unet", 2, 1, 3, **TINY))
    other, x = copy.deepcopy(network), torch.randn(1, 1, 16, 16)
    folded, step = fold(network)
    other = steps.restructured(other, [step])
    other.load_state_dict(folded.state_dict())
    assert torch.equal(other(x), folded(x))


class Twice(nn.Module):
    """The norm is not the only one that takes the convolution's output."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

    def forward(self, x):
        y = self.conv(x)
        return y + self.norm(y)


class Activated(nn.BatchNorm2d):
    """A norm that does more."""

    def forward(self, x):
        return super().forward(x).relu()


class Between(nn.Module):
    """An activation comes between."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

    def forward(self, x):
        return self.norm(self.conv(x).relu())


@pytest.mark.parametrize(
    "network",
    [
        Twice(),
        Between(),
        nn.Sequential(nn.Conv2d(1, 2, 3), Activated(2)),
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False)),
        nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 2, 3, padding=1)),
        nn.Sequential(nn.ConvTranspose2d(1, 1, 2), nn.ConvTranspose2d(1, 2, 3, groups=1), nn.ReLU(), nn.BatchNorm2d(2)),
    ],
    ids=["used twice", "activation", "activated norm", "no statistics", "norm first", "behind relu"],
)
def test_what_cannot_be_folded_stays(network):
    network, x = trained(network), torch.randn(1, 1, 8, 8)
    before = network(x)
    folded, step = fold(network)
    assert step["pairs"] == []
    assert torch.equal(folded(x), before)


def test_a_layer_in_two_places_stays():
    conv = nn.Conv2d(2, 2, 1)
    network = trained(nn.Sequential(conv, nn.BatchNorm2d(2), conv))
    assert fold(network)[1]["pairs"] == []


def test_a_transposed_convolution_is_folded():
    network = trained(nn.Sequential(nn.ConvTranspose3d(2, 3, 2, 2), nn.BatchNorm3d(3)))
    x = torch.randn(1, 2, 4, 4, 4)
    before = network(x)
    folded, step = fold(network)
    assert step["pairs"] == [["0", "1"]]
    close(folded(x), before)
