"""Mamba3 of the stand-in for mamba_ssm and the functions of its kernels: weights, attributes, token by token, packed, the published recurrence."""

import math
import types

import pytest
import torch
from torch.nn import functional as F

import medssm.nn
from medssm import orders
from tests.integrations.compare import draw, gradients, same

KINDS = [{}, {"ngroups": 2, "is_outproj_norm": True}, {"is_mimo": True, "mimo_rank": 2}, {"is_mimo": True, "mimo_rank": 2, "is_outproj_norm": True}]


def mixer(options, **more):
    from mamba_ssm import Mamba3

    torch.manual_seed(0)
    return Mamba3(8, d_state=8, headdim=4, **options, **more).double()


@pytest.mark.parametrize("options", KINDS)
def test_shares_weights_with_medssms(installed, options):
    m, x = mixer(options), draw(2, 9, 8)
    ours = medssm.nn.Mamba3(8, d_state=8, headdim=4, **options, orders=[orders.raster()]).double()
    ours.load_state_dict(m.state_dict())
    assert isinstance(m, medssm.nn.Mamba3) and [n for n, _ in ours.named_parameters()] == [n for n, _ in m.named_parameters()]
    same([m(x)], [ours(x)])
    same(gradients(m(x), (x, *m.parameters())), gradients(ours(x), (x, *ours.parameters())))


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("start", [1, 6])
def test_token_by_token_equals_the_sequence(installed, options, start):
    m, x = mixer(options, layer_idx=3), draw(2, 9, 8)
    want, states = m(x), m.allocate_inference_cache(2, 9, dtype=torch.float64)
    ranks = options.get("mimo_rank", 1)
    assert [tuple(s.shape) for s in states] == [(2, 4, 2), (2, 4, 4, 8), (2, ranks, 4, 8), (2, 4, 4)]
    parts = [m.step(x[:, t], *states) for t in range(9)]
    same([torch.stack([out for out, *_ in parts], 1)], [want])
    assert all(new is state for new, state in zip(parts[-1][1:], states, strict=True))

    cache = types.SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    outs = [m(x[:, :start], inference_params=cache)]
    for t in range(start, 9):
        cache.seqlen_offset = t
        outs.append(m(x[:, t : t + 1], inference_params=cache))
    same([torch.cat(outs, 1), *cache.key_value_memory_dict[3]], [want, *states])
    with pytest.raises(ValueError, match=r"hidden_states: expected \(b, 1, 8\), one token, got \(2, 9, 8\)"):
        m.step(x, *states)


@pytest.mark.parametrize("options", KINDS)
def test_packed_sequences_and_their_states(installed, options):
    m, x, bounds = mixer(options, layer_idx=0), draw(1, 9, 8), torch.tensor([0, 4, 5, 9], dtype=torch.int32)
    cache = types.SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    apart = [m(x[:, a:b]) for a, b in ((0, 4), (4, 5), (5, 9))]
    same([m(x, cu_seqlens=bounds), m(x, cu_seqlens=bounds, inference_params=cache)], [torch.cat(apart, 1)] * 2)
    same([m(x, seq_idx=torch.tensor([[0] * 4 + [1] + [2] * 4]))], [torch.cat(apart, 1)])
    more, cache.seqlen_offset = draw(3, 1, 8), 4
    want = [m(torch.cat([x[:, a:b], more[i : i + 1]], 1))[:, -1:] for i, (a, b) in enumerate(((0, 4), (4, 5), (5, 9)))]
    same([m(more, inference_params=cache)], [torch.cat(want)])


