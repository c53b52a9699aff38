"""The folder of a compressed network: config.json lists the steps, and loading builds the structure that they give before it reads the weights."""

import sys
import types

import pytest
import torch
from torch import nn

from medssm.compress import steps
from medssm.errors import UserError
from medssm.segment import networks

FEATURES = {"features": [4, 8, 8], "depths": [1, 1, 1], "decoder_depths": [1, 1]}
KWARGS = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "mixer": "none", **FEATURES}


@pytest.fixture
def widened(monkeypatch):
    """A kind of step that puts another head on the network."""

    def restructure(network, step):
        network.decoder.seg_layers[-1] = nn.Conv2d(4, step["outputs"], 1)
        return network

    monkeypatch.setitem(sys.modules, "widened", types.SimpleNamespace(restructure=restructure))
    monkeypatch.setitem(steps.KINDS, "widened", "widened")
    return {"kind": "widened", "outputs": 5}


def test_a_folder_gives_the_network_with_the_structure_of_its_steps(widened, tmp_path):
    config = {"model": "medssm_unet", "kwargs": KWARGS, "compression": [widened]}
    network = networks.of_config(config).eval()
    networks.save(tmp_path, network, config)
    x = torch.rand(1, 1, 16, 16)
    assert network(x).shape == (1, 5, 16, 16)
    assert torch.equal(networks.load(tmp_path).eval()(x), network(x))


def test_a_network_given_as_a_module_is_compressed_too(widened, tmp_path):
    config = {"model": None, "class": "a.b", "compression": [widened]}
    network = steps.restructured(networks.build("medssm_unet", **KWARGS), [widened])
    networks.save(tmp_path, network, config)
    assert networks.load(tmp_path, networks.build("medssm_unet", **KWARGS)).decoder.seg_layers[-1].out_channels == 5


def test_a_step_of_an_unknown_kind_is_one_clear_line():
    with pytest.raises(UserError, match=r"^compression: expected steps of the kinds prune, .*, got 'melt'"):
        steps.restructured(nn.Identity(), [{"kind": "melt"}])


def test_a_step_that_does_not_fit_is_one_clear_line(widened):
    with pytest.raises(UserError, match=r"^compression: the step 'widened' does not fit the network"):
        steps.restructured(nn.Identity(), [widened])
