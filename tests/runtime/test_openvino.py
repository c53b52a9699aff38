"""The same network by OpenVINO."""

import numpy as np
import pytest

import medssm_runtime
from medssm.export.metadata import KEY, metadata, text
from tests.runtime.runs import write_onnx, write_run
from tests.segment.synthetic import volume

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def test_openvino_gives_the_labels_of_onnxruntime(tmp_path):
    openvino = pytest.importorskip("openvino")
    run = write_run(tmp_path / "run", spacing=(1.2, 1.0, 1.0))
    file = write_onnx(run, tmp_path / "model.onnx")
    model = openvino.Core().read_model(file)
    model.set_rt_info(text(metadata(run)), [KEY])
    openvino.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
    image = np.moveaxis(volume(0, (24, 22, 20))[0], -1, 0)
    labels = [medssm_runtime.load(path, threads=1).segment(image, np.eye(4)) for path in (file, tmp_path / "model.xml")]
    assert (labels[0] != labels[1]).mean() < 1e-3
    assert len(np.unique(labels[0])) == 3


def test_a_file_that_medssm_did_not_export(tmp_path):
    openvino = pytest.importorskip("openvino")
    file = write_onnx(write_run(tmp_path / "run"), tmp_path / "model.onnx")
    openvino.save_model(openvino.Core().read_model(file), tmp_path / "model.xml")
    with pytest.raises(medssm_runtime.UserError, match=r"model\.xml: nothing in it says how a scan is prepared"):
        medssm_runtime.load(tmp_path / "model.xml")
    with pytest.raises(medssm_runtime.UserError, match=r"ops: expected a file of ONNX with it, got .*model\.xml"):
        medssm_runtime.load(tmp_path / "model.xml", ops=tmp_path / "library.so")
    (tmp_path / "text.xml").write_text("text")
    with pytest.raises(medssm_runtime.UserError, match=r"text\.xml: no text\.bin beside it, which has the weights"):
        medssm_runtime.load(tmp_path / "text.xml")
    (tmp_path / "text.bin").touch()
    with pytest.raises(medssm_runtime.UserError, match=r"text\.xml: openvino \S+ does not take it: (?!Exception from|Check )\S"):
        medssm_runtime.load(tmp_path / "text.xml")
