"""torch.jit.trace: the traced layer or network equals eager at other sizes of the same rank. torch.jit.script refuses in one line."""

import pytest
import torch

import medssm
from tests.export.layers import LAYERS, NETS, images, layer, network, normal

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes are checked while tracing, and only then


def check(traced, module, inputs):
    with torch.no_grad():
        for x in inputs:
            torch.testing.assert_close(traced(x), module(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_a_traced_layer(name):
    module, inputs = layer(name), LAYERS[name].inputs()
    check(torch.jit.trace(module, inputs[0], check_trace=False), module, inputs)


def test_a_traced_layer_learns():
    module, (x, other, _) = layer("SSND"), LAYERS["SSND"].inputs()
    traced = torch.jit.trace(module, x, check_trace=False)
    want, got = (torch.autograd.grad(f(other).square().sum(), module.parameters()) for f in (module, traced))
    torch.testing.assert_close(got, want)


def test_positions_of_a_traced_layer_are_those_of_the_size_at_hand():
    """In float64 the share of the epsilon shows, which grows with the number of voxels."""
    module = medssm.nn.LinearAttention(8, 2).double().eval()
    small, large = (1e-3 * normal(1, *size, 8).double() - 9 for size in ((3, 2), (40, 50)))
    torch.nn.init.constant_(module.qk.weight, 0.5)  # keys near 0: elu + 1 of about -36
    traced = torch.jit.trace(module, small, check_trace=False)
    with torch.no_grad():
        torch.testing.assert_close(traced(large), module(large), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", [name if name == "medssm_unet" else pytest.param(name, marks=pytest.mark.thorough) for name in NETS])
def test_a_network_under_monais_conversion(name, dims):
    convert_to_torchscript = pytest.importorskip("monai.networks").convert_to_torchscript
    dtype = torch.float32 if name == "medssm_unet" else torch.float64  # norms over few voxels enlarge what convolutions round in float32
    model, inputs = network(name, dims).to(dtype), [x.to(dtype) for x in images(dims)]
    traced = convert_to_torchscript(model, inputs=inputs[:1], use_trace=True, check_trace=False)
    check(traced, model, inputs)


@pytest.mark.parametrize("name", NETS)
def test_scripting_is_refused_in_one_line(name):
    with pytest.raises(TypeError, match=r"^\w+ cannot be scripted: use torch\.jit\.trace, whose result takes any size, or torch\.export$"):
        torch.jit.script(network(name))
