"""medssm export of a classifier: medssm_runtime gives the CSV of medssm predict, but for rounding, in 2D and 3D, of every kind of file."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

import medssm_runtime
from medssm import cli
from medssm.classify.images import Fitted, prepared, resized
from medssm.classify.predict import predict
from medssm.classify.train import train
from medssm.compress.command import compress
from medssm.segment import networks
from medssm_runtime import prepare
from medssm_runtime.__main__ import main
from medssm_runtime.settings import ClassSettings
from tests.classify.pictures import folder, picture, volumes
from tests.runtime.runs import write_onnx, write_run

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

TINY = {"features": [8, 16], "depths": [0, 1], "decoder_depths": [0], "mixer": "linear_attention", "strides": [2, 2]}
FAST = {"model": "medssm_unet", "model_kwargs": TINY, "max_steps": 1, "validations": 1, "device": "cpu", "precision": "32-true", "quiet": True}
ROOT = Path(medssm_runtime.__file__).parents[1]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures in colour, a grey one, one with a palette, one turned by EXIF, one larger than the network's shape."""
    root = folder(tmp_path_factory.mktemp("cells"), groups=4, each=1)
    grey = picture(0, 1, colours=1)[..., 0]
    Image.fromarray(grey).save(root / "disc" / "grey.png")
    Image.fromarray(picture(1, 3, 40)).quantize(16).save(root / "dark" / "palette.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(picture(2, 5, 48)[:, :40]).save(root / "bar" / "turned.jpg", exif=turned)
    return root


@pytest.fixture(scope="module")
def in_2d(pictures, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    train(pictures, run, folds=3, batch=4, **FAST)
    return run


@pytest.fixture(scope="module")
def model(in_2d, tmp_path_factory):
    """Exported by the command."""
    file = tmp_path_factory.mktemp("models") / "cells.onnx"
    assert cli.main(["export", "onnx", str(in_2d), str(file), "--portable", "--quiet"]) == 0
    return file


def rows(path):
    with open(path, newline="") as file:
        found = list(csv.reader(file))
    names = [row[:3] for row in found]
    return names, np.array([row[3:] for row in found[1:]], float), found[0]


def check_same(run, model, inputs, folder, **options):
    """The CSV of the runtime is that of medssm predict."""
    predict(run, inputs, folder / "a.csv", device="cpu", quiet=True)
    result = medssm_runtime.predict(model, inputs, folder / "b.csv", threads=1, quiet=True)
    expected, found = rows(folder / "a.csv"), rows(folder / "b.csv")
    assert found[0] == expected[0] and found[2] == expected[2] and not result["failed"]
    np.testing.assert_allclose(found[1], expected[1], atol=2e-6)
    assert np.ptp(expected[1], axis=0).max() > 1e-4  # images differ
    return result


def test_pictures(in_2d, model, pictures, tmp_path):
    result = check_same(in_2d, model, pictures, tmp_path)
    assert len(result["images"]) == 15 and set(result["seconds"]) == {"open", "read", "network", "write"}
    one = result["images"][str(pictures / "disc" / "grey.png")]
    assert sum(one["probabilities"].values()) == pytest.approx(1) and one["label"] in one["probabilities"]


def test_volumes_with_orientations_and_spacing(tmp_path):
    root = volumes(tmp_path / "balls", groups=3)
    train(root, tmp_path / "run", folds=3, batch=2, shape=(24, 16, 20), sizes="pad", spacing=(1.5, 2.0, 1.25), **FAST)
    assert cli.main(["export", "onnx", str(tmp_path / "run"), str(tmp_path / "net.onnx"), "--quiet"]) == 0
    check_same(tmp_path / "run", tmp_path / "net.onnx", root, tmp_path)


def test_the_file_says_what_it_is_and_its_batch_is_free(in_2d, model):
    found = onnx.load(model)
    sizes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*found.graph.input, *found.graph.output)}
    assert sizes == {"image": ["batch", 3, 32, 32], "logits": ["batch", 3]}
    table = json.loads({entry.key: entry.value for entry in found.metadata_props}["medssm"])
    temperature = json.loads((in_2d / "calibration.json").read_text())["temperature"]["last"]
    assert table["task"] == "classify" and table["classes"] == ["bar", "dark", "disc"] and table["temperature"] == temperature != 1
    assert table["shape"] == [32, 32] and table["sizes"] == "resize" and table["custom_ops"] is None
    x = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        want = networks.load(in_2d).eval()(x) / temperature
    got = medssm_runtime.load(model, threads=1).run(x.numpy())
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_card_has_classes_figures_and_calibration(model, in_2d):
    text = model.with_name("cells.onnx.md").read_text()
    figures = json.loads((in_2d / "figures.json").read_text())["figures"]
    assert "**Not a medical device.**" in text and "which of these classes it is: bar, dark, disc" in text
    assert f"| balanced accuracy | {figures['balanced_accuracy']['value']:.3f} [" in text and "| found of dark |" in text
    cases = json.loads((in_2d / "cases.json").read_text())
    assert f"{len(cases['training'])} image(s) (bar " in text and "It is not known whether two of them are of one person." in text
    held_out = len(cases["validation"])
    assert f"was fitted to {held_out} held-out image(s) of {held_out} group(s)" in text
    assert str(in_2d.parent) not in text and "p0_0" not in text


