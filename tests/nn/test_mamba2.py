"""The Mamba-2 mixer: upstream's numbers and weight names, orders, arguments."""

import math

import pytest
import torch

import medssm
from medssm import nn, orders

# The last token's output of transformers' Mamba2Mixer (its PyTorch path) for the weights of `waves`, by groups and dt_limit.
UPSTREAM = {
    (1, (0.0, math.inf)): [0.029168, -0.241058, -0.12704, 0.189478, 0.20397, -0.106664, -0.247277, 0.006267],
    (2, (0.4, 0.7)): [-0.302077, -0.264768, 0.194578, 0.343769, -0.055005, -0.366102, -0.093636, 0.328084],
}


def waves(state):
    """Weights that any program can make: 0.3 sin(0.7 j + i), i the weight's place by name, j the element's."""
    named = enumerate(sorted(state.items()))
    return {k: 0.3 * torch.sin(0.7 * torch.arange(t.numel(), dtype=torch.float64) + i).view(t.shape) for i, (k, t) in named}


@pytest.mark.parametrize("groups, dt_limit", UPSTREAM)
def test_equals_upstream(groups, dt_limit):
    mixer = nn.Mamba2(8, d_state=5, headdim=4, ngroups=groups, dt_limit=dt_limit, orders=[orders.raster()]).double()
    mixer.load_state_dict(waves(mixer.state_dict()))
    y = mixer(torch.cos(0.9 * torch.arange(2 * 7 * 8, dtype=torch.float64)).view(2, 7, 8))
    torch.testing.assert_close(y[1, -1], torch.tensor(UPSTREAM[groups, dt_limit], dtype=torch.float64), rtol=0, atol=2e-6)


def test_has_upstreams_weights():
    shapes = {k: tuple(v.shape) for k, v in nn.Mamba2(32, d_state=16, ngroups=1, headdim=16, D_has_hdim=True, bias=True).state_dict().items()}
    assert shapes == {
        "dt_bias": (4,),
        "A_log": (4,),
        "D": (64,),
        "in_proj.weight": (164, 32),
        "in_proj.bias": (164,),
        "conv1d.weight": (96, 1, 4),
        "conv1d.bias": (96,),
        "norm.weight": (64,),
        "out_proj.weight": (32, 64),
        "out_proj.bias": (32,),
    }


def test_two_directions_are_the_mean_of_flips_before_the_norm():
    torch.manual_seed(0)
    both, one = nn.Mamba2(12, d_state=6, headdim=8, rmsnorm=False), nn.Mamba2(12, d_state=6, headdim=8, rmsnorm=False, orders=[orders.raster()])
    one.load_state_dict(both.state_dict())
    x = torch.randn(2, 17, 12)
    torch.testing.assert_close(both(x), (one(x) + one(x.flip(1)).flip(1)) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dims, count", [(1, 2), (2, 4), (3, 6)])
def test_orders_by_spatial_dims(dims, count):
    mixer, x = nn.Mamba2(10, d_state=4, spatial_dims=dims), torch.randn(1, *(3, 4, 5)[:dims], 10)
    assert len(mixer.orders) == count and mixer(x).shape == x.shape
    assert mixer.headdim == 4  # the largest divisor of 64 that divides 20 channels


@pytest.mark.parametrize("options", [{}, {"rmsnorm": False}, {"norm_before_gate": True, "ngroups": 2, "D_has_hdim": True}])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_gradients_reach_every_weight_under_autocast(options, backend):
    torch.manual_seed(0)
    mixer, x = nn.Mamba2(8, d_state=5, headdim=4, spatial_dims=2, **options), torch.randn(1, 4, 5, 8, requires_grad=True)
    if medssm.backends()["ssd"][backend] != "ok":
        pytest.skip(medssm.backends()["ssd"][backend])
    with medssm.use_backend(backend, strict=True), torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x)
    y.float().square().sum().backward()
    for name, p in mixer.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, name
    assert torch.isfinite(x.grad).all()


def test_starts_with_upstreams_steps_and_rates():
    mixer = nn.Mamba2(256, headdim=4)
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert dt.min() >= 1e-4 and dt.max() <= 0.1 + 1e-6
    rates = torch.exp(mixer.A_log)
    assert rates.min() >= 1 and rates.max() <= 16 and rates.std() > 1


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="headdim: expected a divisor of the 16 inner channels, got 5"):
        nn.Mamba2(8, headdim=5)
    with pytest.raises(ValueError, match="ngroups: expected a divisor of the 4 heads, got 3"):
        nn.Mamba2(8, headdim=4, ngroups=3)
    with pytest.raises(ValueError, match="orders: expected a list of orders for spatial_dims=4"):
        nn.Mamba2(8, spatial_dims=4)
