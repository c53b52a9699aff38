"""Weights in 8 bits in an ONNX file: the same numbers to the bit, a file as small as the run's own."""

import numpy as np
import pytest
import torch
from torch import nn

from medssm.compress.int8 import _integer_weights, floats, quantize

onnx = pytest.importorskip("onnx", reason="needs the package onnx")
pytest.importorskip("onnxscript", reason="needs the package onnxscript")
pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")

from medssm.export import weights  # noqa: E402
from medssm.export.onnx import session, to_onnx  # noqa: E402


def values(model):
    return {value.name: onnx.numpy_helper.to_array(value) for value in model.graph.initializer}


@pytest.mark.parametrize("shape", [(32, 48), (24, 8, 3, 3), (16, 4, 3, 3, 3), (64, 1, 5, 5)])
@pytest.mark.parametrize("axes", [None, "turned"])
def test_a_rounded_weight_is_its_integers_to_the_bit(shape, axes):
    torch.manual_seed(0)
    weight = floats(*_integer_weights(torch.randn(shape)))
    seen = weight.permute(*reversed(range(len(shape)))).contiguous().numpy() if axes else weight.numpy()
    q, scale = weights.integers(seen)
    assert q.dtype == np.int8 and scale.size == shape[0] and np.array_equal(q.astype(np.float32) * scale, seen)


def test_a_matrix_of_several_scans_and_a_weight_that_was_not_rounded():
    torch.manual_seed(0)
    rows = floats(*_integer_weights(torch.randn(6 * 9, 40))).reshape(6, 9, 40)
    q, scale = weights.integers(rows.numpy())
    assert scale.shape == (6, 9, 1) and np.array_equal(q * scale, rows.numpy())
    assert weights.integers(torch.randn(32, 48).numpy()) is None
    almost = rows.clone()
    almost[2, 3, 4] += 1e-6
    assert weights.integers(almost.numpy()) is None


def test_the_file_shrinks_and_gives_the_same_bits(tmp_path, monkeypatch):
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(1, 32, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ConvTranspose2d(64, 32, 3, padding=1),
        nn.Conv2d(32, 3, 1),
    ]
    network, step = quantize(nn.Sequential(*layers), [torch.randn(1, 1, 16, 16)])
    to_onnx(network, tmp_path / "net.onnx", (1, 1, 16, 16), portable=True)
    rounded = step["stored"]
    assert rounded
    model = onnx.load(tmp_path / "net.onnx")
    stored = {name: value for name, value in values(model).items() if name.endswith("_int8")}
    assert {name.removesuffix("_int8").removeprefix("network.") for name in stored} == set(rounded)
    assert all(value.dtype == np.int8 for value in stored.values())
    monkeypatch.setattr(weights, "store", lambda model, network: None)
    to_onnx(network, tmp_path / "float.onnx", (1, 1, 16, 16), portable=True)
    x = np.random.default_rng(0).normal(size=(2, 1, 20, 12)).astype(np.float32)
    assert np.array_equal(session(str(tmp_path / "net.onnx"), False)(x), session(str(tmp_path / "float.onnx"), False)(x))
    saved = sum(3 * value.size for value in stored.values())
    assert (tmp_path / "float.onnx").stat().st_size - (tmp_path / "net.onnx").stat().st_size > 0.9 * saved
