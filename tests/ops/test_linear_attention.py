"""linear_attention: what it computes, by quadratic attention, and what it refuses. The contract suite covers the rest."""

from __future__ import annotations

import pytest
import torch

import medssm
from medssm.ops import linear_attention, linear_attention_step

both = pytest.mark.parametrize("backend", ["reference", "native"])


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(length=23, heads=4, groups=4, dk=6, dv=5, batch=2):
    return draw(batch, length, heads, dk), draw(batch, length, groups, dk, seed=1), draw(batch, length, groups, dv, seed=2)


def angles(*shape):
    theta = draw(*shape, seed=3).repeat_interleave(2, -1)
    return theta.cos(), theta.sin()


def turn(x, cos, sin):
    """The rotation by complex numbers."""
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(cos[..., ::2], sin[..., ::2])
    return torch.view_as_real(turned).flatten(-2)


def quadratic(q, k, v, q_turned, k_turned, mask=None, eps=1e-6):
    """Through the whole matrix of weights."""
    weights, plain = (torch.einsum("blhd,bmhd->bhlm", a, b) for a, b in ((q_turned, k_turned), (q, k)))
    if mask is not None:
        weights, plain = weights * mask, plain * mask
    return torch.einsum("bhlm,bmhd->blhd", weights, v) / (plain.sum(-1) + eps).transpose(1, 2).unsqueeze(-1)


def elu(x):
    return torch.nn.functional.elu(x) + 1


@both
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
def test_equals_quadratic_attention(backend, causal, rotary):
    """Masked where causal; the rotation in the numerator alone."""
    q, k, v = inputs()
    pair = angles(23, 4, 3) if rotary else None
    turned = [turn(elu(t), *pair) if rotary else elu(t) for t in (q, k)]
    want = quadratic(elu(q), elu(k), v, *turned, torch.ones(23, 23, dtype=torch.float64).tril() if causal else None)
    torch.testing.assert_close(linear_attention(q, k, v, rotary=pair, causal=causal, backend=backend), want)


@both
@pytest.mark.parametrize("causal", [False, True])
def test_a_feature_map_may_be_a_function(backend, causal):
    q, k, v = inputs()
    torch.testing.assert_close(
        linear_attention(q, k, v, feature_map=elu, causal=causal, backend=backend), linear_attention(q, k, v, causal=causal, backend=backend)
    )
    wider = linear_attention(q, k, v, feature_map=lambda x: torch.cat([x.relu(), (-x).relu()], -1) + 0.1, causal=causal, backend=backend)
    assert wider.shape == v.shape


@both
def test_the_lengths_of_q_and_k_may_differ(backend):
    q, (_, k, v) = draw(2, 7, 4, 6, seed=4), inputs()
    torch.testing.assert_close(linear_attention(q, k, v, backend=backend), quadratic(elu(q), elu(k), v, elu(q), elu(k)))
    image = linear_attention(
        q[:, :6].unflatten(1, (2, 3)), k[:, :20].unflatten(1, (4, 5)), v[:, :20].unflatten(1, (4, 5)), order=medssm.orders.raster(), backend=backend
    )
    torch.testing.assert_close(image.flatten(1, 2), linear_attention(q[:, :6], k[:, :20], v[:, :20], backend=backend))


@both
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads_share_keys_and_values(backend, causal):
    q, k, v = inputs(heads=6, groups=2)
    repeated = (t.repeat_interleave(3, 2) for t in (k, v))
    out, (kv, z) = linear_attention(q, k, v, causal=causal, return_final_state=True, backend=backend)
    torch.testing.assert_close(out, linear_attention(q, *repeated, causal=causal, backend=backend))
    assert kv.shape == (2, 2, 6, 5) and z.shape == (2, 2, 6)


@both
def test_neither_order_nor_reverse_matter_to_sums_over_all_tokens(backend):
    q, k, v = inputs()
    want = linear_attention(q, k, v, backend=backend)
    assert torch.equal(linear_attention(q, k, v, order=torch.randperm(23), reverse=True, backend=backend), want)
    assert torch.equal(linear_attention(q, k, v, order=medssm.orders.window(4), backend=backend), want)


@both
def test_causal_sums_begin_anew_with_the_order(backend):
    q, k, v = inputs(length=6)
    windows = linear_attention(q, k, v, causal=True, order=medssm.orders.window(3), backend=backend)
    starts = medssm.orders.window(3).starts((6,)).tolist()
    for begin, end in zip(starts, [*starts[1:], 6], strict=True):
        torch.testing.assert_close(windows[:, begin:end], linear_attention(*(t[:, begin:end] for t in (q, k, v)), causal=True, backend=backend))


