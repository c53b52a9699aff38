"""What predict does where memory is short: sums in temporary files, the way back a few rows at a time, with the same result."""

import collections
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medssm import cli, scratch
from medssm.errors import UserError
from medssm.scratch import Store
from medssm.segment import networks, postprocess, stored
from medssm.segment import predict as module
from medssm.segment.images import Image, nifti, open_channels, open_image, read_image
from medssm.segment.predict import predict
from medssm.segment.preprocess import Fitted, geometry
from medssm.segment.resample import Grid, on_spacing, ras, resampled
from medssm.segment.stored import OnFile, read_stored
from tests.segment.dicom import series
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
    file = Image(tmp_path / "a", "NIfTI", shape, affine, lambda dtype: data.numpy(), channels=2)
    image = grid(MetaTensor(torch.rand(2, *shape), affine=torch.from_numpy(affine)))
    wanted = grid.inverse(image).as_tensor()
    onto = ras(affine, shape)
    data = torch.rand(2, *shape)
    with scratch.Scratch(0, tmp_path, "a") as stores:
        found_grid, stored = on_spacing(read_stored([file], None, stores), onto, spacing, stores)
        at_once = grid(MetaTensor(data, affine=torch.from_numpy(affine)))
        np.testing.assert_allclose(stored[:].movedim(1, 0), at_once.as_tensor(), atol=2e-5)
        np.testing.assert_allclose(found_grid.affine, at_once.affine)
        assert stored.in_file and found_grid.shape == tuple(at_once.shape[1:])

    def read(rows):
        return image.as_tensor()[:, rows]

    parts = [resampled(read, Grid(image.affine.numpy(), tuple(image.shape[1:])), onto, rows) for rows in scratch.slabs(onto.shape[0], 1, 5)]
    found = OnFile(Store.of(torch.cat(parts, 1).movedim(0, -1)), file)
    np.testing.assert_allclose(np.asarray(found), wanted.movedim(0, -1), atol=2e-5)
    np.testing.assert_array_equal(found[:, :, 3:7, 1], np.asarray(found)[:, :, 3:7, 1])


# -- files, part after part

TURNED = np.array([[0, 0, -1.5, 9], [-1, 0, 0, 2], [0, 2, 0, 3], [0, 0, 0, 1.0]])


def four_channels(path):
    data = np.random.default_rng(1).normal(size=(9, 8, 7, 4)).astype(np.float32)
    return [write(path / "a.nii.gz", data, TURNED)]


def five_axes(path):
    return [write(path / "a.nii.gz", np.random.default_rng(1).normal(size=(9, 8, 7, 1, 3)).astype(np.float32), TURNED)]


def scaled_integers(path):
    image = nib.Nifti1Image(np.random.default_rng(1).integers(-99, 99, (9, 8, 7)).astype(np.int16), TURNED)
    image.header.set_slope_inter(0.25, -3)
    nib.save(image, path / "a.nii")
    return [path / "a.nii"]


def colours(path):
    data = np.random.default_rng(1).integers(0, 255, (9, 8, 7, 3)).astype(np.uint8)
    return [write(path / "a.nii.gz", data.view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0], TURNED)]


def zstandard(path):
    nifti.write(path / "a.nii.zst", volume(7)[0][..., 0], open_image(scaled_integers(path)[0]))
    return [path / "a.nii.zst"]


def two_files_of_which_one_is_turned(path):
    data = np.random.default_rng(1).normal(size=(9, 8, 7)).astype(np.float32)
    back = np.diag([-1.0, 1, 1, 1])
    back[0, 3] = 8
    return [write(path / "a.nii", data, TURNED), write(path / "b.nii.gz", data[::-1] + 1, TURNED @ back)]


def a_dicom_series(path):
    return [series(path / "ct", np.random.default_rng(1).integers(0, 99, (7, 8, 9)))]


def a_plane(path):
    return [write(path / "a.nii", np.random.default_rng(1).normal(size=(9, 8)).astype(np.float32))]


@pytest.mark.parametrize("memory", [0, 2**30])
@pytest.mark.parametrize(
    "make", [four_channels, five_axes, scaled_integers, colours, zstandard, two_files_of_which_one_is_turned, a_dicom_series, a_plane]
)
def test_a_file_is_read_in_parts_as_it_is_read_whole(make, memory, tmp_path, monkeypatch):
    paths = make(tmp_path)
    wanted, file = read_image(paths)
    monkeypatch.setattr(stored, "_PIECE", (2 * file.shape[0] * file.shape[1], 2 * file.shape[0] * file.shape[1]))
    files = open_channels(paths)
    pieces = [[values.shape for _, values in one.pieces(stored._PIECE[0])] for one in files]
    assert all(shape[3] <= 2 for shapes in pieces for shape in shapes) or (make is two_files_of_which_one_is_turned and len(pieces[1]) > 2)
    with scratch.Scratch(memory, tmp_path, "a") as stores:
        found = read_stored(files, None, stores)
        assert found.in_file == (memory == 0)
        np.testing.assert_allclose(np.asarray(OnFile(Store.of(found[:].movedim(1, -1)), file)), np.moveaxis(wanted, 0, -1), rtol=1e-6)


