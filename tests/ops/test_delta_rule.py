"""What only the delta rule does: it replaces what the state holds for a key."""

import pytest
import torch
from torch.nn import functional

from medssm import orders
from medssm.ops import delta_rule, gated_linear_attention
from tests.ops.cases import DEVICE, available

every = pytest.mark.parametrize("backend", [backend for op, backend in available() if op == "delta_rule"])


def draw(batch, length, heads, dk, dv, seed=0):
    """q, k of unit length, v, beta in (0, 1)."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, length, heads, d, generator=g) for d in (dk, dk, dv))
    beta = torch.rand(batch, length, heads, generator=g)
    return [t.to(DEVICE) for t in (q, functional.normalize(k, dim=-1), v, beta)]


@every
def test_beta_zero_keeps_the_state_and_reads_it_out(backend):
    q, k, v, beta = draw(2, 70, 2, 5, 7)
    state = torch.randn(2, 2, 5, 7, device=DEVICE)
    out, final = delta_rule(q, k, v, torch.zeros_like(beta), scale=1.0, initial_state=state, return_final_state=True, backend=backend)
    assert torch.equal(final, state)
    torch.testing.assert_close(out, torch.einsum("blhk,bhkv->blhv", q, state))


@every
def test_beta_one_with_orthonormal_keys_stores_and_returns_values(backend):
    """Of two rounds over the same keys, the second replaces every value of the first."""
    dk = 16
    keys = torch.linalg.qr(torch.randn(dk, dk, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q.float().to(DEVICE)
    k = torch.cat([keys, keys])[None, :, None]
    v = torch.randn(1, 2 * dk, 1, 9, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ones = torch.ones(1, 2 * dk, 1, device=DEVICE)
    out, state = delta_rule(k, k, v, ones, scale=1.0, return_final_state=True, backend=backend)
    torch.testing.assert_close(out, v, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.einsum("lk,kv->lv", keys, state[0, 0]), v[0, dk:, 0], rtol=1e-5, atol=1e-5)


@every
def test_a_token_leaves_other_keys_alone(backend):
    q, k, v, beta = draw(1, 1, 1, 8, 5)
    state = torch.randn(1, 1, 8, 5, device=DEVICE)
    _, final = delta_rule(q, k, v, beta, initial_state=state, return_final_state=True, backend=backend)
    other = functional.normalize(q[0, 0, 0] - (q[0, 0, 0] @ k[0, 0, 0]) * k[0, 0, 0], dim=-1)
    torch.testing.assert_close(other @ final[0, 0], other @ state[0, 0], rtol=1e-5, atol=1e-5)


@every
def test_no_decay_equals_a_decay_of_one(backend):
    q, k, v, beta = draw(2, 37, 2, 6, 5)
    torch.testing.assert_close(delta_rule(q, k, v, beta, g=torch.zeros_like(beta), backend=backend), delta_rule(q, k, v, beta, backend=backend))


@every
def test_orthogonal_keys_make_it_linear_attention(backend):
    """Where no key meets another before it, nothing is recalled: the values of weight beta are added."""
    length = 12
    k = torch.eye(length, device=DEVICE)[None, :, None]
    q, _, v, beta = draw(1, length, 1, length, 5)
    g = -beta
    want = gated_linear_attention(q, k, v * beta[..., None], g, backend="reference")
    torch.testing.assert_close(delta_rule(q, k, v, beta, g=g, backend=backend), want, rtol=1e-5, atol=1e-5)


@every
def test_a_decay_of_nothing_left_forgets(backend):
    """exp(-inf) is 0: the token sees an empty state, and no gradient is a NaN."""
    q, k, v, beta = draw(1, 21, 1, 5, 7)
    g = torch.full_like(beta, -0.1)
    g[:, 10] = -torch.inf
    tensors = [t.requires_grad_() for t in (q, k, v, beta, g)]
    out = delta_rule(q, k, v, beta, g=g, backend=backend)
    torch.testing.assert_close(out[:, 10:], delta_rule(*(t[:, 10:] for t in (q, k, v, beta)), g=g[:, 10:], backend=backend))
    assert all(torch.isfinite(t).all() for t in torch.autograd.grad(out.sum(), tensors))


@every
def test_a_volume_in_slabs_equals_the_whole(backend):
    g = torch.Generator().manual_seed(0)
    shape = (1, 6, 3, 4, 2)
    q, k, v = (torch.randn(*shape, d, generator=g).to(DEVICE) for d in (5, 5, 7))
    k, beta, decay = functional.normalize(k, dim=-1), torch.rand(shape, generator=g).to(DEVICE), -torch.rand(shape, generator=g).to(DEVICE)
    whole, final = delta_rule(q, k, v, beta, g=decay, order=orders.raster(), return_final_state=True, backend=backend)
    state, slabs = None, []
    for z in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part, state = delta_rule(
            *(t[:, z] for t in (q, k, v, beta)), g=decay[:, z], order=orders.raster(), initial_state=state, return_final_state=True, backend=backend
        )
        slabs.append(part)
    torch.testing.assert_close(torch.cat(slabs, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE != "cpu", reason="a long walk, for the CPU's kernel")
def test_it_is_stable_over_a_long_walk():
    """Unit keys and beta in [0, 1] never enlarge the state's error: at 20,000 tokens it is what it was at 200."""
    q, k, v, beta = draw(1, 20000, 1, 16, 16)
    out = delta_rule(q, k, v, beta, backend="native")
    exact = delta_rule(*(t.double() for t in (q, k, v, beta)), backend="native")
    error = (out - exact).abs().amax((0, 2, 3))
    assert error[-200:].max() < 4 * error[:200].max() + 1e-7
    assert out.abs().max() < 40


