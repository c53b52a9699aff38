"""What only ssd3 has: the published recurrence, its sum of angles, and what it is where nothing turns and the rule is not trapezoidal."""

import math

import numpy as np
import pytest
import torch

from medssm import backends, ops
from tests.ops.calls import DEVICE, SERVES

BACKENDS = [name for name, device in SERVES.items() if device == DEVICE and backends()["ssd3"][name] == "ok"]
every = pytest.mark.parametrize("backend", BACKENDS)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def call(length, ranks, batch=2, heads=4, size=5, groups=2, state=8, angles=2):
    tokens, rank = (batch, length), (ranks,) if ranks > 1 else ()
    given = {
        "x": draw(*tokens, heads, size),
        "dt": torch.nn.functional.softplus(draw(*tokens, heads, seed=1)),
        "A": -1 - draw(*tokens, heads, seed=2).abs(),
        "B": draw(*tokens, *rank, groups, state, seed=3),
        "C": draw(*tokens, *rank, groups, state, seed=4),
        "trap": draw(*tokens, heads, seed=5),
        "angles": draw(*tokens, heads, angles, seed=6),
        "D": draw(heads, seed=7),
        "z": draw(*tokens, heads, size, seed=8),
        "B_bias": draw(heads, *rank, state, seed=9),
        "C_bias": draw(heads, *rank, state, seed=10),
    }
    if ranks > 1:
        given |= {name: draw(heads, ranks, size, seed=11 + i) for i, name in enumerate(("mimo_x", "mimo_z", "mimo_o"))}
    return given


def published(given, initial):
    """The paper's recurrence, number by number, for one batch element and head at a time: out (b,l,h,p) and the four states."""
    t = {name: value.numpy() for name, value in given.items()}
    batch, length, heads, size = t["x"].shape
    ranks = t["mimo_x"].shape[1] if "mimo_x" in t else 1
    B, C = (t[name].reshape(batch, length, ranks, -1, t[name].shape[-1]) for name in "BC")
    bias = {name: t[name].reshape(heads, ranks, -1) for name in ("B_bias", "C_bias")}
    mimo = [t.get(name, np.ones((heads, ranks, size))) for name in ("mimo_x", "mimo_z", "mimo_o")]
    out, states = np.zeros((batch, length, heads, size)), [s.numpy().copy() for s in initial]

    def turn(row, angle):
        row = row.copy()
        for i, w in enumerate(angle):
            a, b = row[2 * i], row[2 * i + 1]
            row[2 * i], row[2 * i + 1] = a * math.cos(w) - b * math.sin(w), a * math.sin(w) + b * math.cos(w)
        return row

    for b in range(batch):
        for h in range(heads):
            group = h // (heads // B.shape[3])
            angle, S, k, x = states[0][b, h], states[1][b, h], states[2][b, :, h], states[3][b, h]
            for i in range(length):
                step, decay = t["dt"][b, i, h], math.exp(t["dt"][b, i, h] * t["A"][b, i, h])
                mix = 1 / (1 + math.exp(-t["trap"][b, i, h]))
                angle = (angle + math.pi * np.tanh(t["angles"][b, i, h]) * step) % (2 * math.pi)
                S = decay * S + (1 - mix) * step * decay * sum(np.outer(mimo[0][h, r] * x, k[r]) for r in range(ranks))
                k = np.stack([turn(B[b, i, r, group] + bias["B_bias"][h, r], angle) for r in range(ranks)])
                x = t["x"][b, i, h]
                S = S + mix * step * sum(np.outer(mimo[0][h, r] * x, k[r]) for r in range(ranks))
                for r in range(ranks):
                    y = S @ turn(C[b, i, r, group] + bias["C_bias"][h, r], angle) + t["D"][h] * mimo[0][h, r] * x
                    gate = mimo[1][h, r] * t["z"][b, i, h]
                    out[b, i, h] += mimo[2][h, r] * y * gate / (1 + np.exp(-gate))
            states[0][b, h], states[1][b, h], states[2][b, :, h], states[3][b, h] = angle, S, k, x
    return out, states


