"""Mamba2 and Mamba2Simple of the stand-in for mamba_ssm: weights, attributes, token by token, in blocks, and what is refused."""

import pickle
import types

import pytest
import torch
from torch import nn

import medssm.nn
from medssm import orders
from tests.integrations.compare import draw, gradients, same

KINDS = [
    {},
    {"ngroups": 2, "dt_limit": (0.01, 0.05)},
    {"D_has_hdim": True, "norm_before_gate": True, "bias": True, "conv_bias": False},
    {"rmsnorm": False, "ngroups": 4},
]


@pytest.mark.parametrize("options", KINDS)
def test_mamba2_is_its_formula_and_shares_weights_with_medssms(installed, options):
    from mamba_ssm import Mamba2
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    torch.manual_seed(0)
    m, x = Mamba2(8, d_state=5, headdim=4, **options).double(), draw(2, 9, 8)
    want = mamba_split_conv1d_scan_combined(
        m.in_proj(x),
        m.conv1d.weight.squeeze(1),
        m.conv1d.bias,
        m.dt_bias,
        -torch.exp(m.A_log),
        m.D.view(4, 4) if m.D_has_hdim else m.D,
        256,
        dt_limit=m.dt_limit,
        rmsnorm_weight=m.norm.weight if m.rmsnorm else None,
        rmsnorm_eps=1e-5,
        outproj_weight=m.out_proj.weight,
        outproj_bias=m.out_proj.bias,
        headdim=4,
        ngroups=m.ngroups,
        norm_before_gate=m.norm_before_gate,
    )
    same([m(x)], [want])
    same(gradients(m(x), (x, *m.parameters())), gradients(want, (x, *m.parameters())))

    ours = medssm.nn.Mamba2(8, d_state=5, headdim=4, **options, orders=[orders.raster()]).double()
    ours.load_state_dict(m.state_dict())
    assert isinstance(m, medssm.nn.Mamba2) and [n for n, _ in ours.named_parameters()] == [n for n, _ in m.named_parameters()]
    same([m(x)], [ours(x)])
    same(gradients(m(x), (x, *m.parameters())), gradients(ours(x), (x, *ours.parameters())))
    same([m(x.flatten(0, 1), seqlen=9)], [m(x).flatten(0, 1)])


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("start", [1, 6])
def test_mamba2_token_by_token_equals_the_sequence(installed, options, start):
    from mamba_ssm import Mamba2

    m, x = Mamba2(8, d_state=5, headdim=4, layer_idx=3, **options).double(), draw(2, 9, 8)
    want, states = m(x), m.allocate_inference_cache(2, 9)
    assert [tuple(s.shape) for s in states] == [(2, 16 + 10 * m.ngroups, 4), (2, 4, 4, 5)]
    parts = [m.step(x[:, t : t + 1], *states) for t in range(9)]
    same([torch.cat([out for out, *_ in parts], 1)], [want])
    assert parts[-1][1] is states[0] and parts[-1][2] is states[1]

    cache = types.SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    outs = [m(x[:, :start], inference_params=cache)]
    outs[0].sum().backward()
    for t in range(start, 9):
        cache.seqlen_offset = t
        outs.append(m(x[:, t : t + 1], inference_params=cache))
    same([torch.cat(outs, 1), *cache.key_value_memory_dict[3]], [want, *states])
    with pytest.raises(ValueError, match=r"hidden_states: expected \(b, 1, 8\), one token, got \(2, 9, 8\)"):
        m.step(x, *states)


def test_mamba2_has_upstreams_arguments_attributes_and_dtypes(installed):
    from mamba_ssm.modules.mamba2 import Mamba2
    from mamba_ssm.ops.triton.layernorm_gated import RMSNorm

    m = Mamba2(32, 16, 4, 0.01, 2, 16, 64, 2, (1, 16), True, dtype=torch.bfloat16, layer_idx=1)
    assert (m.d_model, m.d_state, m.d_conv, m.conv_init, m.expand, m.headdim, m.d_ssm, m.ngroups) == (32, 16, 4, 0.01, 2, 16, 64, 2)
    assert (m.d_inner, m.nheads, m.D_has_hdim, m.rmsnorm, m.norm_before_gate, m.activation) == (64, 4, True, True, False, "silu")
    assert (m.chunk_size, m.use_mem_eff_path, m.layer_idx, m.process_group, m.world_size, m.local_rank) == (256, True, 1, None, 1, 0)
    assert isinstance(m.norm, RMSNorm) and (m.norm.group_size, m.norm.eps, m.norm.norm_before_gate) == (32, 1e-5, False)
    assert m.conv1d.weight.abs().max() <= 0.01 and m.in_proj.out_features == 64 + 128 + 4
    assert {n for n, p in m.named_parameters() if p.dtype is not torch.bfloat16} == {"D"}
    assert {n for n, p in m.named_parameters() if hasattr(p, "_no_weight_decay")} == {"dt_bias", "A_log", "D"}
    assert m(torch.randn(1, 5, 32, dtype=torch.bfloat16)).dtype is torch.bfloat16
    assert all(p.is_meta for p in Mamba2(64, device="meta").parameters())
    assert (Mamba2(64).d_state, Mamba2(64).headdim) == (128, 64)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("fused", [True, False])
