"""medssm export bundle: MONAI's transforms and runner give medssm predict's labels."""

import json
import os
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, verify_net_in_out

from medssm import cli
from medssm.errors import UserError
from medssm.export.bundle import export_bundle
from medssm.segment import networks, postprocess
from medssm.segment.predict import predict
from medssm.segment.train import train
from tests.segment.synthetic import UNET, nnunet_folder, volume, write

OBLIQUE = [[0.9, -0.3, 0, 4], [0.3, 0.9, 0.1, 5], [0, -0.1, 1.1, 6], [0, 0, 0, 1.0]]
TURNED = [[0, 0, -2.0, 1], [0, -0.8, 0, 2], [0.8, 0, 0, 3], [0, 0, 0, 1.0]]
SMALL = (44, 40, 24)  # thinner than the patch: the bundle has to pad as predict does
UNET_2D = {**UNET, "norm": "batch"}


def sparse(seed, image, label):
    """Labels 0, 5 and 300, a channel with zeros, another scale for each channel."""
    image = image * np.array([1.0, 3.0, 0.1], np.float32) - np.array([100, 0, 0], np.float32)
    image[:3, :, :, 1] = 0
    return image, np.array([0, 5, 300], np.int16)[label]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A 3D network of medssm with deep supervision, and a 2D one of MONAI for three channels of three kinds."""
    root = tmp_path_factory.mktemp("runs")
    common = {"max_steps": 50, "lr": 0.01, "device": "cpu", "quiet": True}
    train(
        nnunet_folder(root / "data3"),
        root / "3d",
        model="medssm_unet",
        patch=(32, 32, 32),
        model_kwargs={"size": "tiny", "deep_supervision": True},
        **common,
    )
    data = nnunet_folder(root / "data2", channels=("CT", "MR", "noNorm"), labels={"background": 0, "ball": 5, "box": 300}, edit=sparse)
    train(data, root / "2d", model="monai.networks.nets.UNet", model_kwargs=UNET_2D, spatial_dims=2, patch=(32, 32), **common)
    return root


@pytest.fixture(scope="module")
def bundles(runs, tmp_path_factory):
    root = tmp_path_factory.mktemp("bundles")
    for name in ("3d", "2d"):
        export_bundle(runs / name, root / name, authors="A. Author")
    return root


@pytest.fixture
def scans(tmp_path):
    """Folders of scans that training never saw, in awkward geometry."""
    for name, affine in (("oblique", OBLIQUE), ("turned", TURNED)):
        image, _ = volume(7, SMALL)
        write(tmp_path / "3d" / f"{name}.nii.gz", image[..., 0], affine)
        image, _ = sparse(8, *volume(8, SMALL, 3))
        for i in range(3):
            write(tmp_path / "2d" / f"{name}_{i:04d}.nii.gz", image[..., i], affine)
    return tmp_path


def compare_with_predict(run, scans, folder, channel):
    """At most one voxel in a thousand may differ, where two classes are equal up to rounding; the grids are one."""
    predict(run, scans, folder / "wanted", device="cpu", quiet=True)
    for case in ("oblique", "turned"):
        found, wanted = nib.load(folder / "found" / f"{case}{channel}_seg.nii.gz"), nib.load(folder / "wanted" / f"{case}.nii.gz")
        np.testing.assert_allclose(found.affine, wanted.affine, atol=1e-6)
        assert found.shape == wanted.shape and found.get_data_dtype() == wanted.get_data_dtype()
        assert len(np.unique(wanted.dataobj)) == 3  # the network found something to compare
        assert np.mean(np.asarray(found.dataobj) != np.asarray(wanted.dataobj)) <= 1e-3


def run_without_engine(bundle, scans, out):
    """What MONAI's evaluator does with the parts of a bundle, for where pytorch-ignite is not installed."""
    parser = ConfigParser()
    parser.read_config(bundle / "configs/inference.json")
    parser.update({"bundle_root": str(bundle), "dataset_dir": str(scans), "output_dir": str(out)})
    parser.parse()
    parser.get_parsed_content("initialize")
    network, inferer, post = (parser.get_parsed_content(name) for name in ("network", "inferer", "postprocessing"))
    for item in parser.get_parsed_content("dataset"):
        with torch.no_grad():
            post({**item, "pred": inferer(item["image"][None], network.eval())[0]})


