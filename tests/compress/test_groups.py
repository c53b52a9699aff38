"""Removing channels, states and heads: what is left computes what the whole network computes when all that was removed is zero."""

import copy

import pytest
import torch
from torch import nn

from medssm.compress.couplings import groups_of
from medssm.errors import UserError
from medssm.nn import MLLA, SSND, BiMamba, DeltaNet, GatedLinearAttention, Mamba2, Mamba3, SpatialMix
from medssm.nn.mamba2 import GatedRMSNorm
from medssm.nn.streaming import View, streamed
from medssm.orders import raster
from medssm.scratch import Scratch
from medssm.segment import networks
from tests.compress.networks import NETWORKS, network_of

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, GatedRMSNorm)


def some(group, generator):
    """About half of the units, as many of each bank, drawn."""
    each = group.size // group.banks
    picked = [bank * each + torch.randperm(each, generator=generator)[: (each + 1) // 2].sort().values for bank in range(group.banks)]
    return torch.cat(picked)


def over_the_kept(norm, stays):
    """A norm whose statistics are of the channels that stay: those that went are no part of the smaller network's statistics."""
    small = copy.deepcopy(norm)
    for name in ("weight", "bias"):
        if getattr(small, name, None) is not None:
            setattr(small, name, nn.Parameter(getattr(small, name).detach()[stays]))
    if isinstance(norm, nn.GroupNorm):
        small.num_channels = int(stays.sum())
    elif not isinstance(norm, GatedRMSNorm):
        small.normalized_shape = (int(stays.sum()),)
    axis = 1 if type(norm).__name__ in ("ChannelNorm", "GroupNorm") else -1

    def forward(*inputs):
        index = stays.nonzero().flatten()
        found = small(*(x.index_select(axis, index) for x in inputs))
        return torch.zeros_like(inputs[0]).index_copy(axis, index, found)

    norm.forward = forward


@torch.no_grad()
def zeroed(network, kept, in_channels=2):
    """A copy of the network in which the slices of all units that are not kept are zero."""
    network = copy.deepcopy(network)
    stays = {}
    for group in groups_of(network, in_channels).all:
        if group.name not in kept:
            continue
        gone = torch.ones(group.size, dtype=torch.bool)
        gone[kept[group.name]] = False
        for module, name, axis, index in group.slices:
            rows = index[gone].flatten()
            getattr(module, name).index_fill_(axis, rows, 0)
            if isinstance(module, NORMS) and name == "weight":
                stays.setdefault(module, torch.ones(len(module.weight), dtype=torch.bool))[rows] = False
    for norm, mask in stays.items():
        over_the_kept(norm, mask)
    return network


@torch.no_grad()
@pytest.mark.parametrize(
    "mixer",
    [
        lambda: Mamba2(16, 8, headdim=4, ngroups=2, D_has_hdim=True),
        lambda: Mamba2(16, 8, headdim=4, rmsnorm=False, bias=True),
        lambda: Mamba3(16, 8, headdim=4, ngroups=2),
        lambda: Mamba3(16, 8, headdim=4, is_mimo=True, mimo_rank=2),
        lambda: GatedLinearAttention(16, 4, decay="head", orders=[raster()]),
        lambda: GatedLinearAttention(16, 4, gate=None),
        lambda: DeltaNet(16, 4, gated=False, conv="order"),
        lambda: DeltaNet(16, 4, rule="kda", expand_v=2),
        lambda: DeltaNet(16, 4, rule="gdn2", expand_k=0.5),
        lambda: DeltaNet(16, 4, rule="rwkv7"),
        lambda: DeltaNet(16, 4, conv=None, gate=None),
        lambda: SSND(16, 4, gate=None, d_conv=1, spatial_dims=3),
        lambda: MLLA(16, 4, rotary=False),
        lambda: SpatialMix(16, key_norm=True, pixels=0),
        lambda: BiMamba(16, 4, divide_out=True, bias=True),
    ],
)
def test_options_of_mixers(mixer):
    torch.manual_seed(0)
    network, generator = nn.Sequential(nn.Linear(16, 16), mixer(), nn.Linear(16, 2)).eval(), torch.Generator().manual_seed(1)
    kept = {group.name: some(group, generator) for group in groups_of(network, 16).all if group.kind != "fixed" and group.name != "2"}
    small, x = copy.deepcopy(network), torch.randn(1, *(4,) * getattr(network[1], "spatial_dims", 2), 16)
    groups_of(small, 16).cut(kept)
    assert parameters(small) < parameters(network)
    torch.testing.assert_close(small(x), zeroed(network, kept, 16)(x), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_norm_of_each_head_goes_with_its_head():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 16), Mamba3(16, 8, headdim=4, is_mimo=True, mimo_rank=2, is_outproj_norm=True), nn.Linear(16, 2)).eval()
    small, x = copy.deepcopy(network), torch.randn(1, 7, 16)
    groups_of(small, 16).cut({"1.heads": torch.tensor([0, 2, 3, 6, 7])})
    network[1].out_proj.weight.view(16, 8, 4)[:, [1, 4, 5]] = 0
    torch.testing.assert_close(small(x), network(x), atol=1e-5, rtol=1e-4)


def test_a_network_is_cut_twice():
    network, x = network_of("medssm_unet linear_attention")
    once, twice = copy.deepcopy(network), copy.deepcopy(network)
    name = "encoder.stages.3.1.mixer.heads"
    groups_of(once, 2).cut({name: torch.tensor([1, 3])})
    groups_of(twice, 2).cut({name: torch.tensor([1, 2, 3])})
    groups_of(twice, 2).cut({name: torch.tensor([0, 2])})
    assert torch.equal(once(x)[0], twice(x)[0])


@torch.no_grad()
def test_cut_heads_turn_as_they_did_in_slabs_and_in_an_exported_program(tmp_path):
    network, x = network_of("medssm_unet linear_attention")
    kept = {f"encoder.stages.{stage}.1.mixer.heads": torch.tensor([0, 1, 3][: stage - 1]) for stage in (2, 3)}
    groups_of(network, 2).cut(kept)
    network.decoder.deep_supervision = False
    wanted = network(x[:1])
    volume = x[0].movedim(0, -1)
    with Scratch(2**30, tmp_path, "a") as scratch:
        found = streamed(network, View(volume.shape, lambda rows: volume[rows]), scratch, slab=20_000)
        torch.testing.assert_close(found[0 : len(volume)].movedim(-1, 0)[None], wanted, atol=1e-4, rtol=1e-4)
    exported = torch.export.export(network, (x[:1],)).module()
    torch.testing.assert_close(exported(x[:1]), wanted, atol=1e-5, rtol=1e-4)


def parameters(network):
    return sum(p.numel() for p in network.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "kinds", [("channels", "states", "heads"), *(pytest.param(kinds, marks=pytest.mark.thorough) for kinds in (("channels",), ("states", "heads")))]
)
def test_the_cut_network_is_the_whole_one_with_zeros(name, kinds):
    network, x = (part.double() for part in network_of(name))  # float32 adds fewer numbers in another order: up to 1e-4 apart
    generator = torch.Generator().manual_seed(1)
    kept = {group.name: some(group, generator) for group in groups_of(network, 2).all if group.kind in kinds}
    small = copy.deepcopy(network)
    groups_of(small, 2).cut(kept)
    assert not kept or parameters(small) < parameters(network)
    for found, wanted in zip(outputs(small, x), outputs(zeroed(network, kept), x), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-12 * float(wanted.abs().max()), rtol=0)


def outputs(network, x):
    y = network(x)
    return y if isinstance(y, list) else [y]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_but_the_ranks_is_in_a_group(name):
    network, _ = network_of(name)
    image = groups_of(network, 2)
    known = {(id(part.module), part.name) for group in image.all for part in group.slices}
    missing = [
        f"{path}.{key}"
        for path, module in network.named_modules()
        for key, _ in module.named_parameters(recurse=False)
        if (id(module), key) not in known
    ]
    assert [key for key in missing if not key.endswith(("o_norm.weight", "decay_in.bias", "adn.A.weight"))] == []


def test_channels_that_cannot_go_alone_are_one_clear_line():
    joined = nn.Sequential(nn.ConvTranspose2d(4, 8, 2, groups=2))
    with pytest.raises(UserError, match=r"^prune: 0: a transposed convolution of 2 groups of channels declares no coupled channels"):
        groups_of(joined, 4)
    network = networks.build("monai.networks.nets.BasicUNet", spatial_dims=2, in_channels=1, out_channels=2, upsample="pixelshuffle")
    with pytest.raises(UserError, match=r"^prune: SubpixelUpsample \(upcat_4\.upsample\.pixelshuffle\) does not say which of its channels"):
        groups_of(network, 1)
    parts = networks.build("monai.networks.nets.BasicUNet", spatial_dims=2, in_channels=1, out_channels=2, norm=["group", {"num_groups": 4}])
    groups = groups_of(parts, 1)
    assert {group.banks for group in groups.all if group.kind == "channels" and "upsample" not in group.name} == {4}


def test_a_network_that_declares_nothing_is_one_clear_line():
    with pytest.raises(UserError, match=r"^prune: Bilinear \(1\) does not say which of its channels belong together: expected a network of"):
        groups_of(nn.Sequential(nn.Linear(2, 2), nn.Bilinear(2, 2, 2)), 2)