def test_has_upstreams_arguments_attributes_and_dtypes(installed):
    from mamba_ssm.modules.mamba3 import Mamba3, heavy_tail_activation
    from mamba_ssm.ops.triton.layernorm_gated import RMSNorm

    options = {"is_outproj_norm": True, "is_mimo": True, "chunk_size": 16, "layer_idx": 1, "dropout": 0.1, "n_layer": 2, "unknown": 3}
    m = Mamba3(32, 16, 2, 16, 2, 1.0, **options, dtype=torch.bfloat16)
    assert (m.d_model, m.d_state, m.expand, m.headdim, m.num_bc_heads, m.d_inner, m.nheads, m.mimo_rank) == (32, 16, 2, 16, 2, 64, 4, 4)
    assert (m.chunk_size, m.layer_idx, m.A_floor, m.is_mimo, m.is_outproj_norm, m.fuse_pregate_headwise_norm) == (16, 1, 1e-4, True, True, True)
    assert (m.rotary_dim_divisor, m.split_tensor_size, m.num_rope_angles) == (2, 16, 8)
    assert isinstance(m.norm, RMSNorm) and (m.norm.group_size, m.norm.eps, m.norm.norm_before_gate, m.B_norm.eps) == (16, 1e-5, True, 1e-5)
    narrow = {n for n, p in m.named_parameters() if p.dtype is torch.bfloat16}
    assert narrow == {"in_proj.weight", "B_norm.weight", "C_norm.weight", "norm.weight", "out_proj.weight"}
    assert {n for n, p in m.named_parameters() if hasattr(p, "_no_weight_decay")} == {"dt_bias", "D"}
    assert m(torch.randn(1, 5, 32, dtype=torch.bfloat16)).dtype is torch.bfloat16
    assert [s.dtype for s in m.allocate_inference_cache(1, 5)] == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert all(p.is_meta for p in Mamba3(64, device="meta").parameters())
    assert (Mamba3(64).d_state, Mamba3(64).headdim) == (128, 64)
    same([heavy_tail_activation(torch.tensor([-1.0, 0.0, 2.0]))], [torch.tensor([0.5, 1.0, 3.0])])


def arguments(batch, length, groups=1, heads=2, n=6, p=4, angles=2):
    dt = F.softplus(-3 + draw(batch, heads, length))
    return {
        "Q": draw(batch, length, groups, n),
        "K": draw(batch, length, groups, n),
        "V": draw(batch, length, heads, p),
        "ADT": -dt * draw(batch, heads, length).abs(),
        "DT": dt,
        "Trap": draw(batch, heads, length),
        "Q_bias": draw(heads, n),
        "K_bias": draw(heads, n),
        "Angles": draw(batch, length, heads, angles),
        "D": draw(heads),
        "Z": draw(batch, length, heads, p),
    }


def published(given, state):
    """The recurrence of the paper, token by token: (out, angle, S, k, v)."""
    t, outs = types.SimpleNamespace(**given), []
    angle, S, k, v = state
    per = t.V.shape[2] // t.Q.shape[2]

    def turned(row):
        pairs = row.unflatten(-1, (-1, 2))
        w = F.pad(angle, (0, pairs.shape[-2] - angle.shape[-1]))
        one, two = pairs.unbind(-1)
        return torch.stack([one * w.cos() - two * w.sin(), one * w.sin() + two * w.cos()], -1).flatten(-2)

    for i in range(t.V.shape[1]):
        dt, decay, mix = t.DT[..., i], torch.exp(t.ADT[..., i]), torch.sigmoid(t.Trap[..., i])
        angle = torch.remainder(angle + math.pi * torch.tanh(t.Angles[:, i]) * dt[..., None], 2 * math.pi)
        S = decay[..., None, None] * (S + ((1 - mix) * dt)[..., None, None] * v[..., :, None] * k[..., None, :])
        k, v = turned(t.K[:, i].repeat_interleave(per, 1) + t.K_bias), t.V[:, i]
        S = S + (mix * dt)[..., None, None] * v[..., :, None] * k[..., None, :]
        y = (S * turned(t.Q[:, i].repeat_interleave(per, 1) + t.Q_bias)[..., None, :]).sum(-1) + t.D[:, None] * v
        outs.append(y * F.silu(t.Z[:, i]))
    return torch.stack(outs, 1), angle, S, k, v


