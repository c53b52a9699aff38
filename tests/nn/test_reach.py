"""How far a mixer sees: values that are known, and the whole Jacobian of each op."""

import math
import threading

import pytest
import torch
from torch import nn

import medssm
from medssm import ops, orders
from medssm.nn import SSND, DeltaNet, GatedLinearAttention, LinearAttention, Mamba, Mamba2, Mamba3, SpatialMix
from medssm.nn.reach import influence, reach, share_by_distance, within

DECAY = -0.3


def constant(shape, channels=3, state=2):
    """A selective scan with the decay exp(DECAY) a step, and B, C and the step 1."""
    one = torch.ones(1, *shape, state, dtype=torch.float64)
    delta = torch.ones(1, *shape, channels, dtype=torch.float64)
    return delta, torch.full((channels, state), DECAY, dtype=torch.float64), one, one


@pytest.mark.parametrize("order", [orders.raster(), orders.snake(reverse=True), orders.hilbert(), orders.raster((2, 0, 1))])
def test_of_a_constant_decay_it_is_the_exponential_of_the_distance_along_the_walk(order):
    shape, target = (3, 4, 5), (1, 2, 3)
    h = influence("selective_scan", target, torch.randn(1, *shape, 3), *constant(shape), torch.ones(3), order=order)[0]
    steps = torch.empty(60, dtype=torch.int64)
    steps[order.index(shape)] = torch.arange(60)
    behind = steps.reshape(shape)[target] - steps.reshape(shape)
    wanted = torch.where(behind >= 0, 3 * 2 * torch.exp(DECAY * behind.double()), 0.0)
    torch.testing.assert_close(h, wanted)


def test_a_window_begins_anew():
    shape = (4, 4)
    h = influence("selective_scan", (3, 3), torch.randn(1, *shape, 3), *constant(shape), order=orders.window(2))[0]
    assert (h[2:, 2:] > 0).all() and h.count_nonzero() == 4


def test_what_is_no_state_has_no_influence():
    u = torch.randn(2, 7, 3, dtype=torch.float64)
    arguments = constant((7,))
    plain = influence("selective_scan", 4, u[:1], *arguments)
    full = influence(
        "selective_scan",
        4,
        u[:1],
        *arguments,
        torch.full((3,), 5.0),
        torch.randn(1, 7, 3),
        initial_state=torch.randn(1, 3, 2),
        return_final_state=True,
    )
    torch.testing.assert_close(full, plain)
    turned = influence(
        "selective_scan", 4, u[:1].mT, arguments[0].mT, arguments[1], *(t.mT for t in arguments[2:]), layout="bdl", order=orders.raster()
    )
    torch.testing.assert_close(turned, plain)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def _calls():
    b, l, h, n = 1, 6, 2, 3
    key = nn.functional.normalize(normal(b, l, h, n), dim=-1)
    shape = (2, 3)
    yield "selective_scan", "u", dict(u=normal(b, l, 4), delta=normal(b, l, 4), A=-normal(4, n).abs(), B=normal(b, l, n), C=normal(b, l, n))
    yield "ssd", "x", dict(x=normal(b, l, h, 4), dt=normal(b, l, h).abs(), A=-normal(h).abs(), B=normal(b, l, 1, n), C=normal(b, l, 1, n))
    ranks, tokens = (2, 2, 4), (b, l, h)
    rows = dict(B=normal(b, l, 2, 1, 4), C=normal(b, l, 2, 1, 4), dt=normal(*tokens).abs(), A=-normal(*tokens).abs(), trap=normal(*tokens))
    rows |= dict(x=normal(*tokens, 4), angles=normal(b, l, 2), mimo_x=normal(*ranks), pairs="halves")
    yield "ssd3", "x", rows | dict(mimo_o=normal(*ranks))
    yield "ssd3", "x", rows  # an output for each rank
    yield "gated_linear_attention", "v", dict(q=normal(b, l, h, n), k=key, v=normal(b, l, h, 4), g=-normal(b, l, h, n).abs())
    yield "delta_rule", "v", dict(q=normal(b, l, h, n), k=key, v=normal(b, l, h, 4), beta=torch.rand(b, l, h), g=-normal(b, l, h).abs())
    yield "linear_attention", "v", dict(q=normal(b, l, h, n), k=key, v=normal(b, l, h, 4))
    yield "linear_attention", "v", dict(q=normal(b, l, h, n), k=key, v=normal(b, l, h, 4), causal=True, reverse=True)
    yield "bi_wkv", "v", dict(w=normal(4).abs(), u=normal(4), k=normal(b, l, 4), v=normal(b, l, 4))
    yield "bi_wkv", "v", dict(w=normal(4), u=normal(4), k=normal(b, *shape, 4), v=normal(b, *shape, 4), order=orders.snake())


