"""Laws of gated linear attention: what it is where the decay is special, and a volume streamed in slabs."""

from __future__ import annotations

import pytest
import torch

from medssm import backends, ops
from tests.ops.calls import DEVICE, SERVES

BACKENDS = [name for name, why in backends()["gated_linear_attention"].items() if why == "ok" and SERVES[name] == DEVICE]
every = pytest.mark.parametrize("backend", BACKENDS)


def draw(batch=2, length=70, heads=3, dk=6, dv=5):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, length, heads, d, generator=g).to(DEVICE) for d in (dk, dk, dv))
    return q, k, v


def masked_attention(q, k, v, weights):
    """scale (q k^T * weights) v with a causal mask; weights (b,h,l,l) or what broadcasts to it."""
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhts,bshv->bthv", (scores * weights).tril(), v)


@every
@pytest.mark.parametrize("per_key", [False, True])
def test_without_decay_it_is_masked_attention_without_softmax(backend, per_key):
    q, k, v = draw()
    g = torch.zeros_like(q if per_key else q[..., 0])
    out = ops.gated_linear_attention(q, k, v, g, backend=backend)
    torch.testing.assert_close(out, masked_attention(q, k, v, torch.ones(())), atol=2e-4, rtol=1e-4)


@every
def test_a_constant_decay_is_retention(backend):
    """RetNet, equation 5: the weight of what lies n steps back is gamma^n."""
    q, k, v = draw()
    gamma = 1 - 2.0 ** (-5 - torch.arange(3, device=DEVICE))
    steps = torch.arange(70, device=DEVICE)
    powers = gamma[:, None, None] ** (steps[:, None] - steps).clamp_min(0)
    out = ops.gated_linear_attention(q, k, v, gamma.log().expand(2, 70, 3), backend=backend)
    torch.testing.assert_close(out, masked_attention(q, k, v, powers), atol=2e-4, rtol=1e-4)


@every
def test_equal_decays_of_all_keys_are_one_decay_of_the_head(backend):
    q, k, v = draw()
    g = -q[..., 0].abs()
    one = ops.gated_linear_attention(q, k, v, g, backend=backend)
    torch.testing.assert_close(ops.gated_linear_attention(q, k, v, g[..., None].expand_as(q), backend=backend), one, atol=1e-5, rtol=1e-5)


@every
@pytest.mark.parametrize("per_key", [False, True])
@pytest.mark.parametrize("log_decay", [-50.0, -1000.0, float("-inf")])
def test_a_decay_that_forgets_everything_leaves_each_token_alone(backend, per_key, log_decay):
    q, k, v = (t.requires_grad_() for t in draw())
    g = torch.full_like(q if per_key else q[..., 0], log_decay).detach()
    out = ops.gated_linear_attention(q, k, v, g, backend=backend)
    alone = (q * k).sum(-1, keepdim=True) * v * q.shape[-1] ** -0.5
    torch.testing.assert_close(out, alone, atol=1e-5, rtol=1e-5)
    for got, want in zip(torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(alone.sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@every
def test_the_gradient_of_a_strong_decay_is_small_not_noise(backend):
    """It is that of what the decay let through; a step's own key and value, however large, have no part in it."""
    q, k, v = draw()
    for per_key in (False, True):
        g = torch.full_like(q if per_key else q[..., 0], -30.0).requires_grad_()
        out = ops.gated_linear_attention(q, k, 1000 * v, g, backend=backend)
        (gradient,) = torch.autograd.grad(out.sum(), g)
        assert gradient.abs().max() < 1e-6


@every
@pytest.mark.parametrize("reverse", [False, True])
def test_a_volume_streamed_in_slabs_equals_the_whole(backend, reverse):
    q, k, v = (t.unflatten(1, (7, 2, 5)) for t in draw())
    g = -q[..., 0].abs() * 0.1
    raster = dict(reverse=reverse, return_final_state=True, backend=backend)
    whole, final = ops.gated_linear_attention(*(t.flatten(1, 3) for t in (q, k, v, g)), **raster)
    state, outs = None, []
    slabs = [slice(0, 3), slice(3, 4), slice(4, 7)]
    for slab in reversed(slabs) if reverse else slabs:
        out, state = ops.gated_linear_attention(*(t[:, slab].flatten(1, 3) for t in (q, k, v, g)), initial_state=state, **raster)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs[::-1] if reverse else outs, 1), whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(state, final, atol=1e-4, rtol=1e-4)


def test_wrong_shapes_name_the_argument():
    q, k, v = draw()
    with pytest.raises(ValueError, match=r"g: expected \(2, 70, 3\) or \(2, 70, 3, 6\), got"):
        ops.gated_linear_attention(q, k, v, q[..., :2])
    with pytest.raises(ValueError, match=r"v: expected \(2, 70, 3, dv\), got"):
        ops.gated_linear_attention(q, k, v[:, :, :2], q[..., 0])
    with pytest.raises(ValueError, match="dk at least 1"):
        ops.gated_linear_attention(q[..., :0], k[..., :0], v, q[..., 0])
