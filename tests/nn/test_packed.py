"""Packed sequences in layers: each as on its own, with gradients; what cannot take them says so."""

import itertools

import pytest
import torch
from torch import nn

import medssm
from medssm.nn import MLLA, SSND, BiMamba, DeltaNet, GatedLinearAttention, Mamba, Mamba2, Mamba3, SpatialMix, TriMamba
from medssm.orders import raster, snake

BOTH = [raster(), raster(reverse=True)]


@pytest.fixture(autouse=True, params=["reference", "native"])
def backend(request):
    with medssm.use_backend(request.param, strict=True):
        yield


LAYERS = {
    "Mamba": lambda: Mamba(8, d_state=4),
    "BiMamba": lambda: BiMamba(8, d_state=4),
    "Mamba2": lambda: Mamba2(8, d_state=4, headdim=4, orders=[raster()]),
    "Mamba2, both ways": lambda: Mamba2(8, d_state=4, headdim=4),
    "Mamba3": lambda: Mamba3(8, d_state=4, headdim=4, orders=[raster()]),
    "Mamba3, both ways": lambda: Mamba3(8, d_state=4, headdim=4, is_mimo=True, mimo_rank=2),
    "gated linear attention": lambda: GatedLinearAttention(8, 2, orders=[raster()]),
    "gated linear attention, both ways": lambda: GatedLinearAttention(8, 2, decay="head", orders=BOTH),
    "DeltaNet": lambda: DeltaNet(8, 2, conv="order", d_conv=4, orders=[raster()]),
    "DeltaNet, both ways": lambda: DeltaNet(8, 2, conv=None, orders=BOTH),
}
BOUNDS = [0, 5, 5, 6, 19, 21, 21]  # two of them empty, one of a single token


def packed_and_alone(name, dtype=torch.int64):
    """The layer, packed tokens, its output on them and that of each sequence on its own."""
    torch.manual_seed(0)
    layer, x = LAYERS[name]().double(), torch.randn(1, BOUNDS[-1], 8, dtype=torch.float64, requires_grad=True)
    alone = torch.cat([layer(x[:, a:b]) for a, b in itertools.pairwise(BOUNDS) if a < b], 1)
    return layer, x, layer(x, cu_seqlens=torch.tensor(BOUNDS, dtype=dtype)), alone


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", LAYERS)
def test_packed_sequences_are_each_on_its_own(name, dtype):
    layer, x, packed, alone = packed_and_alone(name, dtype)
    torch.testing.assert_close(packed, alone, rtol=1e-9, atol=1e-11)
    cotangent = torch.randn_like(packed)
    got, want = (torch.autograd.grad((y * cotangent).sum(), [x, *layer.parameters()]) for y in (packed, alone))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", [name for name in LAYERS if "attention" not in name and name != "DeltaNet, both ways"])
def test_a_called_convolution_keeps_packed_sequences_apart(name):
    layer, x, packed, _ = packed_and_alone(name)
    for key, convolution in list(layer.named_children()):
        if isinstance(convolution, nn.Conv1d):
            setattr(layer, key, nn.Sequential(convolution))
    torch.testing.assert_close(layer(x, cu_seqlens=torch.tensor(BOUNDS)), packed, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("layer", [Mamba(8), Mamba2(8), GatedLinearAttention(8, 2, orders=[raster()]), DeltaNet(8, 2, conv=None, orders=[raster()])])
def test_packed_sequences_are_one_row_of_tokens(layer):
    for shape in ((2, 6, 8), (1, 2, 3, 8)):
        with pytest.raises(ValueError, match=r"x: expected \(1, l, c\), packed sequences, since cu_seqlens is given, got"):
            layer(torch.randn(shape), cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="cu_seqlens: expected to rise from 0 to 6, the number of tokens, got"):
        layer(torch.randn(1, 6, 8), cu_seqlens=torch.tensor([0, 5]))


@pytest.mark.parametrize("layer", [TriMamba(8, slices=2), Mamba2(8, orders=[snake()]), GatedLinearAttention(8, 2), DeltaNet(8, 2)])
def test_walks_that_mix_sequences_are_refused(layer):
    with pytest.raises(ValueError, match=r"cu_seqlens: expected None, since orders\.\w+\(.+ is no walk along sequences, got a tensor"):
        layer(torch.randn(1, 6, 8), cu_seqlens=torch.tensor([0, 2, 6]))


def test_a_convolution_in_space_is_refused():
    with pytest.raises(ValueError, match="cu_seqlens: expected None with conv='space', which sees across sequences"):
        DeltaNet(8, 2, orders=[raster()])(torch.randn(1, 6, 8), cu_seqlens=torch.tensor([0, 2, 6]))


@pytest.mark.parametrize("layer", [SSND(8), MLLA(8, 2), SpatialMix(8)])
def test_layers_of_images_have_no_packed_sequences(layer):
    with pytest.raises(TypeError, match="unexpected keyword argument 'cu_seqlens'"):
        layer(torch.randn(1, 2, 3, 8), cu_seqlens=torch.tensor([0, 6]))