@pytest.mark.parametrize("op, name, call", list(_calls()), ids=lambda value: value if isinstance(value, str) else "")
def test_it_is_a_row_of_the_ops_jacobian(op, name, call):
    given = call[name]
    spatial = given.shape[1 : 3 if "order" in call else 2]
    whole = torch.autograd.functional.jacobian(lambda x: getattr(ops, op)(**{**call, name: x}), given)
    rows = whole.reshape(math.prod(spatial), -1, math.prod(spatial), given.numel() // math.prod(spatial)).abs()
    for token in range(math.prod(spatial)):
        target = tuple(int(i) for i in torch.unravel_index(torch.tensor(token), spatial))
        found = influence(op, target, **call)[0].flatten()
        torch.testing.assert_close(found, rows[token].sum((0, 2)), rtol=1e-6, atol=1e-9)  # over all pairs of channels: none meets another
    if call.get("reverse"):
        assert not influence(op, 4, **call)[0, :4].any()


def test_each_order_has_its_own():
    shape, walks = (3, 4), orders.cross2d()
    call = dict(delta=normal(1, *shape, 4, 2), A=-normal(4, 5, 2).abs(), B=normal(1, *shape, 4, 2), C=normal(1, *shape, 4, 2))
    call |= dict(delta_proj=normal(4, 5, 2), delta_softplus=True)
    x = normal(1, *shape, 5)
    h = influence("selective_scan_nd", (1, 2), x, orders=iter(walks), merge="mean", **call)
    assert h.shape == (1, 4, *shape)
    for i, order in enumerate(walks):
        one = {key: value[..., i, :] if isinstance(value, torch.Tensor) else value for key, value in call.items()}
        one |= {key: call[key][i] for key in ("A", "delta_proj")}
        torch.testing.assert_close(h[:, i], influence("selective_scan", (1, 2), x, order=order, **one) / 4)


def test_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"op: expected one of selective_scan, .*, got 'depthwise_conv'"):
        influence("depthwise_conv", 0)
    with pytest.raises(ValueError, match=r"target: expected a token of \(7,\), got \(7,\)"):
        influence("selective_scan", 7, torch.randn(1, 7, 3), *constant((7,)))
    network, x = SSND(4, 2, spatial_dims=2), torch.randn(1, 5, 6, 4)
    with pytest.raises(ValueError, match=r"target: expected a voxel of \(6, 4\), got \(6, 0\)"):
        reach(network, x, (6, 0))
    with pytest.raises(ValueError, match=r"x: expected one image"):
        reach(network, x.expand(2, -1, -1, -1), (1, 1))


class Around(nn.Module):
    """A mixer on (b, *spatial, c) as a network on (b, c, *spatial)."""

    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, x):
        return self.mixer(x.movedim(1, -1)).movedim(-1, 1)


MIXERS = {
    "ss_nd": (SSND(8, 4, spatial_dims=2), 4),
    "gla": (GatedLinearAttention(8, 2, spatial_dims=2), 4),
    "delta": (DeltaNet(8, 2, spatial_dims=2), 4),
    "mamba2": (Mamba2(8, 4, spatial_dims=2), 4),
    "mamba3": (Mamba3(8, 4, is_mimo=True, spatial_dims=2), 4),
    "mamba3_normed": (Mamba3(8, 4, is_mimo=True, is_outproj_norm=True, spatial_dims=2), 4),
    "mamba": (Mamba(8, 4), 1),
    "linear_attention": (LinearAttention(8, 2, 2), 1),
    "rwkv": (SpatialMix(8), 1),
}


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_of_a_network(name):
    mixer, count = MIXERS[name]
    before = {op: getattr(ops, op) for op in dir(ops)}
    found = reach(Around(mixer).eval(), torch.randn(1, 8, 5, 6), (2, 3))
    assert {op: getattr(ops, op) for op in dir(ops)} == before
    assert len(found) == count
    for one in found:
        assert one.layer == "mixer" and one.influence.shape == (5, 6) and one.target == (2, 3) and one.stride == (1, 1)
        assert one.influence[2, 3] > 0 and torch.isfinite(one.influence).all()
        if one.steps is None:
            assert name == "linear_attention" and one.order == "" and (one.influence > 0).all()
            continue
        assert one.steps[2, 3] == 0 and one.steps.abs().max() >= 15
        if name != "rwkv":  # which looks both ways
            assert not one.influence[one.steps < 0].any() and one.influence[one.steps > 0].any()


def test_a_network_with_strides_and_a_size_that_they_do_not_divide():
    network = medssm.create_model(
        "medssm_unet", spatial_dims=2, in_channels=1, out_channels=2, features=(4, 8, 8), depths=(0, 1, 1), decoder_depths=(1, 0)
    ).eval()
    found = reach(network, torch.randn(1, 1, 13, 18), (12, 9))
    assert [one.influence.shape for one in found] == [(4, 5)] * 4 and {one.target for one in found} == {(3, 2)}
    assert {one.stride for one in found} == {(4, 4)} and {one.layer for one in found} == {"encoder.stages.2.1.mixer"}
    away = found[0].distance((2.0, 0.5))
    assert away[3, 2] == 0 and away[0, 2] == 3 * 4 * 2.0 and away[3, 4] == 2 * 4 * 0.5


def test_an_op_that_fails_leaves_all_as_it_was_and_other_threads_are_not_seen():
    network, before = Around(SSND(8, 4, spatial_dims=2)), ops.selective_scan_nd
    other = threading.Thread(target=lambda: Around(SSND(8, 4, spatial_dims=2))(torch.randn(1, 8, 5, 6)))
    handle = network.register_forward_pre_hook(lambda *_: (other.start(), other.join())[:0] or None)
    assert len(reach(network, torch.randn(1, 8, 5, 6), (2, 3))) == 4
    handle.remove()
    with pytest.raises(RuntimeError):
        reach(network, torch.randn(1, 7, 5, 6), (2, 3))
    assert ops.selective_scan_nd is before and not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_the_distance_within_which_a_share_lies():
    h, away = torch.tensor([[1.0, 2.0], [6.0, 1.0]]), torch.tensor([[3.0, 1.0], [0.0, -3.0]])
    far, share = share_by_distance(h, away)
    assert far.tolist() == [0, 1, 3] and share.tolist() == pytest.approx([0.6, 0.8, 1.0])
    assert [within(h, away, part) for part in (0.5, 0.6, 0.7, 0.9, 1.0)] == [0, 0, 1, 3, 3]
    assert math.isnan(within(torch.zeros(2), torch.arange(2)))