@pytest.mark.parametrize("name", [pytest.param("3d", marks=pytest.mark.thorough), "2d"])
def test_monais_parts_give_predicts_labels(runs, bundles, scans, tmp_path, name):
    run_without_engine(bundles / name, scans / name, tmp_path / "found")
    compare_with_predict(runs / name, scans / name, tmp_path, "_0000" if name == "2d" else "")


def test_the_bundle_does_the_post_processing_of_the_run(runs, scans, tmp_path):
    run = shutil.copytree(runs / "2d", tmp_path / "run")
    steps = {"ball": {"smallest_ml": 0.02}, "box": {"fill_holes": True, "largest_component": True}}
    postprocess.save(run / postprocess.POSTPROCESSING, steps, {})
    result = export_bundle(run, tmp_path / "bundle")
    assert "scipy" in result["requires"] and "box holes filled and largest component" in (tmp_path / "bundle/docs/README.md").read_text()
    run_without_engine(tmp_path / "bundle", scans / "2d", tmp_path / "found")
    compare_with_predict(run, scans / "2d", tmp_path, "_0000")
    predict(run, scans / "2d", tmp_path / "plain", device="cpu", postprocessing="none", quiet=True)
    for case in ("oblique", "turned"):
        plain, found = (
            np.asarray(nib.load(file).dataobj) for file in (tmp_path / f"plain/{case}.nii.gz", tmp_path / f"found/{case}_0000_seg.nii.gz")
        )
        assert np.mean(plain != found) > 1e-3


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["3d", pytest.param("2d", marks=pytest.mark.thorough)])
def test_monais_runner_gives_predicts_labels(runs, bundles, scans, tmp_path, name):
    pytest.importorskip("ignite")
    pytest.importorskip("fire")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "monai.bundle",
            "run",
            "--config_file",
            "configs/inference.json",
            "--meta_file",
            "configs/metadata.json",
            "--dataset_dir",
            scans / name,
            "--output_dir",
            tmp_path / "found",
            "--device",
            "$torch.device('cpu')",
        ],
        cwd=bundles / name,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    compare_with_predict(runs / name, scans / name, tmp_path, "_0000" if name == "2d" else "")


@pytest.mark.parametrize("name", ["3d", "2d"])
def test_a_bundle_is_whole(bundles, name):
    files = sorted(str(file.relative_to(bundles / name)) for file in (bundles / name).rglob("*") if file.is_file())
    assert files == ["LICENSE", "configs/inference.json", "configs/metadata.json", "docs/README.md", "docs/model_card.md", "models/model.pt"]
    weights = torch.load(bundles / name / "models/model.pt", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in weights.values())
    assert "python -m monai.bundle run" in (bundles / name / "docs/README.md").read_text()
    assert "No licence was stated" in (bundles / name / "LICENSE").read_text()


@pytest.mark.parametrize("name", ["3d", "2d"])
def test_metadata_has_what_monais_schema_asks_for(bundles, name):
    metadata = json.loads((bundles / name / "configs/metadata.json").read_text())
    texts = ("schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description", "authors", "copyright")
    assert all(isinstance(metadata[key], str) and metadata[key] for key in texts)
    assert isinstance(metadata["required_packages_version"], dict) and metadata["authors"] == "A. Author"
    for side in ("inputs", "outputs"):
        for tensor in metadata["network_data_format"][side].values():
            assert all(isinstance(tensor[key], str) for key in ("type", "format", "dtype"))
            assert all(isinstance(size, int) for size in tensor["spatial_shape"]) and isinstance(tensor["value_range"], list)
            assert len(tensor["channel_def"]) == tensor["num_channels"] and isinstance(tensor["is_patch_data"], bool)


