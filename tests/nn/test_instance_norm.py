"""Instance norms: PyTorch's values and the right gradients in every memory format, which is kept."""

import copy

import pytest
import torch
from torch import nn

import medssm
from medssm.nn.convolution import fast_layers
from medssm.nn.instance_norm import InstanceNorm2d, InstanceNorm3d, instance_norm

KINDS = {2: (InstanceNorm2d, nn.InstanceNorm2d), 3: (InstanceNorm3d, nn.InstanceNorm3d)}
SPATIAL = {2: (31, 20), 3: (7, 9, 10)}
FORMATS = {2: (torch.contiguous_format, torch.channels_last), 3: (torch.contiguous_format, torch.channels_last_3d)}


def right(x, weight, bias, eps=1e-5):
    """The formula in float64."""
    x, axes = x.double(), tuple(range(2, x.dim()))
    y = (x - x.mean(axes, keepdim=True)) / (x.var(axes, correction=0, keepdim=True) + eps).sqrt()
    shape = (-1, *[1] * len(axes))
    return y if weight is None else y * weight.double().view(shape) + bias.double().view(shape)


@pytest.mark.parametrize("of_gradient", [0, 1])
@pytest.mark.parametrize("of_input", [0, 1])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dims", [2, 3])
def test_values_and_gradients(dims, batch, affine, of_input, of_gradient):
    """Of a batch of one, PyTorch's own gradient is wrong where that of the output is channels-last."""
    torch.manual_seed(0)
    layer = KINDS[dims][0](6, affine=affine)
    if affine:
        nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    x = (2 * torch.randn(batch, 6, *SPATIAL[dims]) + 5).contiguous(memory_format=FORMATS[dims][of_input]).requires_grad_()
    dy = torch.randn(x.shape).contiguous(memory_format=FORMATS[dims][of_gradient])
    y, expected = layer(x), right(x, layer.weight, layer.bias)
    assert y.dtype == x.dtype and y.is_contiguous(memory_format=FORMATS[dims][of_input])
    tensors = [x, *layer.parameters()]
    pairs = [(y, expected), *zip(torch.autograd.grad(y, tensors, dy), torch.autograd.grad(expected, tensors, dy.double()), strict=True)]
    for ours, theirs in pairs:
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_a_network_trained_one_sample_at_a_time_has_the_right_gradient():
    torch.manual_seed(0)
    network = medssm.create_model("umamba_bot", 3, 1, 2, features=(4, 8), blocks=1, decoder_blocks=1)
    x, exact = torch.randn(1, 1, 8, 8, 8), copy.deepcopy(network).double()
    exact(x.double()).square().mean().backward()
    last = network.to(memory_format=torch.channels_last_3d)
    last(x.contiguous(memory_format=torch.channels_last_3d)).square().mean().backward()
    noise = 1e-6 * max(theirs.grad.abs().max() for theirs in exact.parameters())  # a bias before a norm has the gradient 0
    for (name, ours), theirs in zip(last.named_parameters(), exact.parameters(), strict=True):
        assert (ours.grad - theirs.grad).abs().max() <= 1e-4 * theirs.grad.abs().max() + noise, name


def test_second_derivatives():
    x = torch.randn(1, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(2, 3, dtype=torch.float64).requires_grad_().unbind()
    assert torch.autograd.gradcheck(instance_norm, (x, weight, bias)) and torch.autograd.gradgradcheck(instance_norm, (x, weight, bias))


@pytest.mark.parametrize("batch", [1, 2])
def test_half_precision(batch):
    x = (2 * torch.randn(batch, 6, 31, 20) + 5).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    y = InstanceNorm2d(6, affine=True)(x)
    assert y.dtype == x.dtype and (y - right(x, None, None)).abs().max() <= 2**-8 * y.abs().max()


@pytest.mark.parametrize("batch", [1, 2])
def test_a_single_voxel_is_refused(batch):
    for x in (torch.randn(batch, 3, 1, 1), torch.randn(batch, 3, 1, 1).contiguous(memory_format=torch.channels_last)):
        with pytest.raises(ValueError, match="more than 1"):
            InstanceNorm2d(3)(x)
    with pytest.raises(ValueError, match="5D"):
        InstanceNorm3d(3)(torch.randn(2, 2, 3, 4, 5, 6))


def test_statistics_that_are_kept_and_maps_without_a_batch_are_pytorchs():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    ours, theirs = (kind(3, track_running_stats=True) for kind in KINDS[2])
    assert torch.equal(ours(x), theirs(x)) and torch.equal(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    torch.testing.assert_close(InstanceNorm2d(3)(x[0]), InstanceNorm2d(3)(x)[0])


def test_tracers_see_pytorchs_operator():
    network = nn.Sequential(InstanceNorm2d(3, affine=True), nn.ReLU()).eval()
    x = torch.randn(2, 3, 6, 5).contiguous(memory_format=torch.channels_last)
    exported = torch.export.export(network, (x,))
    assert [node.target for node in exported.graph.nodes if "instance_norm" in str(node.target)] == [torch.ops.aten.instance_norm.default]
    for found in (exported.module(), torch.jit.trace(network, x), torch.fx.symbolic_trace(network)):
        torch.testing.assert_close(found(x), network(x))
    torch.testing.assert_close(torch.func.vmap(network)(x[:, None])[:, 0], network(x))


def test_any_networks_instance_norms_become_ours_in_place():
    network = nn.Sequential(nn.InstanceNorm2d(3), nn.InstanceNorm3d(3, affine=True), nn.InstanceNorm1d(3))
    weight = network[1].weight
    assert [type(layer) for layer in fast_layers(network)] == [InstanceNorm2d, InstanceNorm3d, nn.InstanceNorm1d] and network[1].weight is weight
    theirs = medssm.from_upstream(
        "umamba_bot",
        **{"input_channels": 1, "n_stages": 2, "features_per_stage": 4, "conv_op": "Conv2d", "kernel_sizes": 3, "strides": (1, 2)},
        **{"n_conv_per_stage": 1, "num_classes": 2, "n_conv_per_stage_decoder": 1, "norm_op": "InstanceNorm2d", "nonlin": "ReLU"},
    )
    assert {type(layer) for layer in theirs.modules() if isinstance(layer, nn.InstanceNorm2d)} == {InstanceNorm2d}


@pytest.mark.parametrize("batch", [1, 2])
def test_a_subclass_that_sees_functions_gets_the_same_bits(batch):
    monai = pytest.importorskip("monai.data")
    x = torch.randn(batch, 6, 7, 9, 10).contiguous(memory_format=torch.channels_last_3d)
    layer = InstanceNorm3d(6, affine=True)
    y = layer(monai.MetaTensor(x))
    assert isinstance(y, monai.MetaTensor) and torch.equal(y.as_tensor(), layer(x))
    y.sum().backward()
