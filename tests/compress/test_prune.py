"""Pruning by importance: what counts little goes first, as much as is asked, for good."""

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from medssm.compress.cost import costs, multiply_adds
from medssm.compress.couplings import groups_of
from medssm.compress.groups import Group, sizes_below
from medssm.compress.importance import scores, states
from medssm.compress.prune import prune, restructure
from medssm.errors import UserError
from medssm.nn import SSND, GatedLinearAttention
from tests.compress.networks import NETWORKS, network_of


def first(output):
    return output[0] if isinstance(output, list) else output


FEW = ("medssm_unet bare", "medssm_unet mamba2", "medssm_unet gla", "segmamba", "vmunet", "monai_dynunet")  # of every kind of coupling one


@torch.no_grad()
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FEW else pytest.mark.thorough) for name in NETWORKS])
def test_as_much_goes_as_is_asked_and_the_step_says_what_is_left(name):
    network, x = network_of(name)
    before = multiply_adds(network, x)
    small, step = prune(network, 0.6, x, multiple=8)
    assert 0.3 * before < multiply_adds(small, x) <= 0.6 * before
    assert multiply_adds(network, x) == before
    other, _ = network_of(name, seed=1)
    again = restructure(other, step)
    again.load_state_dict(small.state_dict())
    assert torch.equal(first(again(x)), first(small(x)))
    left = {group.name: group.size for group in groups_of(small, 2).all}
    assert all(left[group] == size for group, size in step["sizes"].items() if not group.endswith(".keys"))  # fewer with fewer heads


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("medssm_unet ss_nd", "encoder.stages.1.1.conv1"),
        ("medssm_unet ss_nd", "encoder.stages.2.1.mixer.states"),
        ("medssm_unet linear_attention", "encoder.stages.3.1.mixer.heads"),
        ("medssm_unet rwkv", "encoder.stages.2.1.mixer.inner"),
        ("umamba_bot", "bottleneck.mamba.inner"),
        ("segmamba", "encoder.stages.1.layers.0.mamba.states"),
    ],
)
def test_what_is_zero_goes_first_and_changes_nothing(name, group):
    network, x = network_of(name)
    found = next(one for one in groups_of(network, 2).all if one.name == group)
    for module, tensor, axis, index in found.slices:
        getattr(module, tensor).index_fill_(axis, index[::2].flatten(), 0)
    wanted = first(network(x))
    small, step = prune(network, 0.999, x, multiple=8)
    assert list(step["sizes"]) == [group]
    torch.testing.assert_close(first(small(x)), wanted, atol=1e-5, rtol=1e-5)


def test_first_order_importance_is_the_weights_times_their_gradients():
    network = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False))
    groups, (x, y) = groups_of(network, 2), (torch.randn(5, 2), torch.randn(5, 1))
    mse_loss(network(x), y).backward()
    by_hand = sum((layer.weight * layer.weight.grad).detach().abs().sum(axis) for layer, axis in ((network[0], 1), (network[1], 0)))
    found = scores(network, groups, x, [(x, y), (x, y)], mse_loss)[groups.all[0]]
    torch.testing.assert_close(found, 2 * by_hand)


@torch.no_grad()
def test_a_states_contribution_is_what_the_output_loses_without_it():
    torch.manual_seed(0)
    mixer = nn.Sequential(SSND(8, 4, spatial_dims=2, gate=None)).eval()
    x, inner = torch.randn(1, 4, 5, 8), []
    mixer[0].out_norm.register_forward_pre_hook(lambda _, args: inner.append(args[0]))
    energies = states(mixer, x)["0"]
    mixer(x)
    kept = mixer[0].x_proj_weight.clone()
    for i, energy in enumerate(energies):
        mixer[0].x_proj_weight[:, 1 + 4 + i] = 0  # rank 1, then B, then C
        mixer(x)
        torch.testing.assert_close((inner[1] - inner[-1]).square().sum(), energy, rtol=1e-3, atol=1e-6)
        mixer[0].x_proj_weight.copy_(kept)


@torch.no_grad()
def test_a_key_channel_that_no_query_reads_brings_nothing():
    mixer = nn.Sequential(GatedLinearAttention(16, 2))
    mixer[0].q_proj.weight[3] = 0
    brought = states(mixer, torch.randn(1, 4, 4, 16))["0"]
    assert brought.shape == (8,) and brought[3] == 0 and (brought > 0).sum() == 7


def test_costs_add_up_to_the_networks_multiply_adds():
    network, x = network_of("medssm_unet ss_nd")
    table = costs(network, x)
    assert sum(cost.multiply_adds * getattr(*key).numel() for key, cost in table.items()) == pytest.approx(multiply_adds(network, x))
    conv = network.encoder.stages[0][0].conv1
    assert table[conv, "weight"].multiply_adds == x[:, 0].numel()
    assert all(cost.milliseconds >= 0 for cost in table.values()) and sum(cost.milliseconds for cost in table.values()) > 0


@pytest.mark.parametrize(
    ("size", "multiple", "banks", "kind", "wanted"),
    [
        (96, 16, 1, "channels", [80, 64, 48, 32]),
        (48, 16, 1, "channels", [32, 16]),
        (24, 16, 1, "channels", [16, 8]),
        (16, 16, 1, "channels", [8]),
        (7, 16, 1, "channels", [4]),
        (1, 16, 1, "channels", []),
        (8, 16, 1, "states", [7, 6, 5, 4, 3, 2]),
        (12, 16, 3, "states", [9, 6, 3]),
        (96, 16, 1, "fixed", []),
    ],
)
def test_sizes_that_the_hardware_likes(size, multiple, banks, kind, wanted):
    assert sizes_below(Group("", size, kind, banks), multiple) == wanted


def test_wrong_input_is_one_clear_line():
    network, x = network_of("medssm_unet none")
    for share in (0, 1, 1.5, -0.1):
        with pytest.raises(UserError, match=r"^prune: expected a share of the multiply-adds to keep, above 0 and below 1, got"):
            prune(network, share, x)
    with pytest.raises(UserError, match=r"^prune: expected a share of at least 0\.\d+, as no group is cut below a quarter of its size, got 0\.001"):
        prune(network, 0.001, x)
