"""The Mamba-3 mixer: the published formula, upstream's weight names, orders, steps, arguments."""

import math

import pytest
import torch
from torch.nn import functional

import medssm
from medssm import nn, orders

KINDS = {
    "one rank": {},
    "groups, all channels turn": {"ngroups": 2, "rope_fraction": 1.0},
    "norm": {"is_outproj_norm": True},
    "ranks": {"is_mimo": True, "mimo_rank": 3, "ngroups": 2},
    "ranks and norm": {"is_mimo": True, "mimo_rank": 2, "is_outproj_norm": True},
    "a rank of its own and norm": {"is_mimo": True, "mimo_rank": 1, "is_outproj_norm": True},
}


def made(options, **more):
    torch.manual_seed(0)
    mixer = nn.Mamba3(8, d_state=8, headdim=4, **options, **more)
    for p in mixer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return mixer


def formula(m, x):
    """The mixer's output for tokens (b, l, d_model), token by token, from its weights and the paper alone."""
    batch, length, _ = x.shape
    heads, n, size, ranks, groups = m.D.shape[0], m.d_state, 4, m.B_bias.shape[1], m.ngroups
    inner, rows, turning = heads * size, ranks * groups * n, m.in_proj.out_features - 2 * heads * size - 2 * ranks * groups * n - 3 * heads
    z, u, B, C, dt, a, trap, angles = functional.linear(x, m.in_proj.weight).split([inner, inner, rows, rows, heads, heads, heads, turning], -1)

    def normed(t, weight):
        t = t.view(batch, length, ranks, groups, n)
        t = t / (t.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        return t.repeat_interleave(heads // groups, 3)

    k, q = normed(B, m.B_norm.weight) + m.B_bias.transpose(0, 1), normed(C, m.C_norm.weight) + m.C_bias.transpose(0, 1)
    one = torch.ones(ranks, heads, size, dtype=x.dtype)
    to_x, to_z, to_o = (getattr(m, name).transpose(0, 1) if m.is_mimo else one for name in ("mimo_x", "mimo_z", "mimo_o"))
    z, v = z.view(batch, length, 1, heads, size) * to_z, u.view(batch, length, 1, heads, size) * to_x
    step = torch.log1p(torch.exp(dt + m.dt_bias))
    A, mix = -torch.where(a >= 0, 1 + a, 1 / (1 - a.clamp_max(0))), 1 / (1 + torch.exp(-trap))
    turn = torch.cumsum(math.pi * torch.tanh(angles)[:, :, None] * step[..., None], 1)
    first = torch.arange(turning) if m.is_mimo else 2 * torch.arange(turning)
    second = first + (n // 2 if m.is_mimo else 1)

    def turned(t):
        cos, sin, out = turn.cos()[:, :, None], turn.sin()[:, :, None], t.clone()
        out[..., first], out[..., second] = t[..., first] * cos - t[..., second] * sin, t[..., first] * sin + t[..., second] * cos
        return out

    k, q = turned(k), turned(q)
    S, y = torch.zeros(batch, heads, size, n, dtype=x.dtype), []
    for t in range(length):
        decay = torch.exp(step[:, t] * A[:, t])
        S = decay[..., None, None] * S
        if t:
            S = S + ((1 - mix[:, t]) * step[:, t] * decay)[..., None, None] * torch.einsum("brhp,brhn->bhpn", v[:, t - 1], k[:, t - 1])
        S = S + (mix[:, t] * step[:, t])[..., None, None] * torch.einsum("brhp,brhn->bhpn", v[:, t], k[:, t])
        y.append(torch.einsum("bhpn,brhn->brhp", S, q[:, t]) + m.D[:, None] * v[:, t])
    y = torch.stack(y, 1)
    if m.is_outproj_norm:
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.norm.weight.view(heads, size)
    y = (y * z * torch.sigmoid(z) * to_o).sum(2)
    return functional.linear(y.flatten(-2), m.out_proj.weight)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("kind", KINDS)
def test_is_its_formula(kind, backend):
    mixer, x = made(KINDS[kind], orders=[orders.raster()]).double(), torch.randn(2, 7, 8, dtype=torch.float64)
    with medssm.use_backend(backend, strict=True):
        y = mixer(x)
    torch.testing.assert_close(y, formula(mixer, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_the_scan(kind):
    mixer, x = made(KINDS[kind], orders=[orders.raster()]).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    state, outs = mixer.allocate_inference_cache(2), []
    for token in x.unbind(1):
        out, *state = mixer.step(token, *state)
        outs.append(out)
    torch.testing.assert_close(torch.stack(outs, 1), mixer(x), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match=r"orders: expected \[raster\(\)\], since only a forward scan runs token by token"):
        made({}).step(x[:, 0].float(), *state)


def test_has_upstreams_weights():
    mixer = nn.Mamba3(32, d_state=16, headdim=16, ngroups=2, is_mimo=True, mimo_rank=3, is_outproj_norm=True)
    assert {k: tuple(v.shape) for k, v in mixer.state_dict().items()} == {
        "dt_bias": (4,),
        "B_bias": (4, 3, 16),
        "C_bias": (4, 3, 16),
        "mimo_x": (4, 3, 16),
        "mimo_z": (4, 3, 16),
        "mimo_o": (4, 3, 16),
        "D": (4,),
        "in_proj.weight": (2 * 64 + 2 * 96 + 12 + 4, 32),
        "B_norm.weight": (16,),
        "C_norm.weight": (16,),
        "norm.weight": (64,),
        "out_proj.weight": (32, 64),
    }


def test_two_directions_are_the_mean_of_flips():
    both, one = made({}), made({}, orders=[orders.raster()])
    x = torch.randn(2, 17, 8)
    torch.testing.assert_close(both(x), (one(x) + one(x.flip(1)).flip(1)) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dims, count", [(1, 2), (2, 4), (3, 6)])
def test_orders_by_spatial_dims(dims, count):
    mixer, x = nn.Mamba3(10, d_state=4, spatial_dims=dims), torch.randn(1, *(3, 4, 5)[:dims], 10)
    assert len(mixer.orders) == count and mixer(x).shape == x.shape
    assert mixer.headdim == 4  # the largest divisor of 64 that divides 20 channels


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_weight_under_autocast(kind):
    mixer, x = made(KINDS[kind], spatial_dims=2), torch.randn(1, 4, 5, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x)
    y.float().square().sum().backward()
    for name, p in mixer.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, name
    assert torch.isfinite(x.grad).all()


def test_starts_with_upstreams_steps_and_weights():
    mixer = nn.Mamba3(256, headdim=4, is_mimo=True)
    dt = functional.softplus(mixer.dt_bias)
    assert dt.min() >= 1e-4 and dt.max() <= 0.1 + 1e-6
    assert (mixer.B_bias == 1).all() and (mixer.D == 1).all() and (mixer.mimo_x == 0.25).all() and (mixer.mimo_z == 1).all()


def test_wrong_arguments_are_named():
    for text, options in (
        ("headdim: expected a divisor of the 16 inner channels, got 5", {"headdim": 5}),
        ("ngroups: expected a divisor of the 4 heads, got 3", {"headdim": 4, "ngroups": 3}),
        ("rope_fraction: expected 0.5 or 1, got 0.25", {"rope_fraction": 0.25}),
        ("d_state: expected at least 4 to turn, got 3", {"d_state": 3}),
        ("d_state: expected at least 2, an even number, to turn, got 7", {"d_state": 7, "rope_fraction": 1.0, "is_mimo": True}),
        ("orders: expected a list of orders for spatial_dims=4", {"spatial_dims": 4}),
    ):
        with pytest.raises(ValueError, match=text):
            nn.Mamba3(8, **options)
