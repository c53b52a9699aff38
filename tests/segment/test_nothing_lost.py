"""No command writes over what it reads, or over a file of other origin; one bad case does not end the others."""

import hashlib
import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from medssm import cli
from medssm.errors import UserError
from medssm.segment import predict as module
from medssm.segment import runs
from medssm.segment.evaluate import evaluate
from medssm.segment.images import is_made_here
from medssm.segment.predict import predict
from medssm.segment.train import train
from tests.segment.synthetic import nnunet_folder, volume, write


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def only(trained):
    return trained / "fold_0"


@pytest.fixture
def scan(tmp_path):
    return write(tmp_path / "scans" / "scan.nii.gz", volume(7)[0][..., 0])


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("out", ["the folder", "the file", "another name of it", "a link to it"])
def test_a_scan_is_never_replaced_by_its_label_map(only, scan, tmp_path, out, overwrite):
    before = digest(scan)
    (tmp_path / "link.nii.gz").symlink_to(scan)
    target = {
        "the folder": scan.parent,
        "the file": scan,
        "another name of it": scan.parent / ".." / "scans" / "scan.nii.gz",
        "a link to it": tmp_path / "link.nii.gz",
    }[out]
    with pytest.raises(UserError, match=r"out: .*\.nii\.gz is a file that is read; name another one"):
        predict(only, scan, target, device="cpu", overwrite=overwrite, quiet=True)
    assert digest(scan) == before and len(list(scan.parent.iterdir())) == 1


def test_a_folder_of_scans_is_not_its_own_output(only, scan):
    other = write(scan.parent / "other.nii.gz", volume(8)[0][..., 0])
    before = [digest(scan), digest(other)]
    with pytest.raises(UserError, match="is a file that is read"):
        predict(only, scan.parent, scan.parent, device="cpu", overwrite=True, quiet=True)
    assert [digest(scan), digest(other)] == before


def test_a_file_of_other_origin_needs_overwrite_and_our_own_does_not(only, scan, tmp_path):
    theirs = write(tmp_path / "out" / "scan.nii.gz", np.ones((3, 3, 3), np.uint8))
    before = digest(theirs)
    with pytest.raises(UserError, match=r"out: .*out/scan.nii.gz is there already, and this command did not write it: .* --overwrite"):
        predict(only, scan, tmp_path / "out", device="cpu", quiet=True)
    assert digest(theirs) == before
    predict(only, scan, tmp_path / "out", device="cpu", overwrite=True, quiet=True)
    assert is_made_here(theirs) and nib.load(theirs).shape == (40, 36, 32)
    predict(only, scan, tmp_path / "out", device="cpu", quiet=True)


def test_probabilities_are_protected_too(only, scan, tmp_path):
    theirs = write(tmp_path / "out" / "scan_probabilities.nii.gz", np.ones((3, 3, 3), np.uint8))
    with pytest.raises(UserError, match=r"scan_probabilities\.nii\.gz is there already"):
        predict(only, scan, tmp_path / "out", device="cpu", save_probabilities=True, quiet=True)
    assert not is_made_here(theirs) and not (tmp_path / "out" / "scan.nii.gz").exists()


def test_cases_that_are_there_are_skipped_when_asked(only, scan, tmp_path):
    write(scan.parent / "other.nii.gz", volume(8)[0][..., 0])
    predict(only, scan, tmp_path / "out", device="cpu", quiet=True)
    first = (tmp_path / "out" / "scan.nii.gz").stat().st_mtime_ns
    result = predict(only, scan.parent, tmp_path / "out", device="cpu", skip_existing=True, quiet=True)
    assert list(result["cases"]) == ["other"] and result["skipped"] == ["scan"] and not result["failed"]
    assert (tmp_path / "out" / "scan.nii.gz").stat().st_mtime_ns == first


@pytest.mark.parametrize("error", [MemoryError("no memory"), OSError("input/output error"), RuntimeError("not enough memory: you tried to allocate")])
def test_whatever_fails_in_one_case_does_not_end_the_others(only, scan, tmp_path, monkeypatch, capsys, error):
    write(scan.parent / "a_bad_one.nii.gz", volume(8)[0][..., 0])
    real = module.read_stored

    def read(files, nan, stores):
        if "a_bad_one" in str(files[0].path):
            raise error
        return real(files, nan, stores)

    monkeypatch.setattr(module, "read_stored", read)
    status = cli.main(["predict", str(only), str(scan.parent), str(tmp_path / "out"), "--device", "cpu"])
    said = capsys.readouterr()
    assert status == 1 and (tmp_path / "out" / "scan.nii.gz").exists()
    assert f"a_bad_one.nii.gz: {type(error).__name__}: {error}" in said.err and "1 case(s) in" in said.out and ", 1 failed" in said.out


@pytest.mark.parametrize("name", ["labels.bmp", "labels.npz", "labels.mgz"])
def test_another_format_is_no_folder(only, scan, tmp_path, name):
    with pytest.raises(UserError, match=r"out: expected a file that ends in \.nii\.gz, .*, or a folder, got .*labels"):
        predict(only, scan, tmp_path / name, device="cpu", quiet=True)
    assert not (tmp_path / name).exists()