def test_what_is_not_finite_in_any_part_is_counted_or_filled(tmp_path, monkeypatch):
    data = volume(7)[0][..., 0].copy()
    data[3, 3, ::8] = np.nan
    files = open_channels([write(tmp_path / "a.nii", data)])
    monkeypatch.setattr(stored, "_PIECE", (1, 1))
    with scratch.Scratch(0, tmp_path, "a") as stores:
        with pytest.raises(UserError, match=r"a.nii: 4 voxel\(s\) are not finite"):
            read_stored(files, None, stores)
        np.testing.assert_array_equal(read_stored(files, -7.0, stores)[:][:, 0], np.nan_to_num(data, nan=-7.0))
        with pytest.raises(UserError, match=r"b.nii: every voxel of the image is 3"):
            read_stored(open_channels([write(tmp_path / "b.nii", np.full((3, 3, 3), 3.0, np.float32))]), None, stores)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_nibabel_reads_what_is_written_in_parts(kind, order, name, tmp_path, monkeypatch):
    like = kind(np.zeros((9, 8, 7), f"{order}i2"), TURNED, kind.header_class(endianness=order))
    like.header.set_xyzt_units("micron")
    nib.save(like, tmp_path / "like.nii")
    monkeypatch.setattr(nifti, "_PART", 9 * 8 * 2)
    data = np.random.default_rng(1).normal(size=(9, 8, 7, 3)).astype(np.float32)
    nifti.write(tmp_path / name, data, open_image(tmp_path / "like.nii"))
    found = nib.load(tmp_path / name)
    np.testing.assert_array_equal(found.dataobj, data)
    np.testing.assert_array_equal(found.affine, TURNED)
    assert type(found) is kind and found.header.endianness == order and found.header.get_xyzt_units()[0] == "micron"


@pytest.mark.parametrize("shape", [(23, 11, 9), (23, 1, 9), (1, 11, 9), (23, 1, 1)])
def test_post_processing_in_parts_is_that_of_the_whole(shape, tmp_path, monkeypatch):
    random = np.random.default_rng(3)
    classes = {"a": ((1,), 1), "b": ((2, 1), 2)}
    for share in (0.1, 0.3, 0.5, 0.8):
        labels = (random.random(shape) < share).astype(np.uint8) * random.integers(1, 3, shape).astype(np.uint8)
        for how in ({"largest_component": True}, {"fill_holes": True}, {"fill_holes": True, "smallest_ml": 3.0}, {"smallest_ml": 2.0}):
            monkeypatch.setattr(postprocess, "_ROWS", 2**22)
            whole = labels.copy()
            postprocess.process(Store.of(torch.from_numpy(whole)), {"a": how, "b": how}, classes, 1.0)
            monkeypatch.setattr(postprocess, "_ROWS", 1)  # row by row
            with scratch.Scratch(0, tmp_path, "a") as stores:
                parts = stores.store(*shape, dtype=torch.uint8)
                parts[:] = torch.from_numpy(labels)
                postprocess.process(parts, {"a": how, "b": how}, classes, 1.0)
                np.testing.assert_array_equal(parts[:], whole)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.thorough
def test_neither_an_image_nor_its_label_map_is_held(tmp_path):
    """All that predict does but the network, of which test_stream.py has the memory."""
    weights = tmp_path / "weights"
    Fitted(("MR",), (1, 1, 1), ({"scheme": "zscore"},), {"background": 0, "ball": 1}, None, (16, 16, 16)).save(weights / "fitted.json")
    kwargs = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "size": "tiny"}
    networks.save(weights, networks.build("medssm_unet", **kwargs), networks.describe("medssm_unet", kwargs))
    postprocess.save(weights / "postprocessing.json", {"ball": {"fill_holes": True, "largest_component": True}}, {})
    for rows in (16, 32, 128):
        x, y, z = (np.abs(np.linspace(-1, 1, size, dtype=np.float32)) for size in (rows, 256, 256))
        radius = x[:, None, None] + y[:, None] + z
        shell = (radius > 0.3) & (radius < 0.9)
        shell[5:8, 5:8, 5:8] = True  # goes as a part, and the hole is filled
        write(tmp_path / f"{rows}.nii", shell.view(np.uint8), np.array([[0, 0, -1, 9], [-1, 0, 0, 2], [0, 1, 0, 3], [0, 0, 0, 1.0]]))
    code = """
import pathlib, sys, torch
from medssm.segment import predict
folder, peaks = pathlib.Path(sys.argv[1]), []

def found(network, image, fitted, scratch, **options):
    sums = scratch.store(image.shape[0], 2, *image.shape[2:])
    for rows in sums.slabs():
        sums[rows] = torch.cat([0.5 - image[rows], image[rows]], 1)
    return sums

predict.machine.free_memory = lambda: 10_000_000
predict.streamed_probabilities = found
for rows in (16, 32, 128):
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    predict.predict(folder / "weights", folder / f"{rows}.nii", folder / "out" / f"{rows}.nii", stream=True, quiet=True)
    peaks.append(1024 * int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]))
print(peaks[2] - peaks[1])
"""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000"}  # what is freed goes back at once
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) < 0.5 * 96 * 256**2, done.stdout  # a label map has 1 byte a voxel, an image 4
    labels = np.asarray(nib.load(tmp_path / "out" / "128.nii").dataobj)
    np.testing.assert_array_equal(labels, radius < 0.9)
