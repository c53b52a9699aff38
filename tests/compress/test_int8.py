"""8-bit layers: the arithmetic, the engine and what stands in for it, files without pickle, and errors that say what is wrong."""

import copy
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch import nn

import medssm
from medssm.compress import int8, steps
from medssm.compress.int8 import quantize
from medssm.errors import UserError
from medssm.segment import networks

UNET = {"spatial_dims": 3, "in_channels": 1, "out_channels": 3, "features": [4, 8, 8], "depths": [1, 1, 1], "decoder_depths": [1, 1], "d_state": 4}
LAYERS = {
    "conv3d": (nn.Conv3d(5, 6, 3, padding=1), (2, 5, 6, 7, 8)),
    "stride": (nn.Conv3d(4, 6, 2, 2, bias=False), (1, 4, 6, 8, 6)),
    "dilation": (nn.Conv3d(4, 6, 3, padding=2, dilation=2), (1, 4, 6, 6, 6)),
    "groups": (nn.Conv3d(4, 6, 3, groups=2), (1, 4, 6, 6, 6)),
    "depthwise": (nn.Conv3d(4, 4, 3, padding=1, groups=4), (1, 4, 6, 6, 6)),
    "flat": (nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1)), (1, 4, 6, 6, 6)),
    "point": (nn.Conv3d(4, 6, 1), (1, 4, 6, 6, 6)),
    "conv2d": (nn.Conv2d(5, 6, 3, padding=1), (2, 5, 6, 7)),
    "linear": (nn.Linear(5, 7), (2, 3, 4, 5)),
    "linear_1d": (nn.Linear(5, 7, bias=False), (5,)),
    "transposed3d": (nn.ConvTranspose3d(4, 6, (2, 2, 1), (2, 2, 1)), (2, 4, 3, 4, 5)),
    "transposed2d": (nn.ConvTranspose2d(4, 6, 2, 2, bias=False), (1, 4, 3, 4)),
}
engine = pytest.mark.skipif(int8._engine() is None, reason="oneDNN has no integer products on this processor")


def as_int8(layer, x):
    made = copy.deepcopy(layer).requires_grad_(False)
    int8._become(made, *int8._affine(float(x.min()), float(x.max())))
    return made


def doubled(layer, kind):
    """The quantized layer's formula in float64."""
    q = (layer.x / layer.scale).round() + layer.zero
    x = (q.clamp(0, 255) - layer.zero) * layer.scale
    wide = copy.deepcopy(kind).double()
    weight, scale = int8._integer_weights(kind.weight.detach(), layer.axis)
    with torch.no_grad():
        wide.weight.copy_(int8.floats(weight, scale, layer.axis))
    return wide(x)


@engine
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_values_are_those_of_the_formula_in_float64(name, last):
    kind, shape = LAYERS[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    if last and x.ndim == kind.weight.ndim > 2:
        x = x.contiguous(memory_format=networks.memory_format(x.ndim - 2))
    layer = as_int8(kind, x)
    layer.x, layer.scale, layer.zero, layer.axis = x.double(), float(layer.input_scale), int(layer.input_zero_point), layer.out_axis
    with torch.no_grad():
        wanted, exact, y = doubled(layer, kind), kind(x), layer(x)
    assert y.shape == wanted.shape
    # a value that lies between two steps of the input may take either
    step = float(layer.input_scale) * float(kind.weight.detach().abs().max())
    assert float((y - wanted).abs().max()) <= (step if int8._engine() == "8-bit" else 20 * step)
    assert float((y - wanted).abs().mean()) <= 1e-5 if int8._engine() == "8-bit" else True
    assert float((y - exact).abs().max()) <= 0.1 * float(exact.abs().max())


@engine
@pytest.mark.parametrize("name", LAYERS)
def test_floating_point_stands_in_where_a_gradient_is_asked_for(name):
    kind, shape = LAYERS[name]
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    layer = as_int8(kind, x.detach())
    y = layer(x)
    with torch.no_grad():
        direct = layer(x)
    step = float(layer.input_scale) * float(kind.weight.detach().abs().max())
    assert float((y - direct).detach().abs().max()) <= (step if int8._engine() == "8-bit" else 20 * step)
    (grad,) = torch.autograd.grad(y.sum(), x)
    (wanted,) = torch.autograd.grad(kind(x).sum(), x)
    torch.testing.assert_close(grad, wanted, rtol=0.05, atol=0.05)


def test_an_exported_layer_has_operators_that_other_engines_know():
    layer, x = LAYERS["conv3d"][0], torch.randn(2, 5, 6, 6, 6)
    made = nn.Sequential(as_int8(layer, x))
    program = torch.export.export(made, (x,))
    assert not any("fake_quantize" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), made[0]._simulated(x), rtol=0.01, atol=0.01)


@engine
def test_bfloat16_goes_through_and_comes_back():
    layer, x = LAYERS["conv3d"][0], torch.randn(1, 5, 6, 6, 6)
    made = as_int8(layer, x)
    with torch.no_grad():
        y = made(x.bfloat16())
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), made(x), rtol=0.02, atol=0.05)