@pytest.mark.parametrize("name", ["3d", "2d"])
def test_monai_verifies_the_network(bundles, name):
    verify_net_in_out(
        net_id="network_def",
        config_file=str(bundles / name / "configs/inference.json"),
        meta_file=str(bundles / name / "configs/metadata.json"),
        device="cpu",
    )


def test_monais_networks_need_no_medssm(bundles):
    for name, needs in (("3d", True), ("2d", False)):
        metadata = json.loads((bundles / name / "configs/metadata.json").read_text())
        assert ("medssm" in (bundles / name / "configs/inference.json").read_text()) == needs
        assert ("medssm" in metadata["required_packages_version"]) == needs


def test_the_command(runs, tmp_path, capsys):
    (tmp_path / "licence.txt").write_text("CC0")
    assert (
        cli.main(
            [
                "export",
                "bundle",
                str(runs / "2d"),
                str(tmp_path / "b"),
                "--name",
                "balls",
                "--bundle-version",
                "1.2.0",
                "--license",
                str(tmp_path / "licence.txt"),
                "--json",
            ]
        )
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["name"] == "balls" and result["out"] == str(tmp_path / "b") and result["requires"].keys() == {"nibabel", "pytorch-ignite"}
    assert (tmp_path / "b/LICENSE").read_text() == "CC0"
    assert json.loads((tmp_path / "b/configs/metadata.json").read_text())["version"] == "1.2.0"
    assert cli.main(["export", "bundle", str(runs / "2d"), str(tmp_path / "b")]) == 2
    assert "expected a new folder" in capsys.readouterr().err


def test_what_cannot_be_a_bundle_is_one_line_and_leaves_nothing(runs, tmp_path):
    folds = tmp_path / "folds"
    for fold in range(2):
        shutil.copytree(runs / "2d", folds / f"fold_{fold}")
    given = tmp_path / "module"
    shutil.copytree(runs / "2d", given)
    (given / "config.json").write_text(json.dumps({"model": None, "class": "my.Net"}))
    unfinished = tmp_path / "unfinished"
    shutil.copytree(runs / "2d", unfinished)
    (unfinished / "model.safetensors").unlink()
    for run, message in (
        (folds, "got the folds fold_0, fold_1: name one of them"),
        (given, "trained from a my.Net given as a module"),
        (unfinished, "the training is not finished"),
        (tmp_path / "none", "run: .*none: expected a folder that medssm train wrote, there is none"),
    ):
        with pytest.raises(UserError, match=message):
            export_bundle(run, tmp_path / "out")
    with pytest.raises(UserError, match=r"license: .* not a readable text file"):
        export_bundle(runs / "2d", tmp_path / "out", license=tmp_path / "none.txt")
    assert {path.name for path in tmp_path.iterdir()} == {"folds", "module", "unfinished"}


def test_pictures_are_scaled_as_in_the_training(runs, tmp_path):
    copy = shutil.copytree(runs / "2d", tmp_path / "run")
    fitted = json.loads((copy / "fitted.json").read_text())
    fitted["intensity"] = [{"scheme": "picture", "low": 0.0, "high": 255.0, "mean": 100.0, "deviation": 50.0}] * 3
    (copy / "fitted.json").write_text(json.dumps(fitted))
    export_bundle(copy, tmp_path / "out")
    scales = json.loads((tmp_path / "out/configs/inference.json").read_text())["intensity"]
    assert [(scale["_target_"], scale["b_min"], scale["b_max"]) for scale in scales] == [("ScaleIntensityRange", -2.0, 3.1)] * 3


def test_networks_of_several_outputs_are_refused(runs, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(runs / "2d", copy)
    network = {"spatial_dims": 2, "in_channels": 3, "out_channels": 3, "features": [4, 4, 4, 4, 4, 4]}
    name = "monai.networks.nets.BasicUNetPlusPlus"
    networks.save(copy, networks.build(name, **network), {"model": name, "kwargs": network})
    with pytest.raises(UserError, match=r"BasicUNetPlusPlus .* gives several outputs"):
        export_bundle(copy, tmp_path / "out")