@every
@pytest.mark.parametrize("ranks", [1, 3])
def test_equals_the_published_recurrence(backend, ranks):
    given = call(9, ranks)
    initial = draw(2, 4, 2, seed=20), draw(2, 4, 5, 8, seed=21), draw(2, ranks, 4, 8, seed=22), draw(2, 4, 5, seed=23)
    wanted, last = published(given, initial)
    dtype, close = (torch.float32, 1e-4) if backend == "triton" else (torch.float64, 1e-10)
    given, initial = {name: t.to(DEVICE, dtype) for name, t in given.items()}, tuple(t.to(DEVICE, dtype) for t in initial)
    out, states = ops.ssd3(**given, initial_state=initial, return_final_state=True, backend=backend)
    for got, want in zip((out, *states), (wanted, *last), strict=True):
        np.testing.assert_allclose(got.double().cpu().numpy(), want, rtol=close, atol=close)


@every
def test_the_other_pairs_of_channels_are_a_permutation(backend):
    """With (i, i + n/2) in the place of (2i, 2i + 1) and B, C and their biases permuted alike, nothing changes but the state's and k's channels."""
    given = {name: t.float().to(DEVICE) for name, t in call(9, 2).items()}
    halves = torch.cat([torch.arange(0, 8, 2), torch.arange(1, 8, 2)]).to(DEVICE)
    out, (angle, S, k, x) = ops.ssd3(**given, return_final_state=True, backend=backend)
    given |= {name: given[name][..., halves] for name in ("B", "C", "B_bias", "C_bias")}
    again, states = ops.ssd3(**given, pairs="halves", return_final_state=True, backend=backend)
    for got, want in zip((again, *states), (out, angle, S[..., halves], k[..., halves], x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@every
def test_without_turns_and_with_all_of_a_step_at_its_end_it_is_ssd(backend):
    given = {name: t.float().to(DEVICE) for name, t in call(70, 1).items() if "bias" not in name}
    given["A"] = given["A"][:1, :1].expand_as(given["A"])
    given |= {"angles": torch.zeros_like(given["angles"]), "trap": torch.full_like(given["trap"], 40.0)}
    out, states = ops.ssd3(**given, return_final_state=True, backend=backend)
    given["A"] = given["A"][0, 0]
    wanted, last = ops.ssd(**{name: t for name, t in given.items() if name not in ("trap", "angles")}, return_final_state=True, backend="reference")
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states[1], last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_angles_stay_exact_over_a_long_walk(backend):
    """Thousands of revolutions: float32 would keep two digits of the last angle."""
    length = 300 if DEVICE == "cpu" and backend == "triton" else 100_000
    given = {name: t.float().to(DEVICE) for name, t in call(length, 1, batch=1, heads=1, size=1, groups=1, state=2, angles=1).items()}
    given |= {"dt": given["dt"].clamp_max(2.0), "angles": given["angles"].abs()}
    _, (angle, *_) = ops.ssd3(**given, return_final_state=True, backend=backend)
    wide = math.pi * torch.tanh(given["angles"]).double() * given["dt"].double().unsqueeze(-1)
    away = torch.remainder(wide.sum() - angle.double().sum() + math.pi, 2 * math.pi) - math.pi
    assert float(away.abs()) < 1e-5


def test_ranks_that_no_weight_sums_are_given_apart():
    given = call(9, 3)
    weights = given.pop("mimo_o")
    apart = ops.ssd3(**given)
    assert apart.shape == (2, 9, 3, 4, 5)
    torch.testing.assert_close((apart * weights.transpose(0, 1)).sum(2), ops.ssd3(**given, mimo_o=weights))


def test_what_does_not_fit_is_said():
    given = call(3, 1)
    with pytest.raises(ValueError, match=r"angles: expected at most n / 2 of them, with n = 8 channels in adjacent pairs, got 5"):
        ops.ssd3(**{**given, "angles": draw(2, 3, 4, 5)})
    with pytest.raises(ValueError, match="pairs: expected 'adjacent' or 'halves', got 'both'"):
        ops.ssd3(**given, pairs="both")
    with pytest.raises(ValueError, match="mimo_z: expected None without z"):
        ops.ssd3(**{name: t for name, t in call(3, 2).items() if name != "z"})
    with pytest.raises(TypeError, match=r"initial_state: expected four tensors \(w, S, k, x\), got Tensor"):
        ops.ssd3(**given, initial_state=draw(2, 4, 5, 8))
    with pytest.raises(ValueError, match=r"x: expected \(b, h, p\), got"):
        ops.ssd3_step((), **given)
