"""What cannot be predicted is one line, and no file is lost."""

import gzip
import json
import logging

import nibabel as nib
import numpy as np
import pytest

from medssm_runtime import UserError, load, predict
from medssm_runtime.__main__ import main
from medssm_runtime.settings import parse
from tests.runtime.runs import write_onnx, write_run
from tests.segment.synthetic import volume, write

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return write_onnx(write_run(folder / "run"), folder / "model.onnx")


@pytest.fixture
def scan(tmp_path):
    return write(tmp_path / "scan.nii.gz", volume(0, (18, 17, 16))[0][..., 0])


def with_metadata(model, path, edit):
    """The file with other metadata; `edit` gets the table, or gives a text."""
    found = onnx.load(model)
    table = json.loads(next(entry.value for entry in found.metadata_props if entry.key == "medssm"))
    changed = edit(table)
    onnx.helper.set_model_props(found, {} if changed is None else {"medssm": changed if isinstance(changed, str) else json.dumps(changed)})
    onnx.save(found, path)
    return path


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda table: None, "nothing in it says how a scan is prepared: expected a file of medssm export"),
        (lambda table: "{", "its metadata 'medssm' are damaged: expected a JSON object with the entry schema"),
        (lambda table: "[1]", "its metadata 'medssm' are damaged: expected a JSON object with the entry schema"),
        (lambda table: table | {"schema": 2}, "its metadata have the schema 2, this medssm_runtime reads 1: install the version"),
        (lambda table: {k: v for k, v in table.items() if k != "patch"}, "its metadata 'medssm' are damaged: no entry 'patch'"),
        (lambda table: table | {"patch": [16, 16]}, "its metadata 'medssm' are damaged: patch: unexpected [16, 16]"),
        (lambda table: table | {"channels": [{"name": "CT", "scheme": "new"}]}, "its metadata 'medssm' are damaged: channels: unexpected"),
        (lambda table: table | {"channels": [{"name": "CT", "scheme": "ct"}]}, "its metadata 'medssm' are damaged: no entry 'low'"),
        (lambda table: table | {"postprocessing": {"ball": {"new_step": True}}}, "its metadata 'medssm' are damaged: postprocessing: unexpected"),
        (lambda table: table | {"spacing": [1.0, -1.0, 1.0]}, "its metadata 'medssm' are damaged: spacing: unexpected"),
    ],
)
def test_metadata_that_cannot_be_read(model, tmp_path, edit, said):
    path = with_metadata(model, tmp_path / "model.onnx", edit)
    with pytest.raises(UserError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: {said}") and "\n" not in str(error.value)


def test_files_that_are_no_network(model, tmp_path):
    for name, content in (("empty.onnx", b""), ("text.onnx", b"not a network at all"), ("cut.onnx", model.read_bytes()[:500])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: not an ONNX file, or cut short"):
            load(tmp_path / name)
    for name, said in (("none.onnx", "no such file"), ("model.pt", r"expected a file that ends in \.onnx or \.xml")):
        (tmp_path / "model.pt").touch()
        with pytest.raises(UserError, match=said):
            load(tmp_path / name)


def test_metadata_are_those_that_onnx_reads(model):
    from medssm_runtime import onnx_file

    expected = {entry.key: entry.value for entry in onnx.load(model).metadata_props}
    assert {key: onnx_file.metadata(model, key) for key in expected} == expected
    assert onnx_file.metadata(model, "absent") is None
    assert parse(expected["medssm"], model).patch == (16, 16, 16)


def refused(model, scans, out, **options):
    with pytest.raises(UserError) as error:
        predict(model, scans, out, quiet=True, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_scans_that_are_refused(model, tmp_path, scan):
    image = volume(0, (18, 17, 16))[0][..., 0]
    nan = image.copy()
    nan[0, 0, 0] = np.nan
    out = tmp_path / "labels.nii.gz"
    bad = {
        "2 voxel(s) are not finite": write(tmp_path / "nan.nii.gz", np.concatenate([nan, nan])),
        "every voxel of the image is 3": write(tmp_path / "flat.nii.gz", np.full((16, 16, 16), 3, np.float32)),
        "expected 1 channel(s), got 2": write(tmp_path / "two.nii.gz", np.stack([image, image], -1)),
        "a wrong unit in the header": write(tmp_path / "far.nii.gz", image, np.diag([100, 100, 100, 1.0])),
        "the affine cannot be inverted": tmp_path / "affine.nii.gz",
        "truncated or corrupt": tmp_path / "cut.nii.gz",
        "not a readable NIfTI file": tmp_path / "text.nii.gz",
        "expected numbers, got voxels of the type complex64": write(tmp_path / "complex.nii.gz", image.astype(np.complex64)),
        "no such file or folder": tmp_path / "none.nii.gz",
        "expected a NIfTI file (.nii.gz, .nii); medssm predict reads other formats": tmp_path / "scan.nrrd",
    }
    nib.save(nib.Nifti1Image(image, np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])), tmp_path / "affine.nii.gz")
    (tmp_path / "cut.nii.gz").write_bytes(scan.read_bytes()[:3000])
    (tmp_path / "text.nii.gz").write_text("text")
    (tmp_path / "scan.nrrd").touch()
    for said, path in bad.items():
        assert said in refused(model, path, out) and not out.exists(), said
    assert not list(tmp_path.glob(".partial*"))
    assert refused(model, tmp_path / "text.nii.gz", out).startswith(f"{tmp_path / 'text.nii.gz'}: ")


def test_nibabel_says_nothing_while_it_reads_and_what_it_likes_afterwards(model, scan, tmp_path, caplog):
    content = bytearray(gzip.decompress(scan.read_bytes()))
    content[80:84] = np.float32(-1).tobytes()  # a size of voxels below 0
    scan.write_bytes(gzip.compress(bytes(content)))
    nib.load(scan)
    assert len(caplog.messages) == 1 and "pixdim" in caplog.messages[0]
    caplog.clear()
    predict(model, scan, tmp_path / "labels.nii.gz")
    assert caplog.messages == []
    logging.getLogger("nibabel.global").error("afterwards")
    assert caplog.messages == ["afterwards"]


def test_channels_on_different_grids_or_missing(tmp_path):
    model = write_onnx(write_run(tmp_path / "run", channels=("T1", "T2")), tmp_path / "model.onnx")
    image = volume(0, (18, 17, 16))[0][..., 0]
    first = write(tmp_path / "a" / "case_0000.nii.gz", image)
    assert "case_0001.nii.gz: no such file" in refused(model, first, tmp_path / "out")
    write(tmp_path / "a" / "case_0001.nii.gz", image, np.diag([1, 1, 1.2, 1]))
    assert "case_0001.nii.gz: not on the grid of" in refused(model, tmp_path / "a", tmp_path / "out")
    # All channels in one file: its ending is no channel's number.
    both = write(tmp_path / "b" / "case_0001.nii.gz", np.stack([image, image[::-1]], -1))
    assert list(predict(model, both, tmp_path / "out", quiet=True)["cases"]) == ["case_0001"]


def test_no_file_is_lost(model, tmp_path, scan):
    before = scan.read_bytes()
    assert "is a file that is read" in refused(model, scan, scan, overwrite=True)
    other = write(tmp_path / "out" / "scan.nii.gz", np.zeros((3, 3, 3), np.uint8))
    kept = other.read_bytes()
    assert "medssm did not write it" in refused(model, scan, tmp_path / "out")
    assert scan.read_bytes() == before and other.read_bytes() == kept
    predict(model, scan, tmp_path / "out", overwrite=True, quiet=True)
    assert predict(model, scan, tmp_path / "out", quiet=True)["cases"]  # its own file
    assert predict(model, scan, tmp_path / "at_1.5mm", quiet=True)["cases"] == {"scan": str(tmp_path / "at_1.5mm" / "scan.nii.gz")}
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(model, scan, tmp_path / "file" / "labels.nii.gz")
    assert "expected a file that ends in .nii.gz or .nii, or a folder" in refused(model, scan, tmp_path / "labels.nrrd")


def test_a_folder_keeps_its_places_and_one_bad_scan_stops_no_other(model, tmp_path, scan, capsys):
    image = volume(1, (18, 17, 16))[0][..., 0]
    for name in ("a/one_0000.nii.gz", "a/b/one.nii", "two.nii.gz", ".hidden/three.nii.gz"):
        write(tmp_path / "in" / name, image)
    (tmp_path / "in" / "bad.nii.gz").write_text("text")
    assert main([str(model), str(tmp_path / "in"), str(tmp_path / "in" / "out"), "--json"]) == 1
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert set(result["cases"]) == {"a/one", "a/b/one", "two"} and set(result["failed"]) == {"bad"}
    assert (tmp_path / "in" / "out" / "a" / "b" / "one.nii.gz").is_file() and "not a readable NIfTI file" in err
    assert main([str(model), str(tmp_path / "in" / "a"), str(tmp_path / "in" / "two.nii.gz"), str(tmp_path / "more"), "--quiet"]) == 0
    there = sorted(path.relative_to(tmp_path / "more").as_posix() for path in (tmp_path / "more").rglob("*.nii.gz"))
    assert there == ["b/one.nii.gz", "one.nii.gz", "two.nii.gz"]
    assert "expected a folder for 3 case(s)" in refused(model, [tmp_path / "in" / "a", tmp_path / "in" / "two.nii.gz"], tmp_path / "one.nii.gz")
    assert "two files for the case scan" in refused(model, [scan, write(tmp_path / "other" / "scan.nii", image)], tmp_path / "more")


def test_options_out_of_range(model, tmp_path, scan, capsys):
    assert "overlap: expected 0 to less than 1, got 1.0" in refused(model, scan, tmp_path / "o", overlap=1.0)
    assert "threads: expected 1 or more, got 0" in refused(model, scan, tmp_path / "o", threads=0)
    assert main([str(model), str(tmp_path / "none.nii.gz"), str(tmp_path / "o")]) == 2
    assert capsys.readouterr().err == f"medssm_runtime: {tmp_path / 'none.nii.gz'}: no such file or folder\n"


def test_a_plane_and_units_of_metres(tmp_path):
    model = write_onnx(write_run(tmp_path / "run", patch=(16, 16), slice_axis=2, spacing=(1.0, 1.0, 0.0)), tmp_path / "model.onnx")
    plane = volume(2, (20, 18, 8))[0][:, :, 4, 0]
    file = nib.Nifti1Image(plane, np.diag([0.001, 0.001, 0.001, 1]))
    file.header.set_xyzt_units("meter")
    nib.save(file, tmp_path / "plane.nii.gz")
    predict(model, tmp_path / "plane.nii.gz", tmp_path / "labels.nii.gz", quiet=True)
    labels = nib.load(tmp_path / "labels.nii.gz")
    assert labels.shape == (20, 18) and labels.header.get_xyzt_units()[0] == "meter"
