"""Layers and networks in float64 are exact to float64: nothing on their way is rounded to less."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import medssm
from medssm import models
from medssm.integrations.mamba_ssm import block, second
from medssm.integrations.mamba_ssm import mixer as first
from medssm.models.monai import NETWORKS
from medssm.nn import BiMamba, DeltaNet, Mamba, Mamba2, Mamba3, SpatialMix
from medssm.nn.mixers import MIXERS, make_mixer
from medssm.orders import raster


class Narrow(TorchDispatchMode):
    """Collects every operator that gives numbers of less than float64."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if any(isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype is not torch.float64 for t in tree_leaves(out)):
            self.found.append(str(function))
        return out


def narrow(call):
    with Narrow() as mode:
        call()
    return mode.found


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", MIXERS)
def test_no_mixer_rounds(name, dims):
    mixer, x = make_mixer(name, 8, dims).double(), torch.randn(1, *(3, 4, 2)[:dims], 8, dtype=torch.float64, requires_grad=True)
    assert narrow(lambda: mixer(x).sum().backward()) == []


SEQUENCES = {
    "Mamba": lambda: Mamba(8),
    "BiMamba": lambda: BiMamba(8),
    "Mamba2": lambda: Mamba2(8),
    "Mamba3": lambda: Mamba3(8, is_mimo=True, is_outproj_norm=True),
    "Vim's first": lambda: first.Mamba(8, bimamba_type="v1"),
    "mamba_ssm's Mamba2": lambda: second.Mamba2(8, headdim=4),
    "SpatialMix": lambda: SpatialMix(8, mode="upstream"),
    "DeltaNet": lambda: DeltaNet(8, 2, conv="order", orders=[raster()]),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_no_mixer_of_sequences_rounds(name):
    mixer, x = SEQUENCES[name]().double(), torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    assert narrow(lambda: mixer(x).sum().backward()) == []


@pytest.mark.parametrize("name", [name for name in medssm.list_models() if name not in NETWORKS])
def test_no_network_rounds(name):
    network = medssm.create_model(name, spatial_dims=2, in_channels=1, out_channels=2, **models.model_facts(name).small).double().eval()
    with torch.no_grad():
        assert narrow(lambda: network(torch.randn(1, 1, 32, 32, dtype=torch.float64))) == []


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rms", [True, False])
def test_no_block_of_the_stand_in_rounds(fused, rms):
    layer = block.create_block(8, ssm_cfg={"d_state": 4}, rms_norm=rms, fused_add_norm=fused, residual_in_fp32=True, layer_idx=0).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    assert narrow(lambda: layer(*layer(x))) == []


# -- against the formula ----------------------------------------------------------------------------------------------------------


def convolved(conv, u):
    """silu of the causal convolution, (b, l, c)."""
    return F.silu(conv(u.mT)[..., : u.shape[1]].mT)


def waves(module):
    """Weights that need all digits of float64."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(0.3 * torch.sin(0.7 * torch.arange(p.numel(), dtype=torch.float64) + i).view(p.shape))
    return module


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_mamba_is_its_formula(backend):
    m, x = waves(Mamba(8, d_state=4).double()), torch.cos(0.9 * torch.arange(2 * 7 * 8, dtype=torch.float64)).view(2, 7, 8)
    u, z = m.in_proj(x).chunk(2, -1)
    u = convolved(m.conv1d, u)
    dt, B, C = m.x_proj(u).split([m.dt_rank, 4, 4], -1)
    step, A, h, y = torch.log1p(torch.exp(m.dt_proj(dt))), -torch.exp(m.A_log), 0, []
    for t in range(7):
        h = torch.exp(step[:, t, :, None] * A) * h + (step * u)[:, t, :, None] * B[:, t, None]
        y.append((h * C[:, t, None]).sum(-1) + m.D * u[:, t])
    with medssm.use_backend(backend, strict=True):
        torch.testing.assert_close(m(x), m.out_proj(torch.stack(y, 1) * F.silu(z)), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_mamba2_is_its_formula(backend):
    m = waves(Mamba2(8, d_state=4, headdim=4, orders=[raster()]).double())
    x = torch.cos(0.9 * torch.arange(2 * 7 * 8, dtype=torch.float64)).view(2, 7, 8)
    z, u, dt = m.in_proj(x).split([16, 24, 4], -1)
    u, B, C = convolved(m.conv1d, u).split([16, 4, 4], -1)
    u, step, A, h, y = u.unflatten(-1, (4, 4)), torch.log1p(torch.exp(dt + m.dt_bias)), -torch.exp(m.A_log), 0, []
    for t in range(7):
        h = torch.exp(step[:, t] * A)[..., None, None] * h + (step[:, t, :, None] * u[:, t])[..., None] * B[:, t, None, None]
        y.append((h * C[:, t, None, None]).sum(-1) + m.D[:, None] * u[:, t])
    gated = torch.stack(y, 1).flatten(-2) * F.silu(z)
    want = m.out_proj(gated / torch.sqrt(gated.square().mean(-1, keepdim=True) + 1e-5) * m.norm.weight)
    with medssm.use_backend(backend, strict=True):
        torch.testing.assert_close(m(x), want, rtol=1e-14, atol=1e-14)


def test_rotations_have_the_digits_of_what_they_rotate():
    cos, sin = medssm.nn.mlla.rotations((5,), 4, torch.device("cpu"), torch.float64)
    assert cos.dtype is torch.float64
    torch.testing.assert_close(cos[3, 2], torch.tensor(math.cos(0.03), dtype=torch.float64), rtol=1e-15, atol=0)
    torch.testing.assert_close(sin[4, 1], torch.tensor(math.sin(4.0), dtype=torch.float64), rtol=1e-15, atol=0)