@every
def test_wrong_arguments_are_named(backend):
    q, k, v, beta = draw(1, 4, 2, 3, 5)
    for change, message in (
        ({"k": k[..., :2]}, r"k: expected \(1, 4, 2, 3\), got \(1, 4, 2, 2\)"),
        ({"v": v[:, :3]}, r"v: expected \(1, 4, 2, dv\), got \(1, 3, 2, 5\)"),
        ({"beta": beta[..., None]}, r"beta: expected \(1, 4, 2\), got \(1, 4, 2, 1\)"),
        ({"g": beta[:, :, :1]}, r"g: expected \(1, 4, 2\) or \(1, 4, 2, 3\), got \(1, 4, 1\)"),
        ({"erase": v}, r"erase: expected \(1, 4, 2, 3\), got \(1, 4, 2, 5\)"),
        ({"erase_out": beta}, r"erase_out: expected \(1, 4, 2, 3\), got \(1, 4, 2\)"),
        ({"write": k}, r"write: expected \(1, 4, 2\) or \(1, 4, 2, 5\), got \(1, 4, 2, 3\)"),
        ({"initial_state": v}, r"initial_state: expected \(1, 2, 3, 5\), got"),
        ({"q": q[..., :0], "k": k[..., :0]}, "q: expected .* with dk at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            delta_rule(**{"q": q, "k": k, "v": v, "beta": beta, **change}, backend=backend)


# -- the published rules, each by its own formula ---------------------------------------------------------------------------------------


def published(rule, length=9, batch=2, heads=2, dk=5, dv=7):
    """(what delta_rule takes, the outputs of the rule's own recurrence), in float64. rule(S, t, tensors) gives the next state."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(batch, length, heads, *shape, generator=generator, dtype=torch.float64).to(DEVICE)

    unit = functional.normalize
    t = {"q": draw(dk), "k": unit(draw(dk), dim=-1), "v": draw(dv), "beta": draw().sigmoid(), "g": -draw().abs(), "per_key": -draw(dk).abs()}
    t |= {"b": draw(dk).sigmoid(), "w": draw(dv).sigmoid(), "p": unit(draw(dk), dim=-1), "rate": draw(dk).sigmoid()}
    S, outputs = torch.zeros(batch, heads, dk, dv, dtype=torch.float64, device=DEVICE), []
    for i in range(length):
        now = {name: x[:, i] for name, x in t.items()}
        S = rule(S, now)
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, now["q"]))
    return t, torch.stack(outputs, 1)


def outer(k, v):
    return k[..., None] * v[..., None, :]


def recall(S, k):
    """S^T k."""
    return torch.einsum("bhkv,bhk->bhv", S, k)


def delta_net(S, t):  # arXiv 2406.06484, equation 2: S (I - beta k k^T) + beta v k^T, transposed
    return S - outer(t["beta"][..., None] * t["k"], recall(S, t["k"])) + outer(t["beta"][..., None] * t["k"], t["v"])


def gated_delta_net(S, t):  # arXiv 2412.06464: S alpha (I - beta k k^T) + beta v k^T
    alpha = t["g"].exp()[..., None, None]
    return alpha * (S - outer(t["beta"][..., None] * t["k"], recall(S, t["k"]))) + outer(t["beta"][..., None] * t["k"], t["v"])


def kda(S, t):  # arXiv 2510.26692: (I - beta k k^T) Diag(alpha) S + beta k v^T
    S = t["per_key"].exp()[..., None] * S
    eye = torch.eye(S.shape[-2], dtype=S.dtype, device=S.device)
    return (eye - t["beta"][..., None, None] * outer(t["k"], t["k"])) @ S + outer(t["beta"][..., None] * t["k"], t["v"])


def gated_delta_net_2(S, t):  # arXiv 2605.22791: S' + k (w * v - S'^T (b * k))^T
    S = t["per_key"].exp()[..., None] * S
    return S + outer(t["k"], t["w"] * t["v"] - recall(S, t["b"] * t["k"]))


def comba(S, t):  # arXiv 2506.02475: S (alpha - beta p k^T) of the decayed state, + beta v k^T
    S = t["g"].exp()[..., None, None] * S
    return S + outer(t["k"], t["beta"][..., None] * (t["v"] - recall(S, t["p"])))


def rwkv_7(S, t):  # arXiv 2503.14456, equation 17: S (Diag(w) - kappa^T (a * kappa)) + v^T k, transposed
    transition = torch.diag_embed(t["per_key"].exp()) - outer(t["rate"] * t["p"], t["p"])
    return transition @ S + outer(t["k"], t["v"])


PUBLISHED = {
    "DeltaNet": (delta_net, lambda t: {}),
    "gated DeltaNet": (gated_delta_net, lambda t: {"g": t["g"]}),
    "KDA": (kda, lambda t: {"g": t["per_key"]}),
    "gated DeltaNet-2": (gated_delta_net_2, lambda t: {"g": t["per_key"], "erase": t["b"] * t["k"], "write": t["w"]}),
    "Comba": (comba, lambda t: {"g": t["g"], "erase": t["beta"][..., None] * t["p"]}),
    "RWKV-7": (
        rwkv_7,
        lambda t: {"g": t["per_key"], "erase": t["p"], "erase_out": t["rate"] * t["p"], "erase_first": True, "beta": torch.ones_like(t["beta"])},
    ),
}


@pytest.mark.parametrize("backend", [backend for op, backend in available() if op == "delta_rule" and backend != "triton"])  # it has no float64
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_rule_is_a_setting_of_it(name, backend):
    rule, settings = PUBLISHED[name]
    t, want = published(rule)
    got = delta_rule(**{name: t[name] for name in ("q", "k", "v", "beta")} | settings(t), scale=1.0, backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@every
def test_the_defaults_are_beta_k_and_k_and_beta(backend):
    q, k, v, beta = draw(2, 11, 2, 5, 7)
    g = -torch.rand(2, 11, 2, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    want = delta_rule(q, k, v, beta, g=g, backend=backend)
    for given in ({"erase": beta[..., None] * k}, {"erase_out": k}, {"write": beta}, {"write": beta[..., None].expand(v.shape)}):
        torch.testing.assert_close(delta_rule(q, k, v, beta, g=g, **given, backend=backend), want, rtol=1e-5, atol=1e-5)
    per_key = g[..., None].expand(k.shape)
    torch.testing.assert_close(delta_rule(q, k, v, beta, g=per_key, backend=backend), want, rtol=1e-5, atol=1e-5)


@every
def test_what_is_no_number_stays_before_a_start(backend):
    """Of the general form too: where an order begins anew, nothing of the state passes."""
    q, k, v, beta = draw(1, 12, 1, 5, 7)
    v[:, 2] = torch.nan
    out = delta_rule(q, k, v, beta, erase=0.5 * k, cu_seqlens=torch.tensor([0, 6, 12], device=DEVICE), backend=backend)
    assert out[:, 2:6].isnan().any() and torch.isfinite(out[:, 6:]).all()
