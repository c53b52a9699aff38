"""DeltaNet: orders, convolutions, gradients, arguments."""

import math

import pytest
import torch

import medssm
from medssm import nn, ops, orders


@pytest.mark.parametrize("conv", ["space", "order", None])
def test_orders_are_averaged_before_the_norm(conv):
    torch.manual_seed(0)
    both = [orders.raster(), orders.raster(reverse=True)]
    mixer, x = nn.DeltaNet(12, 3, conv=conv, gate=None, orders=both), torch.randn(2, 4, 5, 12)
    mixer.o_norm, mixer.o_proj = torch.nn.Identity(), torch.nn.Identity()
    total = 0
    for order in both:
        mixer.orders = [order]
        total = total + mixer(x)
    mixer.orders = both
    torch.testing.assert_close(mixer(x), total / 2, rtol=1e-4, atol=1e-5)


def test_a_value_is_recalled_for_its_key():
    """beta 1, no decay, no convolution: a token asks for its own key and gets back its value, whatever came before."""
    torch.manual_seed(0)
    mixer = nn.DeltaNet(8, 2, gated=False, gate=None, conv=None, orders=[orders.raster()])
    mixer.o_norm, mixer.o_proj = torch.nn.Identity(), torch.nn.Identity()
    with torch.no_grad():
        mixer.qkv_proj.weight[:8] = mixer.qkv_proj.weight[8:16]  # queries are keys
        mixer.b_proj.weight[:] = 0
        mixer.b_proj.weight[:, 0] = 1
    x = torch.randn(1, 3, 4, 8)
    x[..., 0] = 30
    values = torch.nn.functional.silu(mixer.qkv_proj(x)[..., 16:])
    torch.testing.assert_close(mixer(x) * 4**0.5, values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("options", [{}, {"gated": False, "conv": "order", "d_conv": 4}, {"expand_k": 0.5, "gate": None}])
def test_gradients_reach_every_weight_under_autocast(dims, backend, options):
    torch.manual_seed(0)
    mixer, x = nn.DeltaNet(8, 2, spatial_dims=dims, **options), torch.randn(1, *(3, 4, 5)[:dims], 8, requires_grad=True)
    with medssm.use_backend(backend, strict=True), torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x)
    assert y.shape == x.shape
    (y.float() * torch.randn(y.shape)).sum().backward()
    for name, p in mixer.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, name
    assert torch.isfinite(x.grad).all()


def test_backends_agree():
    torch.manual_seed(0)
    mixer, x = nn.DeltaNet(24, 2, spatial_dims=3), torch.randn(1, 4, 3, 5, 24)
    with medssm.use_backend("reference", strict=True):
        want = mixer(x)
    with medssm.use_backend("native", strict=True):
        torch.testing.assert_close(mixer(x), want, rtol=1e-4, atol=1e-5)


def scan(rule):
    """A layer of one order, its input, and its queries, keys and values."""
    torch.manual_seed(0)
    mixer = nn.DeltaNet(8, 2, rule=rule, gate=None, conv=None, orders=[orders.raster()])
    x = torch.randn(1, 2, 3, 8)
    q, k, v = mixer._heads(torch.nn.functional.silu(mixer.qkv_proj(x)))
    return mixer, x, q, k, v


def test_kda_has_a_decay_for_each_key():
    mixer, x, q, k, v = scan("kda")
    decay = -mixer.A_log.exp()[:, None] * torch.nn.functional.softplus(mixer.a_proj(x) + mixer.dt_bias).unflatten(-1, (2, 4))
    want = ops.delta_rule(q, k, v, mixer.b_proj(x).sigmoid(), g=decay, order=orders.raster())
    torch.testing.assert_close(mixer(x), mixer.o_proj(mixer.o_norm(want).flatten(-2)))


def test_gdn2_erases_and_writes_by_gates_of_their_own():
    mixer, x, q, k, v = scan("gdn2")
    decay = -mixer.A_log.exp()[:, None] * torch.nn.functional.softplus(mixer.a_proj(x) + mixer.dt_bias).unflatten(-1, (2, 4))
    b, w = (project(x).sigmoid().unflatten(-1, (2, 4)) for project in (mixer.b_proj, mixer.w_proj))
    want = ops.delta_rule(q, k, v, torch.ones(1, 2, 3, 2), g=decay, erase=b * k, write=w, order=orders.raster())
    torch.testing.assert_close(mixer(x), mixer.o_proj(mixer.o_norm(want).flatten(-2)))


def test_rwkv7_erases_a_key_in_part():
    mixer, x, q, k, v = scan("rwkv7")
    torch.nn.init.normal_(mixer.k_a)
    decay = -(math.e**-0.5) * torch.sigmoid(mixer.a_proj(x) + mixer.dt_bias).unflatten(-1, (2, 4))
    b = mixer.b_proj(x).sigmoid().unflatten(-1, (2, 4))
    written = k * (1 + (b - 1) * mixer.k_a.view(2, 4))
    options = {"g": decay, "erase": k, "erase_out": b * k, "erase_first": True, "order": orders.raster()}
    want = ops.delta_rule(q, written, v, torch.ones(1, 2, 3, 2), **options)
    torch.testing.assert_close(mixer(x), mixer.o_proj(mixer.o_norm(want).flatten(-2)))


def test_starts_with_mambas_steps():
    torch.manual_seed(0)
    dt = torch.nn.functional.softplus(nn.DeltaNet(64, 32).dt_bias)
    assert dt.min() >= 0.001 - 1e-6 and dt.max() <= 0.1 + 1e-6


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="heads: expected a number that divides 8 channels of keys and 8 of values, got 3"):
        nn.DeltaNet(8, 3)
    with pytest.raises(ValueError, match="conv: expected 'space', 'order' or None, got 'time'"):
        nn.DeltaNet(8, conv="time")
    with pytest.raises(ValueError, match="rule: expected one of delta, kda, gdn2, rwkv7, got 'comba'"):
        nn.DeltaNet(8, rule="comba")
    with pytest.raises(ValueError, match="gated: expected True with rule='kda', got False"):
        nn.DeltaNet(8, rule="kda", gated=False)
    with pytest.raises(ValueError, match="gate: expected 'silu' or None, got 'relu'"):
        nn.DeltaNet(8, gate="relu")
    with pytest.raises(ValueError, match="orders: expected a list of orders for spatial_dims=1"):
        nn.DeltaNet(8, spatial_dims=1)
