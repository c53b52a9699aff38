"""torch.fx.symbolic_trace: every op is one node, every network traces, and features are taken out by the names of nodes."""

import pickle

import pytest
import torch
from torch import fx

import medssm
from medssm.ops import selective_scan
from tests.export.layers import LAYERS, NETS, images, layer, network, normal, op
from tests.export.test_dynamic import OPS


def same(traced, module, *inputs):
    with torch.no_grad():
        torch.testing.assert_close(traced(*inputs), module(*inputs), rtol=1e-6, atol=1e-6)


class OfFirst(torch.nn.Module):
    """An op of its first tensor, the others buffers."""

    def __init__(self, module, tensors):
        super().__init__()
        self.module, self.others = module, [f"tensor{i}" for i in range(1, len(tensors))]
        for name, t in zip(self.others, tensors[1:], strict=True):
            self.register_buffer(name, t)

    def forward(self, x):
        return self.module(x, *(getattr(self, name) for name in self.others))


@pytest.mark.parametrize("name", OPS)
def test_an_op_is_one_node(name):
    call, (tensors, *_), _ = op(name)
    module = OfFirst(call, tensors)
    traced = fx.symbolic_trace(module)
    assert [node.name for node in traced.graph.nodes if node.target is getattr(medssm.ops, name)] == [name]
    same(traced, module, tensors[0])
    same(pickle.loads(pickle.dumps(traced)), module, 2 * tensors[0])


def test_an_order_of_a_node():
    def scan(u, A, B):
        return medssm.ops.selective_scan(u, u, A, B, B, order=medssm.orders.snake())

    traced, (u, A, B) = fx.symbolic_trace(scan), (normal(2, 3, 4, 5), -normal(5, 3).abs(), normal(2, 3, 4, 3))
    torch.testing.assert_close(traced(u, A, B), scan(u, A, B))


def test_a_function_imported_by_name_says_how_it_can_be_traced():
    with pytest.raises(
        TypeError, match=r"u: expected a tensor, got Proxy of torch.fx: call the op as medssm.ops.<op>, or give its name to torch.fx.wrap"
    ):
        fx.symbolic_trace(lambda u, A, B: selective_scan(u, u, A, B, B))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name, training):
    module = torch.nn.Sequential(layer(name)).train(training)
    traced = fx.symbolic_trace(module)
    for x in LAYERS[name].inputs():
        torch.manual_seed(0)
        got = traced(x)
        torch.manual_seed(0)
        torch.testing.assert_close(got, module(x), rtol=1e-6, atol=1e-6)


def test_a_layer_alone_says_that_it_is_one_node():
    with pytest.raises(TypeError, match=r"torch\.fx leaves a Mamba whole: expected a module that contains it"):
        fx.symbolic_trace(layer("Mamba"))


@pytest.mark.each_network
@pytest.mark.parametrize("name", NETS)
def test_a_network(name):
    model = network(name)
    traced = fx.symbolic_trace(model)
    for x in images():
        same(traced, model, x)


@pytest.mark.each_network
@pytest.mark.parametrize("name", NETS)
def test_features_by_the_names_of_nodes(name):
    model, x = network(name, features_only=True), images()[0]
    (maps,) = next(node for node in fx.symbolic_trace(model).graph.nodes if node.op == "output").args
    with torch.no_grad():
        for at, wanted in zip([node.name for node in maps], model(x), strict=True):
            traced = fx.symbolic_trace(model)
            graph = traced.graph
            graph.erase_node(next(node for node in graph.nodes if node.op == "output"))
            graph.output(next(node for node in graph.nodes if node.name == at))
            graph.eliminate_dead_code()
            traced.recompile()
            torch.testing.assert_close(traced(x), wanted)


@pytest.mark.parametrize("name", [name for name in NETS if "deep_supervision" in medssm.models.model_options(name)])
def test_deep_supervision(name):
    model = network(name, deep_supervision=True)
    same(fx.symbolic_trace(model), model, images()[0])
