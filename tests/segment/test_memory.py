"""What predict does where memory is short: sums in temporary files, the way back a few rows at a time, with the same result."""

import collections
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medssm import cli, scratch
from medssm.errors import UserError
from medssm.segment import networks
from medssm.segment import predict as module
from medssm.segment.predict import predict
from medssm.segment.preprocess import Fitted, geometry
from medssm.segment.resample import Grid, from_ras, on_spacing, ras, resampled
from tests.segment.synthetic import volume, write
from tests.segment.test_predict import AFFINES


@pytest.fixture
def scan(tmp_path):
    return write(tmp_path / "scans" / "a.nii.gz", volume(7)[0][..., 0], np.diag([1, 1.5, 1, 1.0]))


def saved(folder):
    return [np.asanyarray(nib.load(file).dataobj) for file in sorted(folder.glob("*.nii.gz"))]


def test_sums_in_a_file_give_the_same_bits(trained, tmp_path, monkeypatch, caplog):
    scan = write(tmp_path / "b.nii.gz", volume(7)[0][..., 0])
    options = {"device": "cpu", "save_probabilities": True, "quiet": True}
    predict(trained, scan, tmp_path / "memory", **options)
    monkeypatch.setattr(module, "_room", lambda *_: 0)
    predict(trained, scan, tmp_path / "file", **options, scratch=tmp_path / "scratch")
    for one, other in zip(saved(tmp_path / "memory"), saved(tmp_path / "file"), strict=True):
        np.testing.assert_array_equal(one, other)
    assert caplog.text.count(f"b.nii.gz: what does not fit into memory goes to temporary files in {tmp_path / 'scratch'}") == 1
    assert not list((tmp_path / "scratch").iterdir())


def test_a_disk_too_small_fails_that_case_alone(trained, scan, tmp_path, monkeypatch, capsys):
    write(scan.parent / "b.nii.gz", volume(7, (16, 16, 16))[0][..., 0])
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(scratch.shutil, "disk_usage", lambda folder: usage(0, 0, 200_000))
    monkeypatch.setattr(module, "_room", lambda *_: 0)
    assert cli.main(["predict", str(trained / "fold_0"), str(scan.parent), str(tmp_path / "out"), "--device", "cpu", "--quiet"]) == 1
    assert "out: expected 276480 bytes free for temporary files, got 200000" in capsys.readouterr().err
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["b.nii.gz", "volumes.csv"]


def test_memory_is_shared_between_the_image_and_the_rest(trained, scan, tmp_path, monkeypatch, caplog):
    options = {"device": "cpu", "save_probabilities": True, "quiet": True}
    predict(trained / "fold_0", scan, tmp_path / "memory", **options)
    assert not caplog.text
    monkeypatch.setattr(module.machine, "free_memory", lambda: 700_000)  # the image at 1 mm has 276480 bytes, the sums four times as many
    predict(trained / "fold_0", scan, tmp_path / "file", **options)
    assert "does not fit into memory" in caplog.text
    for one, other in zip(saved(tmp_path / "memory"), saved(tmp_path / "file"), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    monkeypatch.setattr(module.machine, "free_memory", lambda: 300_000)
    with pytest.raises(UserError, match=r"a.nii.gz: the image needs some 0.0 GiB of memory, 0.0 are free"):
        predict(trained / "fold_0", scan, tmp_path / "out", **options)


@pytest.mark.thorough
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_many_classes_under_a_limit_of_memory(tmp_path):
    """The sums alone are larger than the limit on what the process may take."""
    classes = {f"class {i}": i for i in range(80)}
    kwargs = {"spatial_dims": 3, "in_channels": 1, "out_channels": 80, "channels": [4, 8], "strides": [2]}
    weights = tmp_path / "weights"
    Fitted(("MR",), (1, 1, 1), ({"scheme": "zscore"},), classes, None, (16, 16, 16)).save(weights / "fitted.json")
    network = networks.build("monai.networks.nets.UNet", **kwargs)
    networks.save(weights, network, networks.describe("monai.networks.nets.UNet", kwargs))
    write(tmp_path / "a.nii", np.random.default_rng(0).normal(size=(96, 96, 96)).astype(np.float32))
    code = """
import resource, sys, psutil
from medssm import cli
from medssm.segment import predict
limit = psutil.Process().memory_info().data + 250_000_000
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
sys.exit(cli.main(["predict", *sys.argv[1:], "--device", "cpu", "--overlap", "0"]))
"""
    words = [weights, tmp_path / "a.nii", tmp_path / "out.nii"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 4 * 81 * 96**3 > 250_000_000 and "does not fit into memory" in done.stderr
    assert nib.load(tmp_path / "out.nii").shape == (96, 96, 96)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.7, 1.9, 1.2), (0, 2, 0)])
@pytest.mark.parametrize("name", [*AFFINES, "sheared"])
def test_rows_are_those_that_monai_gives_at_once(name, spacing, tmp_path):
    affine = {**AFFINES, "sheared": np.array([[1, 0.2, 0, 1], [0, 1, 0.1, 2], [0.1, 0, 1.5, 3], [0, 0, 0, 1.0]])}[name]
    grid, shape = geometry(spacing), (17, 14, 11)
    image = grid(MetaTensor(torch.rand(2, *shape), affine=torch.from_numpy(affine)))
    wanted = grid.inverse(image).as_tensor()
    onto = ras(affine, shape)
    data = MetaTensor(torch.rand(2, *shape), affine=torch.from_numpy(affine))
    with scratch.Scratch(0, tmp_path, "a") as stores:
        found_grid, stored = on_spacing(data.as_tensor(), affine, spacing, stores)
        at_once = grid(data)
        np.testing.assert_allclose(stored[:].movedim(1, 0), at_once.as_tensor(), atol=2e-5)
        np.testing.assert_allclose(found_grid.affine, at_once.affine)
        assert stored.in_file and found_grid.shape == tuple(at_once.shape[1:])

    def read(rows):
        return image.as_tensor()[:, rows]

    parts = [resampled(read, Grid(image.affine.numpy(), tuple(image.shape[1:])), onto, rows) for rows in scratch.slabs(onto.shape[0], 1, 5)]
    found = from_ras(torch.cat(parts, 1).movedim(0, -1).numpy(), affine)
    np.testing.assert_allclose(found, wanted.movedim(0, -1), atol=2e-5)
