"""Mixers: directions as orders, weight names, any size, autocast."""

import pytest
import torch

import medssm
from medssm import nn, orders


def flipped(mixer: nn.BiMamba, x):
    """What upstream does: two mixers, one on the flipped sequence, flipped back, added before out_proj."""
    one, two = (nn.Mamba(x.shape[-1]) for _ in range(2))
    state = mixer.state_dict()
    names = [k for k in one.state_dict() if k not in ("in_proj.weight", "out_proj.weight")]
    for m, suffix in ((one, ""), (two, "_b")):
        own = {}
        for k in names:
            stem, dot, leaf = k.partition(".")
            own[k] = state["A" + suffix + "_log" if k == "A_log" else stem + suffix + dot + leaf]
        m.load_state_dict(own | {"in_proj.weight": state["in_proj.weight"], "out_proj.weight": state["out_proj.weight"]})
    return one(x) + two(x.flip(1)).flip(1)


def test_bidirectional_equals_flips():
    torch.manual_seed(0)
    mixer, x = nn.BiMamba(12), torch.randn(2, 17, 12)
    torch.testing.assert_close(mixer(x), flipped(mixer, x), rtol=1e-4, atol=1e-5)


def test_tri_mamba_takes_any_depth():
    torch.manual_seed(0)
    mixer = nn.TriMamba(8)
    x = torch.randn(1, 3, 4, 5, 8)
    by_depth = nn.TriMamba(8, slices=3)
    by_depth.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(mixer(x), by_depth(x.flatten(1, 3)).view_as(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
def test_ssnd_equals_a_sum_of_single_scans(dims):
    torch.manual_seed(0)
    mixer, x = nn.SSND(8, d_state=4, spatial_dims=dims), torch.randn(2, *(3, 4, 5)[:dims], 8)
    k = len(mixer.orders)
    assert k == 2 * dims
    total = 0
    for i, order in enumerate(mixer.orders):
        one = nn.SSND(8, d_state=4, spatial_dims=dims, orders=[order])
        state = mixer.state_dict()
        for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias"):
            state[name] = state[name][i : i + 1]
        for name in ("A_logs", "Ds"):
            state[name] = state[name].unflatten(0, (k, -1))[i]
        one.load_state_dict(state)
        one.out_norm, one.out_proj = torch.nn.Identity(), torch.nn.Identity()
        total = total + one(x)
    z = mixer.in_proj(x).chunk(2, -1)[1]
    gate = torch.nn.functional.silu(z)
    torch.testing.assert_close(mixer(x), mixer.out_proj(mixer.out_norm(total / gate) * gate), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(
    "make", [lambda: nn.Mamba(8), lambda: nn.BiMamba(8), lambda: nn.TriMamba(8), lambda: nn.FlipMamba(8), lambda: nn.SSND(8, spatial_dims=3)]
)
def test_gradients_reach_every_weight_under_autocast(make, backend):
    torch.manual_seed(0)
    mixer, x = make(), torch.randn(1, 3, 4, 5, 8, requires_grad=True)
    with medssm.use_backend(backend, strict=True), torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x)
    y.float().square().sum().backward()
    for name, p in mixer.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, name
    assert torch.isfinite(x.grad).all()


def test_mamba_starts_with_mambas_steps_and_rates():
    torch.manual_seed(0)
    mixer = nn.Mamba(64)
    dt = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert dt.min() >= 1e-4 and dt.max() <= 0.1 + 1e-6
    torch.testing.assert_close(torch.exp(mixer.A_log[3]), torch.arange(1.0, 17.0))
    assert mixer.dt_rank == 4


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="dt_init: expected 'random' or 'constant'"):
        nn.Mamba(8, dt_init="zeros")
    with pytest.raises(ValueError, match="orders: expected a list of orders for spatial_dims=1"):
        nn.SSND(8, spatial_dims=1)
    with pytest.raises(ValueError, match="walks 3 spatial axes"):
        nn.SSND(8, spatial_dims=2, orders=[orders.raster((0, 1, 2))])(torch.randn(1, 4, 4, 8))


def test_ssnd_on_sequences():
    mixer, x = nn.SSND(8, spatial_dims=1, orders=[orders.raster()]), torch.randn(2, 7, 8)
    u = torch.nn.functional.silu(mixer.conv1d(mixer.in_proj(x)[..., :16].mT).mT)
    torch.testing.assert_close(mixer._local(mixer.in_proj(x)[..., :16]), u)
    assert mixer(x).shape == x.shape


@pytest.mark.parametrize("gate", ["silu", "linear", None])
def test_ssnd_gates(gate):
    torch.manual_seed(0)
    mixer = nn.SSND(8, d_state=4, gate=gate, d_conv=1)
    x = torch.randn(2, 5, 6, 8)
    inside = {}
    mixer.out_norm.register_forward_hook(lambda module, args, out: inside.update(y=out))
    out = mixer(x)
    z = mixer.in_proj(x)[..., 16:]
    wanted = inside["y"] * {"silu": torch.nn.functional.silu(z), "linear": z, None: 1.0}[gate]
    torch.testing.assert_close(out, mixer.out_proj(wanted))
    assert mixer.in_proj.out_features == (16 if gate is None else 32) and not any("conv" in name for name, _ in mixer.named_modules())


def test_an_unknown_gate_is_named():
    with pytest.raises(ValueError, match="gate: expected 'silu', 'linear' or None, got 'relu'"):
        nn.SSND(8, gate="relu")
