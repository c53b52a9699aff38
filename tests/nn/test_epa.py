"""UNETR++'s paired attention: its formula, other grids, and upstream's order."""

import pytest
import torch

from medssm.nn import PairedAttention, PairedBlock


def drawn(**options):
    torch.manual_seed(0)
    return PairedAttention(8, (3, 4), 2, 5, **options).double(), torch.randn(2, 3, 4, 8, dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"shared": False}, {"bias": False, "fusion": "sum"}], ids=["paper", "apart", "sum"])
def test_paired_attention_is_its_formula(options):
    epa, x = drawn(**options)
    with torch.no_grad():
        epa.temperature.copy_(torch.tensor([0.5, 2.0]).view(2, 1, 1))
        epa.temperature2.copy_(torch.tensor([3.0, 0.7]).view(2, 1, 1))
    q, k, v, w = epa.qkvv(x).view(2, 12, 4, 2, 4).unbind(2)
    E = epa.projections["E"]
    F = epa.projections["E"] if epa.projections.get("F") is None else epa.projections["F"]
    space, channels = torch.zeros(2, 12, 2, 4, dtype=torch.float64), torch.zeros(2, 12, 2, 4, dtype=torch.float64)
    for b in range(2):
        for h in range(2):
            keys, values = E.T @ k[b, :, h], F.T @ w[b, :, h]
            if len(epa.biases):
                keys, values = keys + epa.biases["E"][:, None], values + epa.biases["F" if "F" in epa.biases else "E"][:, None]
            unit_q, unit_k = (t[b, :, h] / t[b, :, h].norm(dim=0) for t in (q, k))
            channels[b, :, h] = v[b, :, h] @ torch.softmax(epa.temperature[h] * unit_q.T @ unit_k, -1).T
            space[b, :, h] = torch.softmax(epa.temperature2[h] * unit_q @ keys.T, -1) @ values
    space, channels = space.flatten(2), channels.flatten(2)
    want = channels + space if epa.out_proj is None else torch.cat((epa.out_proj(space), epa.out_proj2(channels)), -1)
    torch.testing.assert_close(epa(x), want.view_as(x))


def test_upstreams_order_mixes_voxels_and_channels():
    epa, x = drawn(fusion="sum")
    right = epa(x).view(2, 12, 2, 4)
    epa.scrambled = True
    mixed = epa(x)
    epa.temperature2.data.zero_(), epa.biases["E"].data.zero_(), epa.projections["E"].data.zero_()
    channels = epa(x)  # the attention over space is zero
    space = right - channels.view(2, 12, 2, 4)
    torch.testing.assert_close(mixed, channels + space.permute(0, 3, 2, 1).reshape(2, 3, 4, 8))


def test_another_grid_takes_the_same_weighted_mean():
    epa, _ = drawn()
    x = torch.randn(1, 1, 1, 8, dtype=torch.float64).expand(1, 3, 4, 8)
    same = x.repeat(1, 2, 2, 1)
    with torch.no_grad():
        epa.projections["E"].copy_(torch.linspace(-1, 1, 12)[:, None].expand(12, 5))
        k = epa.qkvv(x).view(1, 12, 4, 2, 4)[:, :, 1].transpose(1, 2)
        wide = epa.qkvv(same).view(1, 48, 4, 2, 4)[:, :, 1].transpose(1, 2)
        torch.testing.assert_close(epa.project("E", same, wide), epa.project("E", x, k))


def test_weights_without_a_grid_fit_every_grid_of_their_number():
    torch.manual_seed(0)
    block = PairedBlock(8, (12,), 2, 5).eval()
    assert block(torch.randn(1, 8, 3, 2, 2)).shape == (1, 8, 3, 2, 2)
    with pytest.raises(ValueError, match=r"x: expected a map of 12 voxels, which the weights are made for, got \(3, 2, 3\)"):
        block(torch.randn(1, 8, 3, 2, 3))


def test_heads_that_do_not_divide_the_channels_are_named():
    with pytest.raises(ValueError, match="heads: expected a number that divides 8 channels, which are even, got 3"):
        PairedAttention(8, (3, 4), 3)
