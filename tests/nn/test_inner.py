"""Inner layers that are no plain layers any more: adapters, quantized, parametrized and pruned layers, hooks, wrappers. They are called."""

import copy
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import medssm
from medssm import models, orders
from medssm.integrations.mamba_ssm import mixer as first
from medssm.integrations.mamba_ssm import second
from medssm.models.monai import NETWORKS
from medssm.nn import BiMamba, DeltaNet, Mamba, Mamba2, Mamba3, TriMamba
from medssm.nn.blocks import CONV, causal
from medssm.nn.inner import plain
from medssm.nn.mixers import MIXERS, make_mixer

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
STAND_IN = [(first.Mamba, {"bimamba_type": kind}) for kind in ("none", "v1", "v2", "v3")]
STAND_IN += [(second.Mamba2, {"headdim": 8}), (second.Mamba2Simple, {"headdim": 8})]


class Adapter(nn.Module):
    """base(x) + added(x), with the base's weight and bias in sight: the structure of peft's layers."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.added = base, copy.deepcopy(base)
        for p in self.added.parameters():
            nn.init.normal_(p, std=0.3)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x):
        return self.base_layer(x) + self.added(x)


def replace(network, make):
    """Every inner layer by make(layer): the made ones."""
    found = [(parent, name, layer) for parent in network.modules() for name, layer in parent.named_children() if isinstance(layer, LAYERS)]
    made = [make(layer) for _, _, layer in found]
    for (parent, name, _), layer in zip(found, made, strict=True):
        setattr(parent, name, layer)
    return made


@torch.no_grad()
def merged(adapter):
    """A plain layer with the sum of both weights."""
    layer = copy.deepcopy(adapter.base_layer)
    for p, q in zip(layer.parameters(), adapter.added.parameters(), strict=True):
        p += q
    return layer


def same_as_merged(network, call):
    """The adapted network and the merged one agree, and every adapter learns."""
    network = network.double().eval()
    plain_network = copy.deepcopy(network)
    adapters = replace(network, Adapter)
    pairs = iter(adapters)
    replace(plain_network, lambda _: merged(next(pairs)))
    out = call(network)
    torch.testing.assert_close(out, call(plain_network), rtol=1e-7, atol=1e-7)
    out.square().sum().backward()
    added = [p for adapter in adapters for p in adapter.added.parameters()]
    assert all(p.grad is not None for p in added)
    dead = [p for p in added if not p.grad.any()]  # behind a ReLU of one or two units, which may be off for every input
    assert len(dead) <= len(added) // 10, dead


# -- adapters ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", MIXERS)
def test_adapters_in_every_mixer(name, dims):
    torch.manual_seed(0)
    x = torch.randn(1, *(3, 4, 2)[:dims], 8, dtype=torch.float64)
    same_as_merged(make_mixer(name, 8, dims), lambda m: m(x))


@pytest.mark.parametrize(
    "make", [Mamba, BiMamba, TriMamba, Mamba2, lambda c: DeltaNet(c, 2, conv="order", orders=[orders.window(2), orders.dilated(2)])]
)
def test_adapters_on_projections_and_causal_convolutions(make):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    mixer = make(8) if make is not Mamba2 else Mamba2(8, d_state=4, spatial_dims=2)
    same_as_merged(mixer, lambda m: m(x))


@pytest.mark.parametrize("kind, options", STAND_IN)
def test_adapters_in_the_stand_ins_mixers_and_their_steps(kind, options):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    same_as_merged(kind(8, d_state=4, layer_idx=0, **options), lambda m: m(x))
    if options.get("bimamba_type", "none") != "none" or kind is second.Mamba2Simple:
        return

    def continued(m):
        cache = types.SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
        outs = [m(x[:, :2], inference_params=cache)]
        for t in range(2, 6):
            cache.seqlen_offset = t
            outs.append(m(x[:, t : t + 1], inference_params=cache))
        return torch.cat(outs, 1)

    same_as_merged(kind(8, d_state=4, layer_idx=0, **options), continued)


@pytest.mark.each_network
@pytest.mark.parametrize("name", [name for name in medssm.list_models() if name not in NETWORKS])
def test_adapters_in_every_network(name):
    torch.manual_seed(0)
    network = medssm.create_model(name, spatial_dims=2, in_channels=1, out_channels=2, **models.model_facts(name).small)
    x = torch.randn(1, 1, 32, 32, dtype=torch.float64)
    same_as_merged(network, lambda m: m(x))


# -- quantized layers -------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # torch.ao.quantization says that it is deprecated
@pytest.mark.parametrize("make", [Mamba, BiMamba, Mamba2, Mamba3, first.Mamba, second.Mamba2])
def test_dynamic_quantization(make):
    torch.manual_seed(0)
    options = {"headdim": 8} if issubclass(make, Mamba2) else {}
    mixer, x = make(32, **options), torch.randn(2, 9, 32)
    quantized = torch.ao.quantization.quantize_dynamic(mixer, {nn.Linear})
    assert not any(type(m) is nn.Linear for m in quantized.modules())
    out, want = quantized(x), mixer(x)
    assert 0 < (out - want).abs().max() < 0.05 * want.abs().max()
    if make in (first.Mamba, second.Mamba2):
        states = quantized.allocate_inference_cache(2, None)
        stepped = torch.cat([quantized.step(x[:, t : t + 1], *states)[0] for t in range(9)], 1)
        torch.testing.assert_close(stepped, out, rtol=0, atol=0.1 * want.abs().max().item())


# -- hooks, parametrizations, wrappers --------------------------------------------------------------------------------------------


INNER = ["in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"]


@pytest.mark.parametrize("inner", INNER)
def test_hooks_of_inner_layers_run(inner):
    mixer, x, seen = Mamba(8), torch.randn(1, 5, 8, requires_grad=True), []
    want = mixer(x)
    hooks = [
        mixer.get_submodule(inner).register_forward_hook(lambda *_: seen.append("forward")),
        mixer.get_submodule(inner).register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    out = mixer(x)
    torch.testing.assert_close(out, want)
    out.sum().backward()
    assert seen == ["forward", "backward"]
    hooks[0].remove()
    hooks[1].remove()
    assert plain(mixer.get_submodule(inner))


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("make", [lambda layer: prune.l1_unstructured(layer, "weight", 0.5), nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
def test_a_weight_that_a_hook_makes_is_made_at_every_call(inner, make):
    """As pruning and the older weight_norm do: the second step learns from the weight that the first one left."""
    torch.manual_seed(0)
    mixer, x = Mamba(8), torch.randn(1, 5, 8)
    make(mixer.get_submodule(inner))
    for _ in range(2):
        out = mixer(x)
        out.square().sum().backward()
        with torch.no_grad():
            for p in mixer.parameters():
                p -= 0.1 * p.grad
                p.grad = None
    made = mixer.get_submodule(inner)
    made(torch.randn(1, made.weight.shape[1] * getattr(made, "groups", 1), 5).mT if isinstance(made, nn.Linear) else torch.randn(1, 16, 5))
    fresh = Mamba(8)
    state = {k: v for k, v in mixer.state_dict().items() if k in fresh.state_dict()}
    fresh.load_state_dict({**state, f"{inner}.weight": made.weight.detach()})
    torch.testing.assert_close(mixer(x), fresh(x))
    if make is not nn.utils.weight_norm:
        assert (made.weight == 0).float().mean() >= 0.45


@pytest.mark.parametrize("inner", INNER)
def test_parametrized_weights(inner):
    torch.manual_seed(0)
    mixer, x = Mamba(8), torch.randn(1, 5, 8)
    want = mixer(x)
    parametrizations.weight_norm(mixer.get_submodule(inner))
    torch.testing.assert_close(mixer(x), want)
    mixer(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in mixer.get_submodule(inner).parameters())


def test_parametrized_weights_of_a_mixer_itself():
    """Those that no inner layer has: SSND's and gated linear attention's, by order."""

    class Doubled(nn.Module):
        def forward(self, w):
            return 2 * w

    torch.manual_seed(0)
    for name, weights in (("ss_nd", ["x_proj_weight", "dt_projs_weight", "A_logs"]), ("gla", ["decay_weight"])):
        mixer, x = make_mixer(name, 8, 2), torch.randn(1, 3, 4, 8)
        for weight in weights:
            parametrize.register_parametrization(mixer, weight, Doubled())
        out = mixer(x)
        for weight in weights:
            parametrize.remove_parametrizations(mixer, weight)
        torch.testing.assert_close(out, mixer(x))


@pytest.mark.parametrize("inner", INNER)
def test_wrapped_and_replaced_layers(inner):
    """A module around a layer, as sharding and checkpointing put there, and a `forward` of its own, as offloading does."""
    torch.manual_seed(0)
    mixer, x = Mamba(8), torch.randn(1, 5, 8)
    want, layer, called = mixer(x), mixer.get_submodule(inner), []
    setattr(mixer, inner, nn.Sequential(layer))
    torch.testing.assert_close(mixer(x), want)
    setattr(mixer, inner, layer)
    layer.forward = lambda x: called.append(1) or type(layer).forward(layer, x)
    torch.testing.assert_close(mixer(x), want)
    assert called == [1]


class Halves(torch.Tensor):
    """A weight kept as its half, as weights kept in another form are (torchao, DTensor): a tensor subclass that kernels cannot read."""

    @staticmethod
    def __new__(cls, half):
        return torch.Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype, requires_grad=False)

    def __init__(self, half):
        self.half_of_it = half

    def __tensor_flatten__(self):
        return ["half_of_it"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Halves(inner["half_of_it"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Halves(args[0].half_of_it)
        args = [2 * a.half_of_it if isinstance(a, Halves) else a for a in args]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("inner", INNER)
def test_weights_that_are_tensor_subclasses(inner):
    torch.manual_seed(0)
    mixer, x = Mamba(8).requires_grad_(False), torch.randn(1, 5, 8)
    want, layer = mixer(x), mixer.get_submodule(inner)
    layer.weight = nn.Parameter(Halves(layer.weight.detach() / 2), requires_grad=False)
    torch.testing.assert_close(mixer(x), want)


def test_an_adapted_mixer_compiles_whole_and_exports():
    torch.manual_seed(0)
    mixer, x = Mamba(8, d_state=4), torch.randn(1, 6, 8)
    replace(mixer, Adapter)
    with torch.no_grad():
        want = mixer(x)
        torch.testing.assert_close(torch.compile(mixer, fullgraph=True, backend="eager")(x), want)
        torch.testing.assert_close(torch.export.export(mixer, (x,)).module()(x), want)


# -- plain layers -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Conv1d(4, 4, 3, groups=4), CONV[2](4, 4, 3, groups=4), CONV[3](4, 4, 3, groups=4)])
def test_networks_own_layers_are_plain(layer):
    """Kernels read them: the low-rank step stays low-rank, and no order needs a copy."""
    assert plain(layer) and not plain(nn.Sequential(layer))
    layer.__class__ = type("Other", (type(layer),), {})
    assert not plain(layer)


def test_a_called_causal_convolution_begins_anew_where_the_order_does():
    torch.manual_seed(0)
    conv, x = nn.Conv1d(6, 6, 4, groups=6, padding=3), torch.randn(2, 5, 7, 6)
    for order in (None, orders.raster(), orders.raster(reverse=True), orders.window(3), orders.dilated(2, reverse=True), orders.hilbert()):
        torch.testing.assert_close(causal(nn.Sequential(conv), x, order), causal(conv, x, order or orders.raster()))
