"""What a command finds out, chooses or cannot do is said, in one line each: files that are not what they seem, plans, sizes, classes."""

import gzip
import json
import logging

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from medssm import cli
from medssm.errors import UserError
from medssm.segment import predict as module
from medssm.segment.data import load_dataset
from medssm.segment.images import open_image, read_image
from medssm.segment.images.formats import kind_of
from medssm.segment.predict import predict
from medssm.segment.train import train
from tests.segment.synthetic import UNET, nnunet_folder, volume, write
from tests.segment.test_train_input import read

SHAPE = (20, 18, 16)
FAST = {"model": "monai.networks.nets.UNet", "model_kwargs": UNET, "patch": (16, 16, 16), "max_steps": 2, "device": "cpu"}


@pytest.fixture
def only(trained):
    return trained / "fold_0"


# -- files that are not what their names say


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize(("name", "layers"), [("a.nii", 1), ("a.nii.gz", 0), ("a.nii.gz", 2), ("a.nii", 2)])
def test_a_name_that_does_not_fit_the_compression_is_read_and_said(tmp_path, caplog, kind, name, layers):
    image = kind(np.arange(24, dtype=np.int16).reshape(4, 3, 2), np.diag([1, 2, 3, 1]))
    image.header.set_xyzt_units("mm")
    data = image.to_bytes()
    for _ in range(layers):
        data = gzip.compress(data)
    (tmp_path / name).write_bytes(data)
    with caplog.at_level(logging.WARNING, "medssm"):
        found = open_image(tmp_path / name)
    np.testing.assert_array_equal(found.voxels()[0], np.arange(24).reshape(4, 3, 2))
    np.testing.assert_array_equal(found.affine, image.affine)
    assert " in ".join(["NIfTI", *["gzip"] * layers]) in caplog.text and "which its name does not say" in caplog.text


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\0" * 128 + b"DICM" + b"\0" * 300, "DICOM"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 400, "PNG"),
        (b"NRRD0004\n" + b" " * 400, "NRRD"),
        (b"ObjectType = Image\n" + b" " * 400, "MetaImage"),
        (gzip.compress(b"NRRD0004\n" + b" " * 400, mtime=0), "NRRD"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS, not the file itself"),
        (b"<!DOCTYPE html>" + b" " * 400, "XML or HTML"),
    ],
    ids=["DICOM", "PNG", "NRRD", "MetaImage", "compressed NRRD", "LFS", "HTML"],
)
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_another_format_is_named(tmp_path, data, what, name):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}: not a readable NIfTI file: its content is {what} \("):
        open_image(tmp_path / name)


def test_bytes_of_no_format(tmp_path):
    assert kind_of(b"\1\2\3" * 200) is None and kind_of(b"") is None
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(b"\1\2\3" * 200)[:-8])
    with pytest.raises(UserError, match=r"a\.nii\.gz: not a readable NIfTI file"):
        open_image(tmp_path / "a.nii.gz")


# -- voxels that are not finite


def test_voxels_that_are_not_finite_are_refused_or_filled(tmp_path):
    data = np.ones((4, 3, 2), np.float32)
    data[0, 0, 0], data[1, 1, 1] = np.nan, -np.inf
    path = write(tmp_path / "a.nii.gz", data)
    with pytest.raises(UserError, match=r"2 voxel\(s\) are not finite \(NaN or infinite\): --nan VALUE"):
        read_image([path])
    filled, _ = read_image([path], nan=-5.0)
    assert filled[0, 0, 0, 0] == filled[0, 1, 1, 1] == -5 and filled.sum() == 22 - 10


def test_training_and_prediction_fill_them(tmp_path):
    def spoil(seed, image, label):
        image[0, 0, 0] = np.nan
        return image, label

    folder = nnunet_folder(tmp_path / "data", cases=2, shape=SHAPE, edit=spoil)
    with pytest.raises(UserError, match="not finite"):
        train(folder, tmp_path / "run", quiet=True, **FAST)
    train(folder, tmp_path / "run", quiet=True, nan=0.0, overwrite=True, **FAST)
    scan = folder / "imagesTr" / "case_0_0000.nii.gz"
    with pytest.raises(UserError, match="not finite"):
        predict(tmp_path / "run", scan, tmp_path / "a.nii.gz", device="cpu", quiet=True)
    predict(tmp_path / "run", scan, tmp_path / "a.nii.gz", device="cpu", nan=0.0, quiet=True)


# -- sizes


def test_a_scan_in_another_unit_is_refused_before_it_is_resampled(only, tmp_path):
    scan = write(tmp_path / "a.nii.gz", volume(7)[0][..., 0], np.diag([1e-3, 1e-3, 1e-3, 1]))
    with pytest.raises(UserError, match=r"a.nii.gz: voxels of 0.001 x 0.001 x 0.001 mm, where the network was trained at 1 x 1 x 1 mm: a wrong unit"):
        predict(only, scan, tmp_path / "out.nii.gz", device="cpu", quiet=True)


