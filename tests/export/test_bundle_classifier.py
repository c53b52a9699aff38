"""medssm export bundle of a classifier: MONAI's transforms and runner give the probabilities of medssm predict's CSV."""

import csv
import json
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import run as monai_run
from monai.bundle import verify_net_in_out
from PIL import Image

from medssm import cli
from medssm.classify import calibration
from medssm.classify.images import Fitted
from medssm.classify.predict import predict
from medssm.errors import UserError
from medssm.export.bundle import export_bundle
from medssm.segment import networks
from tests.classify.pictures import folder, picture

pytest.importorskip("ignite")

ENCODER = {"features": [8, 16], "depths": [0, 1], "decoder_depths": [0], "mixer": "linear_attention", "strides": [2, 2]}
PICTURE = tuple({"scheme": "picture", "low": 0.0, "high": 255.0, "mean": 120.0 + i, "deviation": 50.0} for i in range(3))
CT = {"scheme": "ct", "low": 40.0, "high": 160.0, "mean": 99.0, "deviation": 15.0}
ZSCORE = {"scheme": "zscore"}
TURNED = [[0, 0, -2.0, 1], [0, -0.8, 0, 2], [0.8, 0, 0, 3], [0, 0, 0, 1.0]]
RUNS = {
    "pictures": (("red", "green", "blue"), (24, 32), "resize", None, PICTURE, (0, 1)),
    "grey": (("grey",), (24, 32), "pad", None, PICTURE[:1], (0, 1)),
    "volumes": (("channel_0", "channel_1"), (24, 32, 28), "resize", None, (ZSCORE, CT), (0, 1, 2)),
    "padded": (("channel_0", "channel_1"), (24, 32, 28), "pad", (1.5, 0.9, 2.0), ({"scheme": "none"}, CT), (0, 1, 2)),
    "planes": (("channel_0",), (24, 32), "resize", (1.5, 0.9, 2.0), (ZSCORE,), (0, 1)),
}


def write_run(root, name, model="encoder:medssm_unet", kwargs=ENCODER, classes=("a@b", "50%", "c, d")):
    """A finished training with random weights."""
    channels, shape, sizes, spacing, intensity, axes = RUNS[name]
    fitted = Fitted(channels, classes, shape, sizes, spacing, intensity, axes, ())
    kwargs = {"spatial_dims": len(shape), "in_channels": len(channels), "out_channels": len(classes), **kwargs}
    torch.manual_seed(3)
    run = root / name
    run.mkdir(parents=True)
    fitted.save(run / "fitted.json")
    networks.save(run, networks.build(model, **kwargs), networks.describe(model, kwargs))
    calibration.save(run / calibration.CALIBRATION, {"last": 0.2, "best": 0.2}, 4, 4)  # far from 1: probabilities differ
    return run