@pytest.mark.thorough
def test_openvino_and_8_bits(in_2d, pictures, tmp_path):
    pytest.importorskip("openvino")
    assert cli.main(["export", "openvino", str(in_2d), str(tmp_path / "net.xml"), "--quiet"]) == 0
    check_same(in_2d, tmp_path / "net.xml", pictures, tmp_path)
    compress(in_2d, tmp_path / "int8", int8=True, batches=1, quiet=True)
    assert cli.main(["export", "onnx", str(tmp_path / "int8"), str(tmp_path / "int8.onnx"), "--portable", "--quiet"]) == 0
    predict(tmp_path / "int8", pictures, tmp_path / "8.csv", device="cpu", quiet=True)
    medssm_runtime.predict(tmp_path / "int8.onnx", pictures, tmp_path / "8r.csv", threads=1, quiet=True)
    np.testing.assert_allclose(rows(tmp_path / "8r.csv")[1], rows(tmp_path / "8.csv")[1], atol=0.01)


@pytest.mark.thorough
def test_aotinductor(in_2d, tmp_path):
    assert cli.main(["export", "aoti", str(in_2d), str(tmp_path / "net.pt2"), "--quiet"]) == 0
    run = torch._inductor.aoti_load_package(str(tmp_path / "net.pt2"))
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        want = networks.load(in_2d).eval()(x)
    temperature = json.loads((in_2d / "calibration.json").read_text())["temperature"]["last"]
    torch.testing.assert_close(run(x), want / temperature, atol=1e-5, rtol=1e-4)


@pytest.mark.thorough
def test_nncf(in_2d, pictures, tmp_path):
    pytest.importorskip("nncf")
    assert cli.main(["export", "openvino", str(in_2d), str(tmp_path / "net.xml"), "--int8", "--quiet"]) == 0
    medssm_runtime.predict(tmp_path / "net.xml", pictures, tmp_path / "found.csv", quiet=True)
    assert "before its numbers became 8-bit integers" in (tmp_path / "net.xml.md").read_text()


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["vmamba", "vim", "mlla", "vrwkv", "medmamba", "nnmamba_cls", "encoder:segmamba", "monai.networks.nets.DenseNet121"])
def test_every_classifier(name, tmp_path):
    from medssm.export.onnx import to_onnx

    small = {} if name.startswith(("monai", "encoder")) else __import__("medssm").models.model_facts(name).small
    network = networks.build(name, spatial_dims=2, in_channels=1, out_channels=3, **small).eval()
    to_onnx(network, tmp_path / "net.onnx", (1, 1, 64, 64), sizes="fixed")


@pytest.mark.parametrize("sizes", ["resize", "pad"])
@pytest.mark.parametrize("shape", [(20, 33, 17), (64, 16, 40)])
@pytest.mark.parametrize("affine", [np.diag([1, 1, 1, 1.0]), [[0, 0, -2.0, 1], [0, -0.8, 0, 2], [0.8, 0, 0, 3], [0, 0, 0, 1.0]]])
@pytest.mark.parametrize("spacing", [None, (1.5, 0.9, 2.0)])
def test_images_are_prepared_as_medssm_does(sizes, shape, affine, spacing, tmp_path):
    image = np.random.default_rng(0).normal(100, 20, (*shape, 2)).astype(np.float32)
    nib.save(nib.Nifti1Image(image, np.array(affine)), tmp_path / "image.nii")
    intensity = ({"scheme": "zscore"}, {"scheme": "ct", "low": 70.0, "high": 130.0, "mean": 99.0, "deviation": 15.0})
    fitted = Fitted(("a", "b"), ("x", "y"), (24, 32, 28), sizes, spacing, intensity, (0, 1, 2), ())
    settings = ClassSettings("", intensity, ("x", "y"), fitted.shape, sizes, spacing, 1.0, None)
    found = prepare.prepared(np.moveaxis(image, -1, 0), np.array(affine), settings)
    np.testing.assert_allclose(found, prepared(tmp_path / "image.nii", fitted).numpy(), atol=1e-4)