def test_mamba2_simple_norms_by_path_as_upstream(installed, groups, fused):
    from mamba_ssm import Mamba2
    from mamba_ssm.modules.mamba2_simple import Mamba2Simple

    m = Mamba2Simple(8, d_state=5, headdim=4, ngroups=groups, use_mem_eff_path=fused).double()
    base, x = Mamba2(8, d_state=5, headdim=4, ngroups=groups).double(), draw(2, 9, 8)
    base.load_state_dict(m.state_dict())
    base.norm.group_size = 16 // groups if fused else 16
    same([m(x)], [base(x)])
    same(gradients(m(x), (x, *m.parameters())), gradients(base(x), (x, *base.parameters())))
    assert (m.activation, m.norm.group_size, m.learnable_init_states) == ("swish", None, False)
    assert (Mamba2Simple(64).d_state, Mamba2Simple(64).headdim) == (64, 128)


def test_a_pickled_mamba2_needs_only_upstreams_attributes(installed):
    from mamba_ssm import Mamba2
    from mamba_ssm.modules.mamba2_simple import Mamba2Simple

    x = torch.randn(1, 8, 12)
    for m, other in ((Mamba2(12, headdim=8, rmsnorm=False), ("norm",)), (Mamba2(12, headdim=8), ()), (Mamba2Simple(12, headdim=8), ("rmsnorm",))):
        want = m(x)
        for attribute in ("orders", "split", *other):
            del m.__dict__[attribute]
        same([pickle.loads(pickle.dumps(m))(x)], [want])


def test_a_block_of_mamba2_runs_under_autocast(installed):
    from mamba_ssm import Mamba2
    from mamba_ssm.models.mixer_seq_simple import create_block

    torch.manual_seed(0)
    block = create_block(
        16, ssm_cfg={"layer": "Mamba2", "d_state": 8, "headdim": 8}, rms_norm=True, fused_add_norm=True, residual_in_fp32=True, layer_idx=2
    )
    assert type(block.mixer) is Mamba2 and block.mixer.layer_idx == 2
    x = torch.randn(2, 30, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out, residual = block(x)
    out.float().sum().backward()
    assert out.dtype is torch.bfloat16 and residual.dtype is torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    torch.testing.assert_close(out.float(), block(x)[0], rtol=0.1, atol=0.05)
    cache = types.SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    same([block(x, inference_params=cache)[0]], [block(x)[0]], 1e-5)


def test_volumes_run_through_code_written_for_upstream(installed):
    """The layer that segmentation networks wrap around Mamba2, both ways over a volume."""

    class Layer(nn.Module):
        def __init__(self, dim):
            from mamba_ssm import Mamba2

            super().__init__()
            self.norm, self.mamba = nn.LayerNorm(dim), Mamba2(d_model=dim, d_state=16, d_conv=4, expand=2, headdim=dim // 2)

        def forward(self, x):
            tokens = self.norm(x.flatten(2).transpose(-1, -2))
            out = self.mamba(tokens) + self.mamba(tokens.flip(1)).flip(1)
            return out.transpose(-1, -2).reshape(x.shape)

    torch.manual_seed(0)
    layer, x = Layer(8), torch.randn(2, 8, 3, 4, 5, requires_grad=True)
    out = layer(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in (x, *layer.parameters()))


# -- what is refused --------------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_by_name(installed):
    from mamba_ssm import Mamba2
    from mamba_ssm.modules.mamba2_simple import Mamba2Simple

    with pytest.raises(NotImplementedError, match=r"^process_group: expected None \(it is not in this release of medssm\), got "):
        Mamba2(8, headdim=4, process_group=object())
    with pytest.raises(ValueError, match="d_ssm: expected 1 to the 16 inner channels, got 24"):
        Mamba2(8, headdim=4, d_ssm=24)
    with pytest.raises(ValueError, match="headdim: expected a divisor of the 16 inner channels, got 64"):
        Mamba2(8)
    with pytest.raises(ValueError, match="activation: expected 'swish' or 'silu', got 'gelu'"):
        Mamba2Simple(8, headdim=4, activation="gelu")


def test_mamba2_scans_some_channels_beside_a_gated_mlp(installed):
    from mamba_ssm import Mamba2
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    m, x = Mamba2(7, d_state=5, expand=4, headdim=4, d_ssm=12, ngroups=3, layer_idx=0).double(), draw(2, 9, 7)
    assert (m.d_inner, m.d_ssm, m.nheads, m.norm.group_size) == (28, 12, 3, 4)
    assert m.in_proj.out_features == 2 * 28 + 2 * 15 + 3 and m.out_proj.in_features == 28 and m.conv1d.out_channels == 12 + 30
    want = mamba_split_conv1d_scan_combined(
        m.in_proj(x),
        m.conv1d.weight.squeeze(1),
        m.conv1d.bias,
        m.dt_bias,
        -torch.exp(m.A_log.float()),
        m.D,
        256,
        rmsnorm_weight=m.norm.weight,
        rmsnorm_eps=1e-5,
        outproj_weight=m.out_proj.weight,
        headdim=4,
        ngroups=3,
        norm_before_gate=False,
    )
    same([m(x)], [want])
    same(gradients(m(x), (x, *m.parameters())), gradients(want, (x, *m.parameters())))
    states = m.allocate_inference_cache(2, 9)
    same([torch.cat([m.step(x[:, t : t + 1], *states)[0] for t in range(9)], 1)], [want])
