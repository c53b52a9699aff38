"""OpenVINO's files: any batch and size, PyTorch's numbers, one clear error and no file where that cannot be."""

import json
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from medssm import cli
from medssm.errors import UserError

openvino = pytest.importorskip("openvino", reason="needs the package openvino")
pytest.importorskip("onnx", reason="needs the package onnx")

from medssm.export import openvino as export  # noqa: E402
from medssm.export.check import STEPS, shapes  # noqa: E402
from medssm.export.openvino import _check_target, _write, compiled, to_openvino  # noqa: E402
from tests.export.test_onnx import check_run, in_8_bits, saved, small  # noqa: E402


@pytest.mark.thorough
def test_the_command_writes_checked_files_with_all_that_a_scan_needs(tmp_path, capsys):
    file, run = tmp_path / "net.xml", saved(tmp_path / "run", "linear_attention")
    assert cli.main(["export", "openvino", str(run), str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["error"] < 1e-4
    model = openvino.Core().read_model(file)
    assert json.loads(model.get_rt_info(["medssm"]).astype(str))["custom_ops"] is None and (tmp_path / "net.xml.md").is_file()
    check_run(small("linear_attention"), compiled(model), [(1, 1, 16, 16), (3, 1, 37, 24), (2, 1, 16, 41)])
    _check_target(file, overwrite=False)  # its own files are written again
    file.unlink()
    with pytest.raises(UserError, match=r"net.bin is there already"):
        _check_target(file, overwrite=False)


def test_8_bit_layers_are_8_bit_layers_in_the_file(tmp_path):
    assert to_openvino(in_8_bits(), tmp_path / "net.xml", (1, 1, 16, 16))["error"] <= 4 * STEPS / 255  # a number or two lie between two steps
    kinds = Counter(op.get_type_name() for op in openvino.Core().read_model(tmp_path / "net.xml").get_ops())
    assert kinds["FakeQuantize"] == 4 or kinds["Convert"] >= 4
    assert (tmp_path / "net.bin").stat().st_size < 4 * (72 + 512 + 512 + 24)  # the weights in floating point


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1)).eval()


@pytest.mark.thorough
def test_nncf_gives_8_bits(tmp_path):
    pytest.importorskip("nncf", reason="needs the package nncf")
    error = _write(
        network := convolutions(), tmp_path / "net.xml", shapes(network, (1, 1, 16, 16)), {}, [torch.randn(2, 1, 16, 16) for _ in range(2)]
    )
    assert 0 < error < 0.01
    model = openvino.Core().read_model(tmp_path / "net.xml")
    assert Counter(op.get_type_name() for op in model.get_ops())["FakeQuantize"] == 2
    assert {op.get_element_type().get_type_name() for op in model.get_ops() if op.get_type_name() == "Constant" and op.shape[2:] == [3, 3]} == {"i8"}
    assert compiled(model)(np.zeros((3, 1, 9, 21), np.float32)).shape == (3, 3, 9, 21)


def test_8_bits_that_are_far_from_pytorch_leave_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_in_8_bits", lambda model, images: model)
    monkeypatch.setattr(export, "_mean_difference", lambda network, run, images: 0.06)
    with pytest.raises(UserError, match=r"int8: openvino .* in 8 bits differs from PyTorch by 0.060 .* on average .* at most 0.05"):
        _write(network := convolutions(), tmp_path / "net.xml", shapes(network, (1, 1, 16, 16)), {}, [torch.randn(2, 1, 16, 16)])
    assert not list(tmp_path.iterdir())


def test_nncf_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(UserError, match=r"^int8: needs the package nncf and what it needs: pip install nncf \("):
        export.export_openvino(saved(tmp_path / "run"), tmp_path / "net.xml", int8=True)


def test_an_operator_that_openvino_lacks_is_named(tmp_path):
    with pytest.raises(UserError, match="selective_scan_nd has no portable form"):
        to_openvino(small(), tmp_path / "net.xml", (1, 1, 16, 16))
    assert not list(tmp_path.iterdir())