def test_a_wrong_input_gives_the_layer_s_own_error():
    layer = as_int8(nn.Conv3d(4, 6, 3), torch.randn(1, 4, 5, 5, 5))
    with pytest.raises(RuntimeError, match="4 channels"), torch.no_grad():
        layer(torch.randn(1, 3, 5, 5, 5))


def test_weights_are_exact_products_that_give_themselves_again():
    torch.manual_seed(0)
    weight = torch.randn(40, 3, 3, 3) * torch.logspace(-6, 3, 40).reshape(-1, 1, 1, 1)
    weight[7] = 0
    q, scale = int8._integer_weights(weight)
    floats = int8.floats(q, scale)
    assert torch.equal(floats.double(), q.double() * scale.double().reshape(-1, 1, 1, 1))
    again, scale_again = int8._integer_weights(floats)
    assert torch.equal(again, q)
    assert torch.equal(scale_again[scale_again > 1e-30], scale[scale > 1e-30])
    assert q.abs().max() == 127
    assert ((floats - weight).abs() <= 0.5001 * scale.reshape(-1, 1, 1, 1)).all()


def test_ranges_hold_zero_and_leave_out_what_they_should():
    x = torch.cat([torch.linspace(1, 2, 10000), torch.tensor([100.0])])
    seen = [int8._Seen.of(x)]
    whole = int8._range(seen, "percentile", 100)
    assert whole == (100 / 255, 0)
    scale, zero = int8._range(seen, "percentile", 99.9)
    assert zero == 0
    assert scale == pytest.approx(2 / 255, rel=0.01)
    assert int8._range([int8._Seen.of(torch.zeros(5))], "percentile", 99.9) == (1.0, 0)
    scale, zero = int8._range([int8._Seen.of(torch.linspace(-1, 3, 1000))], "percentile", 100)
    assert (scale, zero) == (pytest.approx(4 / 255), 64)


def test_mse_leaves_out_a_rare_value_that_costs_the_others_their_steps():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(200000), torch.tensor([60.0])])
    seen = [int8._Seen.of(x)]

    def error(scale, zero):
        return float((int8.rounded(seen[0].values, torch.tensor(scale), torch.tensor(zero, dtype=torch.int32)) - seen[0].values).square().sum())

    mse = int8._range(seen, "mse", 100)
    assert 6 / 255 < mse[0] < 12 / 255
    assert error(*mse) < min(error(*int8._range(seen, "percentile", p)) for p in (99, 99.9, 100))


@pytest.fixture(scope="module")
def quantized():
    torch.manual_seed(0)
    network = medssm.create_model("medssm_unet", **UNET).eval()
    batches = [torch.randn(1, 1, 16, 16, 16) for _ in range(2)]
    return network, *quantize(copy.deepcopy(network), batches, layers="all", keep=["decoder.seg_layers.*"]), batches


def test_a_network_keeps_its_logits_nearly(quantized):
    network, small, step, batches = quantized
    with torch.no_grad():
        a, b = network(batches[0]), small(batches[0])
    assert 0 < float((a - b).norm() / a.norm()) < 0.1
    assert "decoder.stages.1.0.conv1" in step["layers"]
    assert not any(name.startswith("decoder.seg_layers") for name in step["layers"] + step["stored"])
    assert not set(step["layers"]) & set(step["stored"])
    assert step["fold"]


def test_layers_that_kernels_read_are_rounded_and_still_read(quantized):
    _, small, step, _ = quantized
    local = "encoder.stages.2.1.local.conv"
    assert type(small.get_submodule(local)).__module__ == "medssm.nn.convolution"
    assert local not in step["layers"]
    assert "encoder.stages.2.1.mixer.x_proj_weight" in step["stored"]
    assert not any("A_logs" in name for name in step["stored"])


