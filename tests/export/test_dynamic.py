"""One exported or compiled program for all sizes, made in grad mode: outputs and gradients equal eager at smaller and larger ones."""

import pytest
import torch

from tests.export.layers import LAYERS, NETS, gradients, images, layer, network, op

OPS = (
    "bi_wkv",
    "causal_conv1d",
    "delta_rule",
    "depthwise_conv",
    "gated_linear_attention",
    "linear_attention",
    "selective_scan",
    "selective_scan_nd",
    "ssd",
)
# What `make test` takes alone; of layers to compile, one.
FEW = ("Mamba", "TriMamba", "SSND", "MLLA", "SpatialMix", "selective_scan", "linear_attention", "ssd", "medssm_unet")


def every(names, few=FEW):
    marked = [name if name in few else pytest.param(name, marks=pytest.mark.thorough) for name in names]
    return pytest.mark.parametrize("name", marked)


def check(program, module, inputs):
    leaves = [t.clone().requires_grad_() for t in inputs]
    weights = dict(module.named_parameters())
    got, want = program(*leaves), module(*leaves)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    learned = {name.removeprefix("_orig_mod."): t for name, t in program.named_parameters()}
    found = gradients(got, [*leaves, *(learned[name] for name in weights)])
    torch.testing.assert_close(found, gradients(want, [*leaves, *weights.values()]), rtol=1e-3, atol=1e-4)


@every(OPS)
def test_an_exported_op(name):
    module, calls, free = op(name)
    program = torch.export.export(module, calls[0], dynamic_shapes={"tensors": free}).module()
    for tensors in calls:
        check(program, module, tensors)


@every(LAYERS)
def test_an_exported_layer(name):
    module, inputs = layer(name), LAYERS[name].inputs()
    program = torch.export.export(module, (inputs[0],), dynamic_shapes=(LAYERS[name].dynamic(),)).module()
    for x in inputs:
        check(program, module, [x])


def compiled_once(module, calls):
    """`module` compiled whole for all sizes, checked at each without compiling again."""
    torch._dynamo.reset()
    compiled = torch.compile(module, dynamic=True, fullgraph=True, backend="aot_eager")
    check(compiled, module, calls[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tensors in calls[1:]:
            check(compiled, module, tensors)


@every(OPS)
def test_a_compiled_op(name):
    module, calls, _ = op(name)
    compiled_once(module, calls[:2])  # of a batch of one PyTorch makes a program of its own


@every(LAYERS, ["SSND"])
def test_a_compiled_layer(name):
    compiled_once(layer(name), [[x] for x in LAYERS[name].inputs()[:2]])


@every(NETS)
def test_an_exported_network(name):
    model = network(name)
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(model, (images()[0],), dynamic_shapes=(dynamic,)).module()
    with torch.no_grad():
        for x in images():
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-4)