# -- evaluate


@pytest.fixture
def pairs(tmp_path):
    for name in ("a", "b"):
        label = volume(7, (12, 10, 8))[1]
        write(tmp_path / "found" / f"{name}.nii.gz", label)
        write(tmp_path / "truth" / f"{name}.nii.gz", label)
    return tmp_path


@pytest.mark.parametrize("option", ["json_file", "csv_file"])
def test_a_result_is_not_written_over_what_is_read(pairs, option):
    reference = pairs / "truth" / "a.nii.gz"
    before = digest(reference)
    with pytest.raises(UserError, match=rf"{option}: .*truth/a.nii.gz is a file that is read"):
        evaluate(pairs / "found", pairs / "truth", **{option: reference}, overwrite=True, quiet=True)
    table = pairs / "dataset.json"
    table.write_text(json.dumps({"labels": {"background": 0, "ball": 1, "box": 2}}))
    with pytest.raises(UserError, match=rf"{option}: .*dataset.json is a file that is read"):
        evaluate(pairs / "found", pairs / "truth", classes=table, **{option: table}, overwrite=True, quiet=True)
    assert digest(reference) == before


@pytest.mark.parametrize("option", ["json_file", "csv_file"])
def test_a_result_is_written_over_a_result_and_nothing_else(pairs, option):
    file = pairs / "result"
    evaluate(pairs / "found", pairs / "truth", **{option: file}, quiet=True)
    evaluate(pairs / "found", pairs / "truth", **{option: file}, quiet=True)
    file.write_text('{"mine": 1}')
    with pytest.raises(UserError, match=rf"{option}: .*result is there already"):
        evaluate(pairs / "found", pairs / "truth", **{option: file}, quiet=True)
    assert file.read_text() == '{"mine": 1}'
    evaluate(pairs / "found", pairs / "truth", **{option: file}, overwrite=True, quiet=True)
    assert file.read_text() != '{"mine": 1}'


def test_one_pair_that_does_not_fit_leaves_the_others(pairs, capsys):
    write(pairs / "found" / "b.nii.gz", np.zeros((3, 3, 3), np.uint8))
    write(pairs / "truth" / "c.nii.gz", np.zeros((3, 3, 3), np.uint8))
    assert cli.main(["evaluate", str(pairs / "found"), str(pairs / "truth"), "--json"]) == 1
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert list(result["cases"]) == ["a"] and sorted(result["failed"]) == ["b", "c"] and result["patients"] == 1
    assert "no prediction for c" in said.err and "b.nii.gz: not on the grid of" in said.err and result["mean"]["dice"]["mean"] == 1


def test_nothing_to_compare_is_an_error(pairs):
    shutil.rmtree(pairs / "found")
    write(pairs / "found" / "a.nii.gz", np.zeros((3, 3, 3), np.uint8))
    with pytest.raises(UserError, match=r"no prediction for b"):
        evaluate(pairs / "found", pairs / "truth", quiet=True)


def test_two_files_of_one_name_are_named(pairs):
    write(pairs / "found" / "a.nii", np.zeros((12, 10, 8), np.uint8))
    with pytest.raises(UserError, match=r"a\.nii.* and .*a\.nii.*: two files for the case a"):
        evaluate(pairs / "found", pairs / "truth", quiet=True)


@pytest.mark.parametrize("name", ["report.html", "cases.json", "conformal.json", "config.json", "metrics.jsonl", "model_best.safetensors"])
def test_a_training_takes_no_file_of_other_origin(tmp_path, name):
    data = nnunet_folder(tmp_path / "data", cases=1, shape=(16, 16, 16))
    theirs = tmp_path / "out" / name
    theirs.parent.mkdir()
    theirs.write_text("theirs")
    with pytest.raises(UserError, match=rf"out: .*{name} is there already, and this command did not write it: name another one, or pass --overwrite"):
        train(data, theirs.parent, max_steps=1, device="cpu", quiet=True)
    assert [file.read_text() for file in theirs.parent.iterdir()] == ["theirs"]
    asked = {"reads": (data,), "written": ("conformal.json",), "resume": False, "overwrite": False, "max_steps": 1, "quiet": True}
    runs.finished(theirs.parent, **(asked | {"overwrite": True}))
    runs.save_arguments(theirs.parent / "train.yaml", {"max_steps": 1})  # as of a training that was killed early
    runs.finished(theirs.parent, **asked)


@pytest.mark.parametrize("option", ["overwrite", "resume"])
def test_a_training_never_writes_over_its_datalist(tmp_path, option):
    listed = tmp_path / "out" / "cases.json"
    listed.parent.mkdir()
    listed.write_text("{}")
    with pytest.raises(UserError, match=r"out: .*cases\.json is a file that is read; name another one"):
        train(listed, listed.parent, max_steps=1, device="cpu", quiet=True, **{option: True})
    assert listed.read_text() == "{}"