def write_images(root, name):
    """Images in awkward sizes, kinds and geometries, some in a folder below."""
    random = np.random.default_rng(0)
    if name == "pictures":
        folder(root, groups=1, each=1)
        Image.fromarray(picture(0, 1, colours=1)[..., 0]).save(root / "disc" / "one grey.png")
        Image.fromarray(picture(1, 3, 40)).quantize(16).save(root / "dark" / "palette.PNG")
        turned = Image.Exif()
        turned[0x0112] = 6
        Image.fromarray(picture(2, 5, 48)[:, :40]).save(root / "bar" / "turned.jpg", exif=turned)
        Image.fromarray(np.dstack([picture(0, 7), picture(1, 8, colours=1)])).save(root / "alpha.png")
    elif name == "grey":
        root.mkdir(parents=True)
        deep = random.integers(0, 300, (40, 20)).astype(np.uint16)
        for file, image in (("grey.png", picture(0, 1, 50, 1)[..., 0]), ("deep.png", deep), ("bits.png", deep > 150)):
            Image.fromarray(image).save(root / file)
    else:
        channels = len(RUNS[name][0])
        (root / "below").mkdir(parents=True)
        for i, affine in enumerate((np.eye(4), TURNED)):
            shape = ((20, 33, 17), (64, 16, 40))[i]
            if name == "planes":
                shape = ((20, 33, 1), (1, 33, 40))[i]  # the second one is a plane across x, which lies across z
            image = random.normal(100, 20, (*shape, channels)).astype(np.float32)
            image[:3], image[:, : shape[1] // 3] = 0, 150 + 100 * i
            nib.save(nib.Nifti1Image(image if channels > 1 else image[..., 0], np.array(affine)), root / ("", "below")[i] / f"image_{i}.nii.gz")
        if name == "planes":
            nib.save(nib.Nifti1Image(random.normal(size=(9, 70)).astype(np.float32), np.diag([-1.0, 2.0, 3.0, 1.0])), root / "two axes.nii")
    return root


def words(bundle, images, out):
    return {
        "config_file": str(bundle / "configs/inference.json"),
        "meta_file": str(bundle / "configs/metadata.json"),
        "bundle_root": str(bundle),
        "dataset_dir": str(images),
        "output_dir": str(out),
        "device": "$torch.device('cpu')",
    }


def table(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def check_same(run, images, found, folder):
    """The table of the bundle has the images and the probabilities of medssm predict's, which differ from image to image."""
    predict(run, images, folder / "wanted.csv", device="cpu", quiet=True)
    wanted, found = table(folder / "wanted.csv"), table(found)
    assert found[0] == ["path", *wanted[0][3:]] == ["path", "p_a@b", "p_50%", "p_c, d"]
    by_path = {row[0]: [float(value) for value in row[1:]] for row in found[1:]}
    assert by_path.keys() == {row[0] for row in wanted[1:]} and len(found) == len(wanted) > 2
    values = np.array([[float(value) for value in row[3:]] for row in wanted[1:]])
    assert np.ptp(values, axis=0).max() > 0.01
    np.testing.assert_allclose([by_path[row[0]] for row in wanted[1:]], values, atol=2e-5)


@pytest.mark.parametrize("name", RUNS)
def test_monais_parts_give_predicts_probabilities(name, tmp_path):
    run, images = write_run(tmp_path, name), write_images(tmp_path / "images", name)
    export_bundle(run, tmp_path / "bundle")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/predictions.csv").write_text("of a run before\n")
    monai_run(**words(tmp_path / "bundle", images, tmp_path / "out"))
    check_same(run, images, tmp_path / "out/predictions.csv", tmp_path)


@pytest.mark.thorough
def test_monais_runner_in_a_process_of_its_own(tmp_path):
    pytest.importorskip("fire")
    run, images = write_run(tmp_path, "pictures"), write_images(tmp_path / "images", "pictures")
    assert cli.main(["export", "bundle", str(run), str(tmp_path / "bundle"), "--quiet"]) == 0
    options = words(tmp_path / "bundle", images, tmp_path / "out") | {
        "bundle_root": ".",
        "config_file": "configs/inference.json",
        "meta_file": "configs/metadata.json",
    }
    subprocess.run(
        [sys.executable, "-m", "monai.bundle", "run", *(word for key, value in options.items() for word in (f"--{key}", value))],
        cwd=tmp_path / "bundle",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    check_same(run, images, tmp_path / "out/predictions.csv", tmp_path)


def test_a_bundle_is_whole_and_says_what_it_is(tmp_path):
    run = write_run(tmp_path, "pictures")
    result = export_bundle(run, tmp_path / "bundle", name="cells", authors="A. Author")
    files = sorted(str(file.relative_to(tmp_path / "bundle")) for file in (tmp_path / "bundle").rglob("*") if file.is_file())
    assert files == ["LICENSE", "configs/inference.json", "configs/metadata.json", "docs/README.md", "docs/model_card.md", "models/model.pt"]
    assert result["name"] == "cells" and set(result["requires"]) == {"medssm", "pillow", "pytorch-ignite"}
    metadata = json.loads((tmp_path / "bundle/configs/metadata.json").read_text())
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"] == {"0": "a@b", "1": "50%", "2": "c, d"}
    readme, about = ((tmp_path / "bundle/docs" / file).read_text() for file in ("README.md", "model_card.md"))
    assert "python -m monai.bundle run" in readme and "PNG and JPEG pictures" in readme and "over 0.2, the temperature" in readme
    assert "**Not a medical device.**" in about and "medssm_runtime" not in about and "| needs | MONAI with medssm" in about
    options = {key: value for key, value in words(tmp_path / "bundle", "", "").items() if key.endswith("_file")}
    verify_net_in_out(net_id="network_def", device="cpu", **options)


def test_networks_of_monai_need_no_medssm(tmp_path):
    run = write_run(tmp_path, "pictures", "monai.networks.nets.DenseNet121", {"init_features": 8, "growth_rate": 4, "block_config": [1, 1]})
    export_bundle(run, tmp_path / "bundle")
    assert "medssm" not in (tmp_path / "bundle/configs/inference.json").read_text()
    images = write_images(tmp_path / "images", "pictures")
    monai_run(**words(tmp_path / "bundle", images, tmp_path / "out"))
    check_same(run, images, tmp_path / "out/predictions.csv", tmp_path)


@pytest.mark.thorough
def test_networks_of_timm_need_no_medssm(tmp_path):
    pytest.importorskip("timm")
    run, images = write_run(tmp_path, "pictures", "timm:resnet10t", {}), write_images(tmp_path / "images", "pictures")
    result = export_bundle(run, tmp_path / "bundle")
    assert "medssm" not in (tmp_path / "bundle/configs/inference.json").read_text() and "timm" in result["requires"]
    monai_run(**words(tmp_path / "bundle", images, tmp_path / "out"))
    check_same(run, images, tmp_path / "out/predictions.csv", tmp_path)


def test_the_folder_where_one_stands(tmp_path, monkeypatch):
    run, out = write_run(tmp_path, "grey"), tmp_path / "bundle"
    out.mkdir()
    monkeypatch.chdir(out)
    result = export_bundle(run, ".")
    assert result["name"] == "bundle" and (out / "configs/inference.json").is_file() and result["out"] == "."


def test_what_monai_reads_otherwise_is_refused(tmp_path):
    run = write_run(tmp_path, "pictures")
    fitted = json.loads((run / "fitted.json").read_text())
    deep = [{**how, "high": 65535.0} for how in fitted["intensity"]]
    for change, message in (({"spacing": [1.0, 1.0, 1.0]}, "resampled to a spacing"), ({"intensity": deep}, "colours of 16 bit")):
        (run / "fitted.json").write_text(json.dumps({**fitted, **change}))
        with pytest.raises(UserError, match=message):
            export_bundle(run, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
