"""Convolutions with the norm and the activation behind them: one pass gives what the layers give."""

import pytest
import torch
from torch import nn

from medssm.nn import blocks, fused
from medssm.nn.fused import Chain, chain

ACTIVATIONS = [nn.ReLU(), nn.LeakyReLU(0.2), nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.GELU("tanh"), nn.Sigmoid()]


def started(norm):
    """The norm at inference, with statistics and weights of its own."""
    for t in (norm.running_mean, norm.weight, norm.bias):
        nn.init.normal_(t)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm.eval()


def one_by_one(layers, x):
    for layer in layers:
        x = layer(x)
    return x


@pytest.fixture
def passes(monkeypatch):
    """The names of the activations that convolutions took along."""
    taken, convolution = [], torch.ops.mkldnn._convolution_pointwise

    def counted(*args):
        taken.append(args[-3])
        return convolution(*args)

    monkeypatch.setattr(torch.ops.mkldnn, "_convolution_pointwise", counted)
    return taken


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
def test_equals_the_layers_one_by_one(act, dims, last, passes):
    torch.manual_seed(0)
    conv, norm = blocks.CONV[dims], blocks.BATCH_NORM[dims]
    layers = [
        conv(6, 8, 3, 2, 1),
        started(norm(8)),
        act,
        conv(8, 8, 3, padding=2, dilation=2, groups=4, bias=False),
        started(norm(8)),
        conv(8, 4, 1),
        act,
    ]
    x = torch.randn(2, 6, *(20, 17, 12)[:dims])
    x = x.contiguous(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d) if last else x
    with torch.no_grad():
        got, want = chain(layers, x), one_by_one(layers, x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert got.stride() == want.stride() and len(passes) == 3 and passes[1] == "none" != passes[0] == passes[2]


def test_a_small_map_keeps_its_norm(passes):
    """Scaling the weights would be more work than the norm."""
    layers = [nn.Conv2d(64, 64, 3, padding=1), started(nn.BatchNorm2d(64)), nn.ReLU()]
    x = torch.randn(1, 64, 4, 4)
    with torch.no_grad():
        assert torch.equal(chain(layers, x), one_by_one(layers, x)) and not passes


@pytest.mark.parametrize("why", ["gradients", "training", "hook", "subclass", "traced", "half", "autocast", "padding"])
def test_whatever_is_more_than_its_weights_is_called(why, passes):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect" if why == "padding" else "zeros"), started(nn.BatchNorm2d(4))
    model, x, seen = Chain(conv, norm, nn.ReLU()), torch.randn(1, 3, 32, 32), []
    want = one_by_one(model, x).detach()
    if why == "hook":
        conv.register_forward_hook(lambda *_: seen.append(1))
    if why == "subclass":
        conv.__class__ = type("Adapter", (nn.Conv2d,), {})
    if why == "training":
        norm.train()
        want = one_by_one(model, x).detach()
    with torch.no_grad():
        run = torch.jit.trace(model, x, check_trace=False) if why == "traced" else model
    with torch.set_grad_enabled(why == "gradients"), torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        got = run.to(torch.bfloat16)(x.bfloat16()) if why == "half" else run(x)
    if why == "training":  # the activation alone has no convolution before it
        torch.testing.assert_close(got, want)
    else:
        torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05) if why in ("half", "autocast") else torch.testing.assert_close(got, want)
    assert not passes and bool(seen) == (why == "hook") and got.requires_grad == (why == "gradients")


def test_export_and_fx_see_the_layers():
    model, x = Chain(nn.Conv2d(3, 4, 3), started(nn.BatchNorm2d(4)), nn.ReLU()).eval(), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        names = {str(node.target) for node in torch.export.export(model, (x,)).graph.nodes}
    assert any("batch_norm" in name for name in names) and not any("pointwise" in name for name in names)
    assert [node.op for node in torch.fx.symbolic_trace(model).graph.nodes].count("call_module") == 3


@pytest.mark.parametrize("training", [False, True])
def test_a_depthwise_convolution_takes_its_batch_norm_along(training, monkeypatch):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(5, 5, 3, padding=1, groups=5), started(nn.BatchNorm2d(5)).train(training)
    x, called, batch_norm = torch.randn(2, 6, 7, 5), [], nn.functional.batch_norm
    want = nn.functional.silu(norm(conv(x.movedim(-1, 1)))).movedim(1, -1)
    monkeypatch.setattr(nn.functional, "batch_norm", lambda *args, **kw: called.append(1) or batch_norm(*args, **kw))
    with torch.no_grad():
        torch.testing.assert_close(blocks.depthwise(conv, x, "silu", norm), want, rtol=1e-4, atol=1e-5)
    assert bool(called) == training
    torch.testing.assert_close(blocks.depthwise(conv, x, "silu", norm), want, rtol=1e-4, atol=1e-5)
    assert called  # with gradients the norm runs by itself


def test_onednn_can_be_switched_off(passes):
    model, x = Chain(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(1, 3, 16, 16)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        torch.testing.assert_close(model(x), one_by_one(model, x))
    assert not passes and torch.backends.mkldnn.is_available() == fused._ONEDNN
