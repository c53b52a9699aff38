"""docs/examples/cpp: a C++ program that segments a raw volume with ONNX Runtime's C interface, built and run.

It needs the header onnxruntime_c_api.h, which the wheel of onnxruntime does not have: in the folder that ONNXRUNTIME_INCLUDE names, or in a system's.
"""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import medssm_runtime
from tests.runtime.runs import write_onnx, write_run
from tests.segment.synthetic import volume

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "cpp"
CT = {"scheme": "ct", "low": 20.0, "high": 170.0, "mean": 90.0, "deviation": 40.0}
PLACES = [os.environ.get("ONNXRUNTIME_INCLUDE", ""), *(f"{root}/include{below}" for root in ("/usr/local", "/usr") for below in ("", "/onnxruntime"))]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The program, built by its Makefile against the library in the wheel."""
    header = next((Path(place) for place in PLACES if place and (Path(place) / "onnxruntime_c_api.h").is_file()), None)
    library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"), None)
    if header is None or library is None or not (shutil.which("g++") and shutil.which("make")):
        pytest.skip("needs onnxruntime_c_api.h (ONNXRUNTIME_INCLUDE), libonnxruntime.so, g++ and make")
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "ort" / "lib").mkdir(parents=True)
    (folder / "ort" / "include").symlink_to(header.resolve())
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / "ort" / "lib" / name).symlink_to(library)
    for name in ("Makefile", "segment.cpp"):
        shutil.copy(EXAMPLE / name, folder)
    subprocess.run(["make", "-s", f"ONNXRUNTIME={folder / 'ort'}", "CXXFLAGS=-O1 -Werror"], cwd=folder, check=True)
    return folder / "segment"


def run(program, *words):
    return subprocess.run([program, *map(str, words)], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("settings", [{"classes": {'it\'s "0" [here]': 0, "ball": 5, "box": 300}}, {"channels": ("CT",), "intensity": (CT,)}])
def test_its_labels_are_those_of_the_runtime(program, tmp_path, settings):
    model = write_onnx(write_run(tmp_path / "run", patch=(16, 24, 12), **settings), tmp_path / "model.onnx")
    image = volume(4, (21, 20, 19))[0][..., 0]  # smaller than a window along one axis
    image.tofile(tmp_path / "volume.raw")
    done = run(program, model, tmp_path / "volume.raw", *image.shape, tmp_path / "labels.raw")
    assert done.returncode == 0, done.stderr
    found = np.fromfile(tmp_path / "labels.raw", np.int32).reshape(image.shape)
    expected = medssm_runtime.load(model, threads=1).segment(image[None], np.eye(4))
    assert (found != expected).mean() < 1e-3 and len(np.unique(found)) > 1


def test_what_it_does_not_take_is_one_line(program, tmp_path):
    np.zeros(8, np.float32).tofile(tmp_path / "volume.raw")
    out = tmp_path / "labels.raw"
    model = write_onnx(write_run(tmp_path / "run", channels=("T1", "T2")), tmp_path / "model.onnx")
    for words, said in (
        ((model, tmp_path / "volume.raw", 2, 2, 2, out), "segment: expected a 3D network of one channel, with classes\n"),
        ((model, tmp_path / "volume.raw", 2, 2, 3, out), f"segment: {tmp_path / 'volume.raw'}: expected 12 float32 numbers\n"),
        ((model, tmp_path / "volume.raw", 2, 2, 0, out), "segment: X Y Z: expected numbers of voxels\n"),
    ):
        done = run(program, *words)
        assert (done.returncode, done.stderr) == (2, said) and not out.exists()