@pytest.mark.parametrize("groups", [1, 2])
def test_siso_combined_is_the_published_recurrence(installed, groups):
    from mamba_ssm.ops.triton.mamba3.mamba3_siso_combined import mamba3_siso_combined

    given = arguments(2, 7, groups)
    initial = draw(2, 2, 2).abs(), draw(2, 2, 4, 6), draw(2, 2, 6), draw(2, 2, 4)
    got, want = mamba3_siso_combined(**given, Input_States=initial, return_final_states=True), published(given, initial)
    same(got, want)
    leaves = (*given.values(), *initial)
    same(gradients(sum(t.square().sum() for t in got), leaves), gradients(sum(t.square().sum() for t in want), leaves))
    same([mamba3_siso_combined(**given)], [published(given, tuple(map(torch.zeros_like, initial)))[0]])


def test_siso_steps_are_the_published_recurrence(installed):
    from mamba_ssm.ops.triton.mamba3.mamba3_siso_step import mamba3_siso_step

    given, outs = arguments(2, 5), []
    initial = draw(2, 2, 2).abs(), draw(2, 2, 4, 6), draw(2, 2, 6), draw(2, 2, 4)
    want, states = published(given, initial), initial
    weights, heads_first = ("Q_bias", "K_bias", "D"), ("ADT", "DT", "Trap")
    for i in range(5):
        token = {name: t if name in weights else t[..., i] if name in heads_first else t[:, i] for name, t in given.items()}
        out, states = mamba3_siso_step(**token, Input_States=states)
        outs.append(out)
    same([torch.stack(outs, 1), *states], want)


def test_siso_combined_of_packed_sequences(installed):
    from mamba_ssm.ops.triton.mamba3.mamba3_siso_combined import mamba3_siso_combined

    given = arguments(1, 7)
    initial = draw(2, 2, 2).abs(), draw(2, 2, 4, 6), draw(2, 2, 6), draw(2, 2, 4)
    heads_first, weights = ("ADT", "DT", "Trap"), ("Q_bias", "K_bias", "D")

    def part(a, b):
        return {name: t if name in weights else t[..., a:b] if name in heads_first else t[:, a:b] for name, t in given.items()}

    apart = [published(part(a, b), tuple(t[i : i + 1] for t in initial)) for i, (a, b) in enumerate(((0, 3), (3, 7)))]
    want = [torch.cat([one[i] for one in apart], 1 if i == 0 else 0) for i in range(5)]
    same(mamba3_siso_combined(**given, Input_States=initial, return_final_states=True, cu_seqlens=torch.tensor([0, 3, 7])), want)


@pytest.mark.parametrize("norm, ranks", [(False, 2), (True, 2), (True, 1)])
def test_mimo_is_what_the_layer_computes(installed, norm, ranks):
    from mamba_ssm.ops.tilelang.mamba3.mamba3_mimo import mamba3_mimo

    m, x = mixer({"is_mimo": True, "mimo_rank": ranks, "is_outproj_norm": norm}), draw(2, 7, 8)
    t, z = m._operands(x)
    log_decay, dt, trap = (part.transpose(1, 2) for part in (t["dt"] * t["A"], t["dt"], t["trap"]))
    angles = t["angles"].unsqueeze(2).expand(-1, -1, 4, -1)
    front = (t["C"], t["B"], t["x"], log_decay, dt, trap, m.C_bias, m.B_bias, m.mimo_x, m.mimo_z)
    behind = (angles, m.D, z.unflatten(-1, (4, 4)), 16, 4, torch.float64)
    fused = {"fuse_pregate_headwise_rms_norm": True, "outproj_norm_weight": m.norm.weight} if norm else {}
    y, *states = mamba3_mimo(*front, m.mimo_o, *behind, return_state=True, **fused)
    same([m.out_proj(y.flatten(-2))], [m(x)])
    assert [tuple(s.shape) for s in states] == [(2, 4, 2), (2, 4, 4, 8), (2, ranks, 4, 8), (2, 4, 4)]
    assert mamba3_mimo(*front, None, *behind).shape == (2, 7, ranks, 4, 4)
    if norm:
        with pytest.raises(ValueError, match="Z: expected Z, MIMO_Z, MIMO_Out and outproj_norm_weight"):
            mamba3_mimo(*front, None, *behind, **fused)