@both
@pytest.mark.parametrize("causal", [False, True])
def test_a_volume_streamed_slab_by_slab_equals_the_whole(backend, causal):
    """Causal in one pass; else a first pass adds the slabs' sums up, and the second, with nothing left to add, reads them."""
    q, k, v = (t.unflatten(1, (4, 3, 2)) for t in inputs(length=24))
    pair = angles(4, 3, 2, 3)
    options = {"causal": causal, "order": medssm.orders.raster(), "backend": backend}
    whole, total = linear_attention(q, k, v, rotary=pair, return_final_state=True, **options)
    state, outs = None, []
    for i in range(4):
        slab = [t[:, i : i + 1] for t in (q, k, v)]
        out, state = linear_attention(*slab, rotary=tuple(t[i : i + 1] for t in pair), initial_state=state, return_final_state=True, **options)
        outs.append(out)
    torch.testing.assert_close(state, total)
    if causal:
        torch.testing.assert_close(torch.cat(outs, 1), whole)
    else:
        plain, totals = linear_attention(q, k, v, return_final_state=True, **options)
        nothing = [t[:, :0].flatten(1, 3) for t in (k, v)]
        torch.testing.assert_close(linear_attention(q.flatten(1, 3), *nothing, initial_state=totals, backend=backend), plain.flatten(1, 3))


@both
def test_rotary_steps_equal_causal_attention(backend):
    q, k, v = inputs(length=5)
    cos, sin = angles(5, 4, 3)
    want, final = linear_attention(q, k, v, rotary=(cos, sin), causal=True, return_final_state=True, backend=backend)
    state, outs = tuple(map(torch.zeros_like, final)), []
    for t in range(5):
        out, state = linear_attention_step(state, q[:, t], k[:, t], v[:, t], rotary=(cos[t], sin[t]), backend=backend)
        outs.append(out)
    torch.testing.assert_close(torch.stack(outs, 1), want)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("causal", [False, True])
def test_two_million_tokens_stay_accurate(causal):
    """All but constant keys and values, whose float32 sums would drift: k' near 2 and v near 1, so that the mean is known at every step."""
    length = 2_000_000
    k = 1 + 1e-3 * torch.randn(1, length, 1, 2, generator=torch.Generator().manual_seed(0))
    v = 1 + 1e-3 * torch.randn(1, length, 1, 1, generator=torch.Generator().manual_seed(1))
    out, (kv, z) = linear_attention(torch.ones(1, length, 1, 2), k, v, causal=causal, return_final_state=True, backend="native")
    features, values = k.double() + 1, v.double()
    products = (features * values).sum(1).flatten()
    assert ((kv.flatten() - products) / products).abs().max() < 1e-5 and ((z.flatten() - features.sum(1).flatten()) / z.flatten()).abs().max() < 1e-5
    weights = features.sum(-1, keepdim=True)
    want = (weights * values).cumsum(1) / weights.cumsum(1) if causal else (weights * values).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    assert (out - want).abs().max() < 1e-5


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_with_a_rotation_under_compile(causal):
    q, k, v = (t.float().requires_grad_() for t in inputs())
    pair = tuple(t.float() for t in angles(23, 3))

    def run(q, k, v):
        return linear_attention(q, k, v, rotary=pair, causal=causal, backend="native").square().sum()

    got = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v), (q, k, v))
    for g, w in zip(got, torch.autograd.grad(run(q, k, v), (q, k, v)), strict=True):
        torch.testing.assert_close(g, w)


def zeros(*shape):
    return torch.zeros(shape)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": zeros(2, 5, 24)}, r"q: expected \(b, l, h, dk\), got \(2, 5, 24\)"),
        ({"k": zeros(2, 5, 4, 7)}, r"k: expected \(2, l, g, 6\), got \(2, 5, 4, 7\)"),
        ({"k": zeros(2, 5, 3, 6), "v": zeros(2, 5, 3, 5)}, r"k: expected \(b, l, g, dk\) with g dividing h = 4, got \(2, 5, 3, 6\)"),
        ({"q": zeros(2, 3, 4, 6), "causal": True}, r"k: expected the tokens of q, \(3,\), got \(5,\)"),
        ({"v": zeros(2, 5, 2, 5)}, r"v: expected \(2, 5, 4, dv\), got \(2, 5, 2, 5\)"),
        ({"rotary": (zeros(5, 3), zeros(5, 6))}, r"rotary: expected \(5, 6\) or \(5, 4, 6\)"),
        ({"rotary": (zeros(5, 6).requires_grad_(), zeros(5, 6))}, "rotary: expected constants, got tensors that require a gradient"),
        ({"q": zeros(2, 3, 4, 6), "rotary": (zeros(5, 6), zeros(5, 6))}, r"k: expected the tokens of q, \(3,\), got \(5,\)"),
        ({"initial_state": (zeros(2, 4, 6, 5), zeros(2, 4, 5))}, r"initial_state: expected \(2, 4, 6\), got \(2, 4, 5\)"),
        ({"feature_map": "softmax"}, "feature_map: expected 'elu' or 'relu' or None, got 'softmax'"),
        ({"backend": "cuda"}, "backend='cuda' cannot serve this linear_attention"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        linear_attention(**{"q": zeros(2, 5, 4, 6), "k": zeros(2, 5, 4, 6), "v": zeros(2, 5, 4, 5), **change})


def test_a_pair_is_a_pair():
    q, k, v = inputs()
    with pytest.raises(TypeError, match="initial_state: expected a pair of tensors"):
        linear_attention(q, k, v, initial_state=zeros(2, 4, 6, 5))
    with pytest.raises(TypeError, match="rotary: expected a pair of tensors"):
        linear_attention(q, k, v, rotary=(zeros(23, 6),))