def test_a_scan_that_memory_cannot_hold_is_refused_and_the_others_go_on(only, tmp_path, monkeypatch, capsys):
    scan = volume(7, (80, 72, 64))[0][..., 0]
    write(tmp_path / "scans" / "small.nii.gz", volume(8)[0][..., 0])
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(scan.T), tmp_path / "scans" / "large.nrrd")
    monkeypatch.setattr(module.machine, "free_memory", lambda: 1_000_000)
    assert cli.main(["predict", str(only), str(tmp_path / "scans"), str(tmp_path / "out"), "--device", "cpu"]) == 1
    assert "large.nrrd: NRRD is read as a whole, which needs 0.0 GiB of memory, 0.0 are free: save it as .nii" in capsys.readouterr().err
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["small.nii.gz", "volumes.csv"]


def test_an_image_of_one_value_is_refused(only, tmp_path):
    scan = write(tmp_path / "a.nii.gz", np.full(SHAPE, 3, np.float32))
    with pytest.raises(UserError, match=r"a.nii.gz: every voxel of the image is 3"):
        predict(only, scan, tmp_path / "out.nii.gz", device="cpu", quiet=True)


# -- classes


def test_two_classes_of_one_value_are_an_error(tmp_path):
    folder = nnunet_folder(tmp_path, cases=1, shape=SHAPE, labels={"background": 0, "ball": 1, "box": 1, "other": 2})
    with pytest.raises(UserError, match=r"dataset.json: labels: ball and box have one value, 1"):
        load_dataset(folder)


def test_a_class_that_no_case_has_is_said(tmp_path, capsys):
    folder = nnunet_folder(tmp_path, cases=2, shape=SHAPE, labels={"background": 0, "ball": 1, "box": 2, "ghost": 3})
    read(folder, quiet=False)
    assert "classes: no training case has ghost" in capsys.readouterr().err.splitlines()


# -- what train says


def test_the_start_says_what_was_found_and_chosen(tmp_path, capsys):
    folder = nnunet_folder(tmp_path / "data", cases=4, shape=SHAPE, labels={"background": 0, "lkid": 1, "rkid": 2})
    train(folder, tmp_path / "run", fold=0, folds=4, mirror="swap", precision="32-true", **FAST)
    said = capsys.readouterr().err
    for line in (
        "device:      cpu, 1 process(es), 32-true",
        "cases:       3 to train on, 1 held out, validated 4 times",
        "classes:     background 0, lkid 1, rkid 2",
        "intensities: MR by its own mean and deviation",
        "spacing:     1 x 1 x 1 mm",
        "patch:       16 x 16 x 16 voxels, 2 in a step",
        "mirrored:    left-right; lkid and rkid change places",
        "budget:      2 steps",
    ):
        assert line in said.splitlines(), line
    train(folder, tmp_path / "all", **FAST)
    assert "cases:       4 to train on, no validation" in capsys.readouterr().err.splitlines()


def test_resuming_what_is_finished_says_so(tmp_path, capsys):
    folder = nnunet_folder(tmp_path / "data", cases=2, shape=SHAPE)
    train(folder, tmp_path / "run", **FAST)
    capsys.readouterr()
    assert train(folder, tmp_path / "run", resume=True, **FAST)["steps"] == 2
    assert capsys.readouterr().err == f"nothing was trained: {tmp_path / 'run'} has a finished training of 2 steps\n"
    assert train(folder, tmp_path / "run", resume=True, **{**FAST, "max_steps": 5})["steps"] == 2
    assert "of 2 steps: its optimizer is gone, so more steps need a training anew (--overwrite)" in capsys.readouterr().err
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match=r"resume: .* has weights, but metrics\.jsonl says nothing of the end of their training"):
        train(folder, tmp_path / "run", resume=True, **FAST)


def test_size_and_mixer_are_options(tmp_path):
    folder = nnunet_folder(tmp_path / "data", cases=2, shape=SHAPE)
    words = ["--patch", "16", "16", "16", "--max-steps", "1", "--device", "cpu", "--quiet", "--size", "tiny", "--mixer", "gla"]
    assert cli.main(["train", str(folder), str(tmp_path / "run"), *words]) == 0
    kwargs = json.loads((tmp_path / "run" / "config.json").read_text())["kwargs"]
    assert (kwargs["size"], kwargs["mixer"]) == ("tiny", "gla")


def test_an_error_of_the_system_is_one_line(capsys, monkeypatch):
    from medssm import doctor

    def refuse() -> dict:
        """Refuses."""
        raise PermissionError(13, "Permission denied", "/somewhere")

    monkeypatch.setattr(doctor, "doctor", refuse)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "medssm doctor: /somewhere: Permission denied\n"
