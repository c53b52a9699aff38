"""medssm predict --stream: the network over the whole volume at once, in slabs."""

import dataclasses
import itertools
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch

from medssm import cli
from medssm.segment import networks
from medssm.segment import predict as module
from medssm.segment.predict import predict
from medssm.segment.preprocess import Fitted
from tests.segment.synthetic import UNET, volume, write

CLASSES = {"background": 0, "left": 1, "right": 2}
FITTED = Fitted(("MR",), (1, 1, 1), ({"scheme": "zscore"},), CLASSES, None, (16, 16, 16), mirror=(0, 2), sides=((1, 2),))


def weights(folder, seed=0, fitted=FITTED, name="medssm_unet", **kwargs):
    torch.manual_seed(seed)
    kwargs = {"spatial_dims": len(fitted.patch), "in_channels": 1, "out_channels": 3, **(kwargs or {"size": "tiny"})}
    network = networks.build(name, **kwargs).eval()
    fitted.save(folder / "fitted.json")
    networks.save(folder, network, networks.describe(name, kwargs))
    return network


@pytest.fixture
def scan(tmp_path):
    return write(tmp_path / "a.nii.gz", volume(7, (37, 26, 19))[0][..., 0])


def wanted(network, scan, flips=((),)):
    image = torch.from_numpy(np.asarray(nib.load(scan).dataobj, np.float32))[None, None]
    image = (image - image.mean()) / image.std(correction=0)
    with torch.inference_mode():
        found = [network(image.flip(flip)).softmax(1).flip(flip) for flip in flips]
    return sum(p[:, [0, 2, 1]] if 2 in flip else p for p, flip in zip(found, flips, strict=True))[0].movedim(0, -1).numpy() / len(flips)


def saved(run, scan, out, **options):
    predict(run, scan, out / "a.nii.gz", device="cpu", stream=True, save_probabilities=True, quiet=True, **options)
    return np.asarray(nib.load(out / "a_probabilities.nii.gz").dataobj)


def test_it_is_the_network_on_the_whole_volume(scan, tmp_path, monkeypatch):
    network = weights(tmp_path / "run")
    np.testing.assert_allclose(saved(tmp_path / "run", scan, tmp_path / "one"), wanted(network, scan), atol=1e-5)
    monkeypatch.setattr(module, "_room", lambda *_: 0)  # files, and the smallest slabs
    found = saved(tmp_path / "run", scan, tmp_path / "two", scratch=tmp_path / "scratch")
    np.testing.assert_allclose(found, wanted(network, scan), atol=1e-5)
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "two/a.nii.gz").dataobj), found.argmax(-1))
    assert not list((tmp_path / "scratch").iterdir())


def test_mirrorings_and_folds_are_averaged(scan, tmp_path):
    one, other = weights(tmp_path / "runs/fold_0", 0), weights(tmp_path / "runs/fold_1", 1)
    flips = [tuple(flip) for count in range(3) for flip in itertools.combinations((2, 4), count)]
    both = (wanted(one, scan, flips) + wanted(other, scan, flips)) / 2
    np.testing.assert_allclose(saved(tmp_path / "runs", scan, tmp_path / "out", mirror=True), both, atol=1e-5)


def test_half_precision_streams(scan, tmp_path):
    network = weights(tmp_path / "run")
    found = saved(tmp_path / "run", scan, tmp_path / "out", precision="bf16-mixed")
    assert np.abs(found - wanted(network, scan)).max() < 0.1
    assert np.abs(found - saved(tmp_path / "run", scan, tmp_path / "full")).max() > 1e-4


def test_another_spacing_comes_back_on_the_scans_grid(tmp_path):
    weights(tmp_path / "run")
    path = write(tmp_path / "a.nii.gz", volume(7, (20, 18, 9))[0][..., 0], np.diag([-1.5, 1.2, 2, 1]))
    found = saved(tmp_path / "run", path, tmp_path / "out")
    assert found.shape == (20, 18, 9, 3) and np.abs(found.sum(-1) - 1).max() < 1e-5


def test_what_it_needs_is_said_first(scan, tmp_path, capsys):
    weights(tmp_path / "run")
    assert cli.main(["predict", str(tmp_path / "run"), str(scan), str(tmp_path / "out.nii.gz"), "--stream", "--device", "cpu"]) == 0
    assert "a.nii.gz: streams 37 x 26 x 19 voxels: 0.00" in capsys.readouterr().err


def test_other_networks_are_refused_before_a_scan_is_read(tmp_path, capsys):
    weights(tmp_path / "monai", name="monai.networks.nets.UNet", **UNET)
    weights(tmp_path / "slices", fitted=dataclasses.replace(FITTED, patch=(16, 16), slice_axis=2))
    scan = write(tmp_path / "a.nii.gz", np.zeros((3, 3, 3), np.float32))
    for run, message in (("monai", "the network (UNet) cannot be streamed: it is no U-Net"), ("slices", "one slice at a time")):
        assert cli.main(["predict", str(tmp_path / run), str(scan), str(tmp_path / "out.nii.gz"), "--stream", "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert message in error and "leave --stream out" in error and error.count("\n") == 1


@pytest.mark.thorough
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_the_command_grows_with_the_image_alone(tmp_path):
    weights(tmp_path / "run")
    for length in (32, 128, 256):
        write(tmp_path / f"{length}.nii", np.random.default_rng(0).normal(size=(length, 128, 128)).astype(np.float32))
    code = """
import pathlib, sys
from medssm import cli, machine
folder, peaks = pathlib.Path(sys.argv[1]), []
for length in (32, 128, 256):
    machine.free_memory = lambda: 8 * length * 128**2 + 40_000_000
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    words = [folder / "run", folder / f"{length}.nii", folder / "out.nii", "--stream", "--overwrite", "--device", "cpu", "--quiet"]
    assert cli.main(["predict", *map(str, words)]) == 0
    peaks.append(1024 * int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]))
print(peaks[1], peaks[2])
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    short, long = map(int, done.stdout.split())
    assert long - short < 30 * 128**3, done.stdout  # of 60 bytes a voxel that the maps have and 20 of the image, the label map and their files
