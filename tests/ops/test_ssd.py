"""What only ssd has: it is a selective scan with one rate a head, its steps are clamped, a volume may be streamed slab by slab."""

import math

import pytest
import torch
from torch.nn import functional

from medssm import backends, ops, orders
from tests.ops.calls import DEVICE, SERVES

BACKENDS = [name for name, device in SERVES.items() if device == DEVICE and backends()["ssd"][name] == "ok"]
every = pytest.mark.parametrize("backend", BACKENDS)


def draw(*shape):
    return torch.randn(shape).to(DEVICE)


def call(length, heads=4, size=5, groups=2, state=6):
    torch.manual_seed(0)
    return {
        "x": draw(2, length, heads, size),
        "dt": draw(2, length, heads),
        "A": -draw(heads).abs(),
        "B": draw(2, length, groups, state),
        "C": draw(2, length, groups, state),
    }


@every
@pytest.mark.parametrize("per_channel", [False, True])
def test_equals_a_selective_scan_with_one_rate_a_head(backend, per_channel):
    heads, size, state = 4, 5, 6
    given = call(70)
    D, z, bias, initial = draw(heads, size) if per_channel else draw(heads), draw(2, 70, heads, size), draw(heads), draw(2, heads, size, state)
    out, final = ops.ssd(**given, D=D, z=z, dt_bias=bias, dt_softplus=True, initial_state=initial, return_final_state=True, backend=backend)

    def spread(t):
        return t.repeat_interleave(size, -1)

    wanted, last = ops.selective_scan(
        given["x"].flatten(2),
        spread(given["dt"]),
        spread(given["A"])[:, None].expand(-1, state),
        given["B"],
        given["C"],
        D.flatten() if per_channel else spread(D),
        z.flatten(2),
        spread(bias),
        True,
        initial_state=initial.flatten(1, 2),
        return_final_state=True,
        backend="reference",
    )
    torch.testing.assert_close(out.flatten(2), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(final.flatten(1, 2), last, rtol=1e-4, atol=1e-5)


@every
def test_a_negative_step_is_clamped_to_zero(backend):
    given = call(20)
    given["dt"] = -given["dt"].abs()
    initial = draw(2, 4, 5, 6)
    _, final = ops.ssd(**given, initial_state=initial, return_final_state=True, backend=backend)
    torch.testing.assert_close(final, initial)


@every
def test_dt_limit_bounds_the_step_after_softplus_and_its_gradient(backend):
    given = call(30)
    leaves = [given["dt"].requires_grad_(), draw(4).requires_grad_()]
    s = functional.softplus(leaves[0] + leaves[1]).clamp(0.5, 1.0)
    bounded = ops.ssd(**given, dt_bias=leaves[1], dt_softplus=True, dt_limit=(0.5, 1.0), backend=backend)
    by_hand = ops.ssd(**{**given, "dt": s}, backend="reference")
    torch.testing.assert_close(bounded, by_hand, rtol=1e-4, atol=1e-5)
    for got, want in zip(torch.autograd.grad(bounded.square().sum(), leaves), torch.autograd.grad(by_hand.square().sum(), leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@every
def test_a_volume_streamed_slab_by_slab_equals_the_whole(backend):
    torch.manual_seed(0)
    x, dt, B, C = draw(1, 7, 4, 5, 2, 6), draw(1, 7, 4, 5, 2), draw(1, 7, 4, 5, 1, 8), draw(1, 7, 4, 5, 1, 8)
    A, raster = -draw(2).abs(), orders.raster()
    whole, last = ops.ssd(x, dt, A, B, C, dt_softplus=True, order=raster, return_final_state=True, backend=backend)
    state, slabs = None, []
    for begin, end in ((0, 3), (3, 4), (4, 7)):
        part = [t[:, begin:end] for t in (x, dt, B, C)]
        out, state = ops.ssd(*part[:2], A, *part[2:], dt_softplus=True, order=raster, initial_state=state, return_final_state=True, backend=backend)
        slabs.append(out)
    torch.testing.assert_close(torch.cat(slabs, 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


@every
def test_a_decay_that_kills_the_state_gives_no_nan(backend):
    given = call(90)
    given["A"] = torch.full((4,), -1e6, device=DEVICE)
    leaves = {k: t.requires_grad_() for k, t in given.items()}
    out = ops.ssd(**leaves, dt_softplus=True, backend=backend)
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), list(leaves.values())))


@pytest.mark.parametrize("limit", [(1.0, 0.0), 0.1, (0.0,), (math.nan, 1.0)])
def test_a_wrong_dt_limit_is_named(limit):
    with pytest.raises(ValueError, match=r"dt_limit: expected \(low, high\)"):
        ops.ssd(**call(3), dt_limit=limit)


def test_groups_that_do_not_divide_the_heads_are_named():
    with pytest.raises(ValueError, match=r"B: expected .* g dividing h = 4"):
        ops.ssd(**call(3, groups=3))