@pytest.mark.thorough
def test_a_fresh_process_gives_the_same_logits_from_safetensors(quantized, tmp_path):
    _, small, step, batches = quantized
    networks.save(tmp_path, small, {"model": "medssm_unet", "kwargs": UNET, "compression": [step]})
    kept = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert kept["encoder.stages.1.1.conv1.weight"].dtype == torch.int8
    assert kept["encoder.stages.2.1.mixer.x_proj_weight_int8"].dtype == torch.int8
    assert kept["encoder.stages.2.1.mixer.x_proj_weight_scale"].shape == (6 * 9,)
    with torch.no_grad():
        safetensors.torch.save_file({"x": batches[1], "y": small(batches[1]).contiguous()}, tmp_path / "wanted.safetensors")
    code = f"""
import torch, safetensors.torch
from pathlib import Path
from medssm.segment import networks
wanted = safetensors.torch.load_file({str(tmp_path / "wanted.safetensors")!r})
network = networks.placed(networks.load(Path({str(tmp_path)!r})), torch.device("cpu"), 3).eval()
with torch.no_grad():
    assert torch.equal(network(wanted["x"]), wanted["y"])
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})


def test_rounded_weights_are_integers_in_the_file_and_floats_in_the_network():
    layer = nn.Sequential(nn.Conv1d(16, 16, 3))
    int8._store(layer, "0.weight")
    state = layer.state_dict()
    assert {name: value.dtype for name, value in state.items()} == {
        "0.weight_int8": torch.int8,
        "0.weight_scale": torch.float32,
        "0.bias": torch.float32,
    }
    other = nn.Sequential(nn.Conv1d(16, 16, 3))
    int8._store(other, "0.weight")
    other.load_state_dict(state)
    assert torch.equal(other[0].weight, layer[0].weight)


def test_a_copy_and_a_move_compute_the_same(quantized):
    _, small, _, batches = quantized
    with torch.no_grad():
        y = small(batches[0])
        assert torch.equal(copy.deepcopy(small)(batches[0]), y)
        assert torch.equal(copy.deepcopy(small).to(torch.device("cpu"), memory_format=torch.channels_last_3d)(batches[0]), y)


def test_a_layer_that_is_slower_in_integers_stays(monkeypatch):
    seconds = iter([1.0] * 3 + [0.95] * 3 + [1.0] * 3 + [0.8] * 3)
    monkeypatch.setattr(int8, "_seconds", lambda side: next(seconds))
    network = nn.Sequential(nn.Conv3d(1, 16, 3, padding=1), nn.Conv3d(16, 16, 3))
    _, step = quantize(network, [torch.randn(1, 1, 8, 8, 8)])
    assert (step["layers"], step["stored"]) == (["1"], ["0.weight"])


@engine
def test_weights_have_7_bits_where_8_would_overflow(monkeypatch):
    layer, x = nn.Conv2d(16, 4, 3, bias=False), torch.rand(1, 16, 8, 8)
    with torch.no_grad():
        exact = layer(x)
        made = as_int8(layer, x)
        monkeypatch.setattr(int8, "_engine", lambda: "7-bit")
        weight, _ = made._fitting()
        assert int(weight.abs().max()) <= 64  # 2 x 255 x 64 < 2^15
        assert float((made(x) - exact).abs().max()) < 0.05 * float(exact.abs().max())


@engine
@pytest.mark.thorough
def test_on_a_processor_without_vnni_nothing_overflows():
    code = """
import torch
from torch import nn
from medssm.compress import int8
assert int8._engine() == "7-bit", int8._engine()
torch.manual_seed(0)
layer, x = nn.Conv3d(32, 32, 3, padding=1), torch.rand(1, 32, 12, 12, 12)
with torch.no_grad():
    layer.weight.abs_()
    exact = layer(x)
    int8._become(layer, *int8._affine(0.0, 1.0))
    error = (layer(x) - exact).norm() / exact.norm()
assert error < 0.01, error
"""
    flags = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", code], check=True, env=flags)


@pytest.mark.parametrize(
    ("network", "batches", "options", "message"),
    [
        (nn.Conv3d(1, 2, 3), [], {}, "batches: expected at least one batch of inputs, got none"),
        (nn.Conv3d(1, 2, 3), [torch.rand(1, 3, 8, 8, 8)], {}, r"batches: expected inputs that the network takes, got \(1, 3, 8, 8, 8\)"),
        (nn.Conv3d(1, 2, 3), [torch.rand(1, 8, 8)], {}, r"batches: expected \(b, channels, \*spatial\) in 2D or 3D, finite, got \(1, 8, 8\)"),
        (nn.Conv3d(1, 2, 3), [torch.full((1, 1, 4, 4, 4), torch.nan)], {}, r"batches: .* got \(1, 1, 4, 4, 4\), not finite"),
        (nn.Sequential(nn.ReLU()), [torch.rand(1, 1, 8, 8)], {}, "network: expected a convolution or a linear layer to quantize, got none"),
        (nn.Sequential(nn.Conv2d(1, 2, 3)), [torch.rand(1, 1, 8, 8)], {"keep": ["0"]}, "network: expected .* besides those to keep, got none"),
        (nn.Conv3d(1, 2, 3), [torch.rand(1, 1, 8, 8, 8)], {"ranges": "max"}, "ranges: expected percentile or mse, got 'max'"),
        (nn.Conv3d(1, 2, 3), [torch.rand(1, 1, 8, 8, 8)], {"percentile": 0.99}, "percentile: expected more than 50 and at most 100, got 0.99"),
        (nn.Conv3d(1, 2, 3), [torch.rand(1, 1, 8, 8, 8)], {"layers": "some"}, "layers: expected faster or all, got 'some'"),
    ],
)
def test_wrong_input_is_one_clear_line(network, batches, options, message):
    with pytest.raises(UserError, match="^" + message) as raised:
        quantize(network, batches, **options)
    assert "\n" not in str(raised.value)


def test_a_step_for_another_network_is_refused():
    step = {"kind": "int8", "fold": [], "layers": ["0"], "stored": []}
    with pytest.raises(UserError, match=r"compression: the step 'int8' does not fit .*: expected a convolution .*, got 0 \(ReLU\)"):
        steps.restructured(nn.Sequential(nn.ReLU()), [step])
    with pytest.raises(UserError, match=r"expected a weight that can be rounded, got 0.weight"):
        steps.restructured(nn.Sequential(nn.LayerNorm(4)), [{**step, "layers": [], "stored": ["0.weight"]}])
