"""medssm_unet with convolutions in the place of its mixers, and with nothing there: what a comparison of mixers needs."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import medssm
from medssm.nn.blocks import ConvBlock, MixerBlock
from medssm.nn.bottleneck import Bottleneck
from medssm.nn.mixers import make_mixer


def multiply_adds(module, *shape) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        module.to("meta")(torch.empty(shape, device="meta"))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    ("channels", "options"), [(48, {"expand": 1}), (64, {"expand": 1}), (256, {"expand": 2}), (64, {"expand": 1, "d_state": 32})]
)
def test_the_convolutions_take_as_many_multiply_adds_as_the_scans(channels, options, dims):
    scans, convolutions = (make_mixer(name, channels, dims, **options) for name in ("ss_nd", "conv"))
    shape = (1, *(12,) * dims, channels)
    assert multiply_adds(convolutions, *shape) == pytest.approx(multiply_adds(scans, *shape), rel=0.05)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_the_networks_take_as_many(size):
    scans, convolutions, none = (medssm.create_model("medssm_unet", 3, 1, 3, size=size, mixer=mixer) for mixer in ("ss_nd", "conv", "none"))
    counts = [multiply_adds(network.eval(), 1, 1, 64, 64, 64) for network in (scans, convolutions, none)]
    mixers = counts[0] - counts[2]
    assert mixers > 0 and counts[1] - counts[2] == pytest.approx(mixers, rel=0.05)  # of the mixers alone: they are a small part of the whole


def test_a_bottleneck_computes_its_formula_and_sees_its_neighbours_alone():
    torch.manual_seed(0)
    module, x = Bottleneck(6, 4, 2), torch.randn(1, 5, 7, 6, requires_grad=True)
    silu = torch.nn.functional.silu
    inner = silu(x @ module.down.weight.T + module.down.bias).movedim(-1, 1)
    wanted = silu(torch.nn.functional.conv2d(inner, module.conv.weight, module.conv.bias, padding=1)).movedim(1, -1)
    torch.testing.assert_close(module(x), wanted @ module.up.weight.T + module.up.bias)
    seen = torch.autograd.grad(module(x)[0, 2, 3].sum(), x)[0].abs().sum(-1)[0] > 0
    assert seen[1:4, 2:5].all() and seen.sum() == 9


def test_only_the_mixers_differ():
    options = {"features": (4, 6, 16), "depths": (0, 1, 1), "decoder_depths": (1, 0)}
    ours, conv, none = (medssm.create_model("medssm_unet", 2, 1, 3, mixer=mixer, **options) for mixer in ("ss_nd", "conv", "none"))

    assert sum(isinstance(module, Bottleneck) for module in conv.modules()) == sum(isinstance(module, MixerBlock) for module in ours.modules()) == 1
    shapes = [{name: tuple(value.shape) for name, value in network.state_dict().items()} for network in (ours, conv)]
    assert {k: v for k, v in shapes[0].items() if ".mixer." not in k} == {k: v for k, v in shapes[1].items() if ".mixer." not in k}
    left = {name.replace(".local.", "."): tuple(value.shape) for name, value in ours.state_dict().items() if ".local." in name}
    assert left.items() <= {name: tuple(value.shape) for name, value in none.state_dict().items()}.items()
    assert not any(isinstance(module, MixerBlock) for module in none.modules()) and any(isinstance(module, ConvBlock) for module in none.modules())
    for network in (conv, none):
        out = network(torch.randn(2, 1, 9, 14))
        out.square().mean().backward()
        assert out.shape == (2, 3, 9, 14) and all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_they_can_be_built_where_nothing_is_computed():
    with FakeTensorMode():
        assert medssm.create_model("medssm_unet", 3, 1, 2, size="tiny", mixer="conv")(torch.randn(1, 1, 16, 16, 16)).shape == (1, 2, 16, 16, 16)


def test_no_mixer_has_no_options():
    with pytest.raises(ValueError, match=r"expand: expected None, as there is no mixer, got 2"):
        medssm.create_model("medssm_unet", mixer="none", expand=2)
    with pytest.raises(ValueError, match=r"mixer: expected one of ss_nd, .*, conv, none, got 'convolution'"):
        medssm.create_model("medssm_unet", mixer="convolution")