@pytest.mark.parametrize(("size", "wanted"), [(7, 7), (5, 16), (33, 32), (40, 16), (100, 7), (1, 4)])
def test_images_are_resized_as_pytorch_does(size, wanted):
    image = torch.randn(2, size, 6)
    np.testing.assert_allclose(prepare.resized(image.numpy(), (wanted, 5)), resized(image, (wanted, 5)), atol=2e-6)


def test_it_runs_without_torch(model, pictures, tmp_path):
    script = "import runpy, sys\nfor n in ('torch', 'monai', 'medssm', 'scipy'): sys.modules[n] = None\nsys.argv = sys.argv[1:]\n"
    script += "runpy.run_module('medssm_runtime', run_name='__main__', alter_sys=True)"
    words = ["medssm_runtime", model, pictures / "disc", tmp_path / "found.csv"]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120
    )
    assert done.returncode == 0 and done.stdout.startswith("5 image(s): open "), done.stderr


def refused(capsys, *words):
    assert main([*map(str, words), "--quiet"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("medssm_runtime: ")
    return err


def test_options_may_stand_between_the_files(model, pictures, tmp_path):
    words = [model, pictures / "disc", "--threads", "1", pictures / "bar", "--quiet", tmp_path / "found.csv"]
    assert main([str(word) for word in words]) == 0 and len(rows(tmp_path / "found.csv")[1]) == 10


def test_wrong_combinations_are_one_line(model, pictures, tmp_path, capsys, monkeypatch):
    one = pictures / "disc" / "grey.png"
    assert "out: expected a file that ends in .csv, as the network classifies" in refused(capsys, model, one, tmp_path / "labels.nii.gz")
    assert "mirror: " in refused(capsys, model, one, tmp_path / "a.csv", "--mirror")
    assert "sees each image once, as a whole" in refused(capsys, model, one, tmp_path / "a.csv", "--overlap", 0.3)
    segments = write_onnx(write_run(tmp_path / "segments"), tmp_path / "segments.onnx")
    scan = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(size=(20, 20, 20)).astype(np.float32), np.eye(4)), scan)
    assert "out: a CSV is what a classifier writes, and the network segments" in refused(capsys, segments, scan, tmp_path / "a.csv")
    assert f"{scan}: 20 x 20 x 20 voxels, where" in refused(capsys, model, scan, tmp_path / "a.csv")
    (tmp_path / "list.txt").touch()
    assert "list.txt: expected an image (" in refused(capsys, model, tmp_path / "list.txt", tmp_path / "a.csv")
    (tmp_path / "bad.png").write_text("text")
    assert "bad.png: not a readable picture" in refused(capsys, model, tmp_path / "bad.png", tmp_path / "a.csv")
    assert not (tmp_path / "a.csv").exists() and not list(tmp_path.glob(".partial*"))
    (tmp_path / "a.csv").write_text("mine")
    assert "medssm did not write it" in refused(capsys, model, one, tmp_path / "a.csv")
    assert main([str(model), str(one), str(tmp_path / "a.csv"), "--overwrite", "--quiet"]) == 0
    assert main([str(model), str(one), str(tmp_path / "bad.png"), str(tmp_path / "a.csv"), "--quiet"]) == 1  # the others are done
    assert "bad.png" in capsys.readouterr().err and len(rows(tmp_path / "a.csv")[1]) == 1
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert refused(capsys, model, one, tmp_path / "a.csv").endswith("grey.png: needs the package pillow: pip install pillow\n")


def test_export_refuses_what_a_classifier_has_not(in_2d, tmp_path, capsys):
    for words, said in (
        (["onnx", tmp_path / "net.onnx", "--mirror"], "mirror: "),
        (["onnx", tmp_path / "net.onnx", "--overlap", "0.5"], "overlap: "),
    ):
        assert cli.main(["export", words[0], str(in_2d), *map(str, words[1:])]) == 2
        err = capsys.readouterr().err
        assert said in err and "classifies" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"shape": [32]}, "shape: unexpected [32]"),
        ({"sizes": "new"}, "sizes: unexpected 'new'"),
        ({"temperature": 0}, "temperature: unexpected 0"),
        ({"classes": ["a", "a"]}, "classes: unexpected ['a', 'a']"),
        ({"task": "detect"}, "no entry 'detect'"),
    ],
)
def test_damaged_metadata(model, tmp_path, edit, said):
    found = onnx.load(model)
    table = json.loads(next(entry.value for entry in found.metadata_props if entry.key == "medssm"))
    onnx.helper.set_model_props(found, {"medssm": json.dumps(table | edit)})
    onnx.save(found, tmp_path / "net.onnx")
    with pytest.raises(medssm_runtime.UserError, match="its metadata 'medssm' are damaged") as error:
        medssm_runtime.load(tmp_path / "net.onnx")
    assert said in str(error.value)
