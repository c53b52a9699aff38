"""3D convolutions on a CPU: PyTorch's values and gradients, oneDNN where PyTorch leaves it aside, PyTorch's own operators for tracers."""

import copy

import pytest
import torch
from torch import nn

import medssm
from medssm.nn.convolution import Conv3d, ConvTranspose2d, ConvTranspose3d, fast_layers

FORMATS = {"first": torch.contiguous_format, "last": torch.channels_last_3d}
SHAPES = {
    "3": {"kernel_size": 3, "padding": 1},
    "stride": {"kernel_size": 3, "stride": (1, 2, 1), "padding": 1, "bias": False},
    "dilation": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "unpadded": {"kernel_size": (1, 3, 3)},
    "flat": {"kernel_size": (3, 1, 1), "padding": (1, 0, 0)},
    "flat_groups": {"kernel_size": (3, 1, 1), "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4},
    "wide": {"kernel_size": 5, "padding": 2},
    "patches": {"kernel_size": 2, "stride": 2},
    "point": {"kernel_size": 1},
    "point_stride": {"kernel_size": 1, "stride": 2},
    "point_padding": {"kernel_size": 1, "padding": 1},
    "same": {"kernel_size": (3, 5, 3), "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
}
SLOW = ("3", "stride", "dilation", "unpadded", "reflect", "circular")  # what PyTorch computes without oneDNN at batch 1


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def volume(*shape, memory="first"):
    return torch.randn(*shape).contiguous(memory_format=FORMATS[memory])


def values(layer, x, dy):
    """The output of a layer, and the gradients of its input and weights."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return y, *torch.autograd.grad(y, (x, *layer.parameters()), dy)


def assert_equals_pytorch(layer, theirs, x, tolerance=1e-5):
    """Values and gradients against PyTorch's in float64."""
    theirs = theirs.double()
    theirs.load_state_dict(layer.state_dict())
    dy = torch.randn_like(layer(x))
    for ours, right in zip(values(layer, x, dy), values(theirs, x.double(), dy.double()), strict=True):
        assert ours.dtype == x.dtype
        assert (ours.double() - right).abs().max() <= tolerance * right.abs().max()


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_pytorchs(shape, batch, memory):
    torch.manual_seed(0)
    assert_equals_pytorch(Conv3d(4, 8, **SHAPES[shape]), nn.Conv3d(4, 8, **SHAPES[shape]), volume(batch, 4, 7, 9, 8, memory=memory))


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize(
    "options", [{"stride": 2, "padding": 1, "output_padding": 1}, {"padding": 1}, {"stride": (1, 2, 2)}, {"groups": 2, "dilation": 2}]
)
def test_transposed_convolutions_too(options, memory):
    torch.manual_seed(0)
    assert_equals_pytorch(ConvTranspose3d(4, 6, 3, **options), nn.ConvTranspose3d(4, 6, 3, **options), volume(1, 4, 5, 6, 7, memory=memory))
    layer = ConvTranspose3d(4, 6, 3, stride=2)
    assert layer(volume(1, 4, 5, 6, 7), output_size=[12, 14, 16]).shape == (1, 6, 12, 14, 16)


@pytest.mark.parametrize("ours", [ConvTranspose2d, ConvTranspose3d])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 4},
        {"kernel_size": 5, "stride": 2, "padding": 2, "output_padding": 1, "groups": 4, "bias": False},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 1, "stride": 3, "output_padding": 2, "bias": False},
    ],
)
def test_transposed_convolutions_between_zeros(ours, options):
    torch.manual_seed(0)
    pytorchs, x = getattr(nn, ours.__name__), volume(2, 4, 5, 6, 7, memory="last")
    x = x if ours is ConvTranspose3d else x[..., 0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    layer = ours(4, 4, **options)
    assert_equals_pytorch(layer, pytorchs(4, 4, **options), x)
    assert layer(x).movedim(1, -1).is_contiguous()
    assert not any("transpose" in name and "conv" in name for name in operators(lambda: layer(x)))
    for other in (x.contiguous(), x[:0], x.double()):  # by PyTorch's operator
        torch.testing.assert_close(layer.to(other.dtype)(other), pytorchs.forward(layer, other), rtol=0, atol=0)


def test_other_transposed_convolutions_are_pytorchs():
    x = volume(1, 4, 5, 6, 7, memory="last")
    for options in ({"groups": 2}, {"groups": 4, "padding": 0}, {"groups": 4, "dilation": 2}, {"groups": 4, "stride": 1}):
        layer = ConvTranspose3d(4, 4, 3, **{"padding": 1, "stride": 2} | options)
        torch.testing.assert_close(layer(x), nn.ConvTranspose3d.forward(layer, x), rtol=1e-5, atol=1e-6)
        assert not any("depthwise_conv" in name for name in operators(lambda layer=layer: layer(x)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", ["3", "point"])
def test_other_types(shape, dtype, tolerance):
    torch.manual_seed(0)
    x = volume(1, 4, 7, 9, 8, memory="last").to(dtype)
    assert_equals_pytorch(Conv3d(4, 6, **SHAPES[shape]).to(dtype), nn.Conv3d(4, 6, **SHAPES[shape]), x, tolerance)


def operators(function):
    """What a function runs, by its profile."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("shape", [*SLOW, "flat", "flat_groups"])
def test_onednn_computes_what_pytorch_leaves_to_slow_kernels(shape, memory):
    batch = 2 if "flat" in shape else 1
    x, layer = volume(batch, 4, 7, 9, 8, memory=memory), nn.Conv3d(4, 6, **SHAPES[shape])
    slow = operators(lambda: layer(x))
    ran = operators(lambda: fast_layers(layer)(x).sum().backward())
    assert not any("slow_conv" in name for name in ran) and "aten::mkldnn_convolution" in ran
    assert any("slow_conv" in name for name in slow), "PyTorch has become faster: is this module still wanted?"


def test_many_channels_last_weights_are_not_reordered_for_a_few_voxels():
    x, layer = volume(1, 64, 3, 3, 3, memory="last"), Conv3d(64, 64, 3, padding=1).to(memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        assert not any("slow_conv" in name for name in operators(lambda: layer(x)))
        y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(y, torch.nn.functional.conv3d(x, layer.weight, layer.bias, padding=1), rtol=1e-4, atol=1e-5)


def test_a_kernel_of_one_voxel_is_a_matrix_product_on_channels_last_memory():
    x = volume(2, 8, 6, 7, 8, memory="last").requires_grad_()
    layer = Conv3d(8, 4, 1)
    y = layer(x)
    assert not any("conv" in name for name in operators(lambda: layer(x).sum().backward()))
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("size", [(1, 4, 7, 9, 8), (1, 4, 4, 5, 5), (2, 4, 7, 9, 8), (1, 4, 64, 128, 3)])
@pytest.mark.parametrize("shape", ["3", "stride", "flat", "depthwise", "patches", "point", "point_stride"])
def test_channels_last_memory_stays(shape, size):
    y = Conv3d(4, 4, **SHAPES[shape])(volume(*size, memory="last"))
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


def test_errors_are_pytorchs():
    with pytest.raises(RuntimeError, match="to have 4 channels, but got 3"):
        Conv3d(4, 6, 1)(volume(1, 3, 7, 7, 7, memory="last"))
    for x, words in (
        (volume(1, 3, 7, 7, 7), "to have 4 channels, but got 3"),
        (volume(1, 4, 7, 2, 7), "Kernel size can't be greater"),
        (volume(4, 7), "4D"),
    ):
        with pytest.raises(RuntimeError, match=words):
            Conv3d(4, 6, 3)(x)
    assert Conv3d(4, 6, 3)(volume(4, 7, 7, 7)).shape == (6, 5, 5, 5)
    assert Conv3d(4, 6, 3)(torch.randn(0, 4, 7, 7, 7)).shape == (0, 6, 5, 5, 5)


def test_second_derivatives_are_pytorchs():
    torch.manual_seed(0)
    layer = Conv3d(4, 6, 3, padding=1)
    theirs = nn.Conv3d(4, 6, 3, padding=1).double()
    theirs.load_state_dict(layer.state_dict())
    x, found = volume(1, 4, 7, 9, 8), []
    for module, value in ((layer, x.clone()), (theirs, x.double())):
        (gradient,) = torch.autograd.grad(module(value.requires_grad_()).square().sum(), value, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), (value, module.weight)))
    for ours, right in zip(*found, strict=True):
        assert (ours - right).abs().max() <= 1e-5 * right.abs().max()


def test_transforms_take_pytorchs_operator():
    layer, x = Conv3d(4, 6, 3, padding=1), volume(3, 1, 4, 5, 6, 7)
    torch.testing.assert_close(torch.func.vmap(layer)(x), torch.stack([layer(v) for v in x]))
    torch.testing.assert_close(torch.func.jvp(layer, (x[0],), (x[1],))[1], layer(x[1]) - layer.bias.view(6, 1, 1, 1))


def test_autocast_is_pytorchs():
    layer, x = Conv3d(4, 6, 3, padding=1), volume(1, 4, 7, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16 and ConvTranspose3d(4, 6, 3)(x).dtype == torch.bfloat16


def test_onednn_switched_off_stays_off():
    layer, x = Conv3d(4, 6, 3, padding=1), volume(1, 4, 7, 9, 8)
    with torch.backends.mkldnn.flags(enabled=False):
        assert "aten::mkldnn_convolution" not in operators(lambda: layer(x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    torch.manual_seed(0)
    layer = nn.Sequential(Conv3d(4, 6, 3, padding=1), nn.ReLU(), Conv3d(6, 4, 1))
    compiled = torch.compile(layer, dynamic=dynamic, fullgraph=True, backend="aot_eager")
    for size in (7, 9):
        x = volume(1, 4, size, size + 1, 8, memory="last")
        dy = torch.randn_like(layer(x))
        assert compiled(x).is_contiguous(memory_format=torch.channels_last_3d)
        for ours, right in zip(values(compiled, x, dy), values(layer, x, dy), strict=True):
            torch.testing.assert_close(ours, right)
    ran = operators(lambda: compiled(x))
    assert "medssm::conv3d_forward" in ran and not any("slow_conv" in name for name in ran)


def test_the_operators_are_whole():
    x, layer = volume(1, 4, 7, 9, 8, memory="last").requires_grad_(), Conv3d(4, 6, 3, padding=1)
    torch.library.opcheck(torch.ops.medssm.conv3d_forward.default, (x, layer.weight, layer.bias, [1] * 3, [1] * 3, [1] * 3, 1))
    dy = torch.randn(1, 6, 7, 9, 8)
    arguments = (dy, x.detach(), layer.weight.detach(), [1] * 3, [1] * 3, [1] * 3, 1, [True, True, True])
    torch.library.opcheck(torch.ops.medssm.conv3d_backward.default, arguments)


def test_tracers_see_pytorchs_own_operators():
    network, x = nn.Sequential(Conv3d(4, 6, 3, padding=1), Conv3d(6, 4, 1), ConvTranspose3d(4, 2, 3)).eval(), volume(1, 4, 7, 9, 8, memory="last")
    exported = torch.export.export(network, (x,))
    called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert called == ["aten.conv3d.default", "aten.conv3d.default", "aten.conv_transpose3d.input"]
    traced = torch.jit.trace(network, x)
    assert "medssm::" not in str(traced.inlined_graph) and str(traced.inlined_graph).count("_convolution") == 3
    graph = torch.fx.symbolic_trace(network)
    for found in (exported.module(), traced, graph):
        torch.testing.assert_close(found(x), network(x))


def test_any_networks_convolutions_become_fast_in_place():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv3d(4, 6, 3), nn.ModuleList([nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(6, 4, 2)]), nn.ConvTranspose3d(6, 4, 2), nn.LazyConv3d(3, 1)
    )
    weights, seen = copy.deepcopy(network[0].state_dict()), []
    network[0].register_forward_hook(lambda *_: seen.append(1))
    assert fast_layers(network) is network
    assert [type(module) for module in network] == [Conv3d, nn.ModuleList, ConvTranspose3d, nn.LazyConv3d]
    assert [type(module) for module in network[1]] == [nn.Conv2d, ConvTranspose2d]
    assert all(torch.equal(value, weights[name]) for name, value in network[0].state_dict().items())
    network[0](volume(1, 4, 5, 5, 5))
    assert seen and isinstance(copy.deepcopy(network)[0], Conv3d)


def test_networks_have_them():
    network = medssm.create_model("monai_segresnet", init_filters=8)
    assert any(type(module) is Conv3d for module in network.modules()) and not any(type(module) is nn.Conv3d for module in network.modules())
    network = medssm.create_model("medssm_unet", size="tiny").eval()
    slow = copy.deepcopy(network)
    for module in slow.modules():
        module.__class__ = nn.Conv3d if type(module) is Conv3d else type(module)
    x = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        assert (network(x) - slow(x)).abs().max() <= 1e-5 * slow(x).abs().max()


def test_tensors_with_metadata_go_through():
    monai_data = pytest.importorskip("monai.data")
    x = monai_data.MetaTensor(torch.randn(1, 4, 5, 6, 7))
    for layer in (Conv3d(4, 6, 3, padding=1), Conv3d(4, 6, 1), ConvTranspose3d(4, 6, 3)):
        y = layer(x)
        assert type(y) is monai_data.MetaTensor
        y.sum().backward()
        torch.testing.assert_close(y.as_tensor(), layer(x.as_tensor()))
    x, layer = x.contiguous(memory_format=torch.channels_last_3d), ConvTranspose3d(4, 4, 3, 2, 1, groups=4)
    assert type(layer(x)) is monai_data.MetaTensor and torch.equal(layer(x).as_tensor(), layer(x.as_tensor()))
