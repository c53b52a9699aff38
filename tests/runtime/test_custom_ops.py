"""A network with medssm's operators gives the labels of predict without torch: the operators' library is found and used."""

import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from medssm import nn as layers
from medssm.export.metadata import KEY, metadata, text
from medssm.kernels import native
from medssm.segment import networks
from medssm.segment.predict import predict
from medssm.segment.preprocess import Fitted
from tests.runtime.runs import CLASSES
from tests.runtime.test_without_torch import run
from tests.segment.synthetic import volume, write

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.skipif(not native.path().with_name(f"libmedssm_onnx{native.SUFFIX}").is_file(), reason="the library was not built")


class Scanned(nn.Module):
    """A convolution, a mixer with scans, a convolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.mixer, self.last = nn.Conv2d(1, 8, 3, padding=1), layers.SSND(8, spatial_dims=2), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        found = self.mixer(self.first(x).movedim(1, -1)).movedim(-1, 1)
        return 4 * self.last(found)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A RUN folder and its ONNX file."""
    from medssm.export import custom_ops, to_onnx
    from medssm.export.onnx import OPS

    folder, network = tmp_path_factory.mktemp("exported"), Scanned().eval()
    fitted = Fitted(("MR",), (1.0, 1.0, 0.0), ({"scheme": "zscore"},), CLASSES, None, (16, 20), slice_axis=2)
    (folder / "run").mkdir()
    fitted.save(folder / "run" / "fitted.json")
    networks.save(folder / "run", network, {"model": "scanned", "kwargs": {}})
    table = metadata(folder / "run", custom_ops=OPS)
    result = to_onnx(network, folder / "model.onnx", (1, 1, *fitted.patch), properties={KEY: text(table)})
    assert result["operators"]
    write(folder / "scan.nii.gz", volume(5, (24, 22, 3))[0][..., 0])
    predict(folder / "run", folder / "scan.nii.gz", folder / "expected.nii.gz", model=network, device="cpu", quiet=True)
    return folder, custom_ops()


def labels(path):
    return np.asarray(nib.load(path).dataobj)


def test_the_library_of_an_installed_medssm_is_used(exported, tmp_path):
    folder, _ = exported
    words = (folder / "model.onnx", folder / "scan.nii.gz", tmp_path / "labels.nii.gz", "--quiet", "--threads", 1)
    done = run(*words, blocked=("torch", "monai", "scipy"))
    assert done.returncode == 0, done.stderr
    expected = labels(folder / "expected.nii.gz")
    assert (labels(tmp_path / "labels.nii.gz") != expected).mean() < 1e-3 and len(np.unique(expected)) > 1


def test_a_library_that_is_named_is_used(exported, tmp_path, monkeypatch):
    folder, library = exported
    for file in library.parent.glob("libmedssm_*"):
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    words = (folder / "model.onnx", folder / "scan.nii.gz", tmp_path / "labels.nii.gz", "--ops", library.name)
    done = run(*words, blocked=("torch", "monai"))
    assert done.returncode == 0, done.stderr
    (tmp_path / library.name).write_bytes(b"no library")
    done = run(*words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "model.onnx: onnxruntime" in done.stderr
