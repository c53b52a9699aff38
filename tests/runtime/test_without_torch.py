"""medssm_runtime runs where neither torch nor MONAI nor medssm can be imported, and names what else is missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import medssm
import medssm_runtime
from medssm_runtime import engines
from tests.runtime.runs import write_onnx, write_run
from tests.segment.synthetic import volume, write

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

ROOT = Path(medssm_runtime.__file__).parents[1]
BLOCKED = """
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
sys.argv = ["medssm_runtime", *sys.argv[1:]]
runpy.run_module("medssm_runtime", run_name="__main__", alter_sys=True)
"""


def run(*words, blocked=("torch", "monai", "lightning", "jsonargparse", "scipy")):
    """The command in a process that cannot import `blocked`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = BLOCKED.format(names=tuple(blocked))
    return subprocess.run([sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture
def scan(tmp_path):
    return write(tmp_path / "scan.nii.gz", volume(0, (20, 18, 16))[0][..., 0])


def test_a_scan_becomes_its_label_map(tmp_path, scan):
    model = write_onnx(write_run(tmp_path / "run"), tmp_path / "model.onnx")
    done = run(model, scan, tmp_path / "out" / "labels.nii.gz", "--threads", 1, "--json", "--quiet", blocked=("torch", "monai", "medssm", "scipy"))
    assert done.returncode == 0 and not done.stderr, done.stderr
    result = json.loads(done.stdout)
    assert result["cases"] == {"scan": str(tmp_path / "out" / "labels.nii.gz")} and not result["failed"]
    assert set(result["seconds"]) == {"open", "read", "network", "write"}
    labels = nib.load(tmp_path / "out" / "labels.nii.gz")
    assert labels.shape == (20, 18, 16) and len(np.unique(np.asarray(labels.dataobj))) > 1


def test_pydicom_which_nibabel_would_import_costs_no_time(tmp_path, scan):
    model = write_onnx(write_run(tmp_path / "run"), tmp_path / "model.onnx")
    package, imported = tmp_path / "packages" / "pydicom", tmp_path / "imported"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"open({str(imported)!r}, 'w').close()")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "packages"), str(ROOT)])}
    words = [sys.executable, "-m", "medssm_runtime", *map(str, (model, scan, tmp_path / "labels.nii.gz"))]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0 and not imported.exists(), done.stderr


def test_an_engine_that_is_not_installed_is_named(tmp_path, scan):
    model = write_onnx(write_run(tmp_path / "run"), tmp_path / "model.onnx")
    done = run(model, scan, tmp_path / "labels.nii.gz", blocked=("torch", "onnxruntime"))
    assert done.returncode == 2
    assert done.stderr == f"medssm_runtime: {model}: needs the package onnxruntime: pip install onnxruntime\n"
    assert not (tmp_path / "labels.nii.gz").exists()


def test_a_package_that_is_not_installed_is_named(tmp_path, scan):
    model = write_onnx(write_run(tmp_path / "run", {"ball": {"largest_component": True}}), tmp_path / "model.onnx")
    for package in ("scipy", "nibabel"):  # post-processing needs the first
        done = run(model, scan, tmp_path / "labels.nii.gz", blocked=("torch", package))
        assert (done.returncode, done.stderr) == (2, f"medssm_runtime: needs the package {package}: pip install {package}\n")
        assert not list(tmp_path.glob("*labels*"))


def test_operators_that_are_not_there_are_named(tmp_path, scan, monkeypatch):
    model = write_onnx(write_run(tmp_path / "run"), tmp_path / "model.onnx", custom_ops={"domain": "medssm", "version": 1})
    done = run(model, scan, tmp_path / "labels.nii.gz", "--ops", tmp_path / "no.so")
    assert (done.returncode, done.stderr) == (2, f"medssm_runtime: ops: {tmp_path / 'no.so'}: no such file\n")
    monkeypatch.setattr("medssm_runtime.engines.LIBRARY", "libnone.so")
    with pytest.raises(medssm_runtime.UserError, match=r"model\.onnx: needs the operators medssm: no libnone\.so in .* or .*: name it with --ops"):
        medssm_runtime.load(model)


def test_operators_of_another_version_are_named(tmp_path):
    model = write_onnx(write_run(tmp_path / "run"), tmp_path / "model.onnx", custom_ops={"domain": "medssm", "version": 7})
    with pytest.raises(medssm_runtime.UserError, match=r"needs the operators medssm of version 7, this medssm_runtime has those of version 1"):
        medssm_runtime.load(model)


def test_the_versions_are_those_of_medssm():
    from medssm.export.program import VERSION

    assert medssm_runtime.__version__ == medssm.__version__ and engines.OPERATORS == VERSION
