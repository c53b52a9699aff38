"""ONNX files: any batch and size, PyTorch's numbers in onnxruntime, one clear error and no file where that cannot be."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

import medssm
from medssm import cli
from medssm.compress.int8 import Int8, quantize
from medssm.errors import UserError
from medssm.segment import networks
from medssm.segment.preprocess import Fitted

onnx = pytest.importorskip("onnx", reason="needs the package onnx")
pytest.importorskip("onnxscript", reason="needs the package onnxscript")
pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")

from medssm.export.check import STEPS, check  # noqa: E402
from medssm.export.command import check_target  # noqa: E402
from medssm.export.onnx import _is_made_here, export_onnx, session, to_onnx  # noqa: E402

SMALL = {"features": (4, 6, 16), "depths": (0, 1, 1), "decoder_depths": (1, 0)}


def small(mixer="ss_nd", dims=2):
    torch.manual_seed(0)
    return medssm.create_model("medssm_unet", spatial_dims=dims, in_channels=1, out_channels=3, mixer=mixer, **SMALL).eval()


class Scaled(nn.Module):
    """Gives another number when it is exported."""

    def forward(self, x):
        return x * (1.0005 if torch.compiler.is_exporting() else 1.0)


def in_8_bits(*more):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2, bias=False), nn.Conv2d(8, 3, 1)]
    return quantize(nn.Sequential(*layers, *more), [torch.randn(2, 1, 16, 16)], layers="all")[0]


def check_run(network, run, sizes):
    for size in sizes:
        x = torch.randn(size)
        with torch.no_grad():
            want = network(x).numpy()
        np.testing.assert_allclose(run(x.numpy()), want, atol=1e-4 * np.ptp(want), rtol=0)


def saved(folder, mixer="ss_nd", **changes):
    """What medssm train leaves of the network `small`, without the training."""
    folder.mkdir()
    kwargs = {"spatial_dims": 2, "in_channels": 1, "out_channels": 3, "mixer": mixer, **SMALL, **changes}
    channels = kwargs["in_channels"]
    intensity = ({"scheme": "zscore"}, {"scheme": "ct", "low": -10.0, "high": 90.0, "mean": 40.0, "deviation": 20.0})
    classes = {"background": 0, "ball": 1, "box": 5}
    Fitted(("MR", "CT")[:channels], (1.0, 1.0, 0), intensity[:channels], classes, None, (20, 16), slice_axis=2).save(folder / "fitted.json")
    torch.manual_seed(0)
    networks.save(folder, networks.build("medssm_unet", **kwargs), networks.describe("medssm_unet", kwargs))
    return folder


@pytest.mark.long
def test_the_command_writes_a_checked_file_with_all_that_a_scan_needs(tmp_path, capsys):
    file, run = tmp_path / "net.onnx", saved(tmp_path / "run", in_channels=2, deep_supervision=True)
    assert cli.main(["export", "onnx", str(run), str(file), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["operators"] == ["depthwise_conv", "selective_scan_nd"] and result["error"] < 1e-4
    model = onnx.load(file)
    sizes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*model.graph.input, *model.graph.output)}
    assert sizes == {"image": ["batch", 2, "size0", "size1"], "logits": ["batch", 3, "size0", "size1"]}
    table = json.loads({entry.key: entry.value for entry in model.metadata_props}["medssm"])
    assert table["custom_ops"] == {"domain": "medssm", "version": 1} and table["patch"] == [20, 16]
    assert table["classes"] == {"background": 0, "ball": 1, "box": 5} and table["channels"][1]["high"] == 90
    assert "Not a medical device" in (tmp_path / "net.onnx.md").read_text()
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)  # they would name files of this machine
    network = networks.load(run).eval()
    check_run(lambda x: network(x)[0], session(str(file), True), [(1, 2, 20, 16), (3, 2, 37, 24), (2, 2, 16, 41)])
    check_target(file, ".onnx", _is_made_here, overwrite=False)  # its own file is written again
    file.write_text("a file of somebody's")
    assert cli.main(["export", "onnx", str(run), str(file)]) == 2 and "--overwrite" in capsys.readouterr().err


def test_what_the_card_lacks_is_said_before_a_file_is_written(tmp_path, capsys):
    run, file, card = saved(tmp_path / "run"), tmp_path / "out/net.onnx", tmp_path / "out/net.onnx.md"
    for words in ([], ["--license", str(card)]):
        card.parent.mkdir(exist_ok=True)
        card.write_text("notes of somebody's")
        assert cli.main(["export", "onnx", str(run), str(file), *words]) == 2
        err = capsys.readouterr().err
        assert f"file: {card} is " in err and err.count("\n") == 1 and card.read_text() == "notes of somebody's"
    assert cli.main(["export", "onnx", str(run), str(file), "--overwrite", "--license", str(tmp_path / "none.txt")]) == 2
    assert "license: " in capsys.readouterr().err and not file.exists()


@pytest.mark.thorough
@pytest.mark.parametrize("mixer", ["linear_attention", "gla", "delta", "mamba2", "mamba3", "rwkv", "ss_nd"])
@pytest.mark.parametrize("dims", [2, 3])
def test_every_mixer(mixer, dims, tmp_path):
    network = small(mixer, dims)
    to_onnx(network, tmp_path / "net.onnx", (1, 1, *[16] * dims))
    check_run(network, session(str(tmp_path / "net.onnx"), True), [(2, 1, *(17, 23, 9)[:dims]), (1, 1, *[32] * dims)])


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in medssm.list_models() if not name.startswith(("medssm_unet", "monai"))])
def test_every_network(name, tmp_path):
    torch.manual_seed(0)
    network = medssm.create_model(name, spatial_dims=2, in_channels=1, out_channels=2, **medssm.models.model_facts(name).small).eval()
    to_onnx(network, tmp_path / "net.onnx", (1, 1, 64, 64))


@pytest.mark.thorough
def test_linear_attention_is_portable(tmp_path):
    network = small("linear_attention")
    result = to_onnx(network, tmp_path / "net.onnx", (1, 1, 16, 16), portable=True)
    assert result["operators"] == [] and {node.domain for node in onnx.load(tmp_path / "net.onnx").graph.node} == {""}
    check_run(network, session(str(tmp_path / "net.onnx"), False), [(2, 1, 17, 23), (1, 1, 32, 40)])


def test_8_bit_layers_are_8_bit_layers_in_the_file(tmp_path):
    result = to_onnx(in_8_bits(), tmp_path / "net.onnx", (1, 1, 16, 16), portable=True)
    assert result["error"] <= 4 * STEPS / 255  # a number or two lie between two steps
    graph = onnx.load(tmp_path / "net.onnx").graph
    kinds = Counter(node.op_type for node in graph.node)
    assert (kinds["QuantizeLinear"], kinds["DequantizeLinear"], kinds["Conv"], kinds["ConvTranspose"]) == (4, 8, 3, 1)
    values = {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer}
    weights = [values[node.input[0]] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in values]
    assert sorted(weight.shape for weight in weights) == [(3, 8, 1, 1), (8, 1, 3, 3), (16, 8, 2, 2), (16, 8, 2, 2)]
    assert {weight.dtype for weight in weights} == {np.dtype("int8")}
    for layer in (layer for layer in in_8_bits() if isinstance(layer, Int8)):
        assert any(np.array_equal(weight, layer.weight) for weight in weights)


def test_8_bits_do_not_hide_another_number(tmp_path):
    """A difference far below what 8 bits may have."""
    fails(in_8_bits(Scaled()), tmp_path / "net.onnx", r"onnxruntime .* differs from PyTorch by [34]\.\de-04 of the output's spread", portable=True)


def test_a_network_far_from_its_8_bits_is_refused():
    network = in_8_bits()
    with pytest.raises(
        UserError, match=r"some engine differs from PyTorch in 8 bits by .* steps .* of the numbers and .* on average for an image of 1x1x9x9"
    ):
        check(network, lambda image: 1.1 * network(torch.from_numpy(image)).numpy(), [(1, 1, 9, 9)], "some engine", rounds=True)


def fails(network, file, match, shape=(1, 1, 16, 16), **options):
    with pytest.raises(UserError, match=match) as caught:
        to_onnx(network, file, shape, **options)
    assert "\n" not in str(caught.value) and not list(file.parent.iterdir())


def test_an_operator_without_a_portable_form_is_named(tmp_path):
    fails(small(), tmp_path / "net.onnx", "selective_scan_nd has no portable form", portable=True)


def test_a_size_that_became_fixed_leaves_no_file(tmp_path):
    class Fixed(nn.Module):
        def forward(self, x):
            return x + torch.ones(1, 1, x.shape[2].__int__(), 1)

    fails(Fixed(), tmp_path / "net.onnx", "does not export with a free batch and free sizes")


def test_a_state_that_is_used_is_refused(tmp_path):
    class Stateful(nn.Module):
        def forward(self, x):
            tokens, rates = x.flatten(2).transpose(1, 2), -torch.ones(1, 2)
            rows = tokens.expand(-1, -1, 2)
            out, state = medssm.ops.selective_scan(tokens, tokens.exp(), rates, rows, rows, return_final_state=True)
            return (out + state.sum()).transpose(1, 2).view_as(x)

    fails(Stateful(), tmp_path / "net.onnx", "selective_scan: the network uses its final state")


def test_a_network_that_takes_one_size_is_refused(tmp_path):
    class OneSize(nn.Module):
        def forward(self, x):
            torch._check(x.shape[2] < 10**6)
            return x * 2 if torch.compiler.is_exporting() or x.shape[2] == 16 else self.refuse()

        def refuse(self):
            raise ValueError("expected 16 voxels")

    fails(OneSize(), tmp_path / "net.onnx", "the network itself does not take an image of 2x1x.*expected 16 voxels")


def test_numbers_that_differ_leave_no_file(tmp_path):
    class Other(nn.Module):
        def forward(self, x):
            return x * 2 if torch.compiler.is_exporting() else x * 2.01

    fails(Other(), tmp_path / "net.onnx", "differs from PyTorch by 2.*e-03 of the output's spread")


def test_wrong_input_is_one_line(tmp_path):
    run_folder = saved(tmp_path / "run")
    (tmp_path / "folder.onnx").mkdir()
    for run, file, match in (
        (run_folder, tmp_path / "net.pt", "expected a name that ends in .onnx"),
        (run_folder, tmp_path / "folder.onnx", "expected a file, got a folder"),
        (tmp_path / "folder.onnx", tmp_path / "net.onnx", "not written by medssm train"),
    ):
        with pytest.raises(UserError, match=match):
            export_onnx(run, file)
    with pytest.raises(UserError, match="overlap"):
        export_onnx(run_folder, tmp_path / "net.onnx", overlap=1.0)


def test_of_8_bits_a_number_in_a_thousand_may_lie_between_two_steps():
    network, shapes = nn.Identity(), [(2, 1, 40, 40)]

    def off(count, steps):
        def run(image):
            found = image.copy()
            found.ravel()[:count] += steps / 255 * np.ptp(image)
            return found

        return run

    assert check(network, off(3, 100), shapes, "engine", rounds=True) == pytest.approx(100 / 255, rel=1e-3)
    for run in (off(5, 100), off(3200, 1)):
        with pytest.raises(UserError, match=r"engine differs from PyTorch in 8 bits by .* in 0.1% of the numbers and .* expected at most 8 and 0.5"):
            check(network, run, shapes, "engine", rounds=True)
    with pytest.raises(UserError, match="expected 1e-04"):
        check(network, off(1, 1), shapes, "engine")
