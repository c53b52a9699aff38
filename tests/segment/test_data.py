"""Data sets on disk: both layouts, folds, and one clear line for each bad file."""

import json

import nibabel as nib
import numpy as np
import pytest

from medssm.errors import UserError
from medssm.segment.cases import cases_in
from medssm.segment.data import load_classes, load_dataset, split
from medssm.segment.images import different_grid, nifti, read_image, read_label, write_image
from tests.segment.synthetic import nnunet_folder, volume, write

SMALL = (12, 10, 8)


@pytest.fixture
def folder(tmp_path):
    return nnunet_folder(tmp_path / "data", cases=5, shape=SMALL)


def datalist(root, table) -> str:
    (root / "list.json").write_text(json.dumps(table))
    return root / "list.json"


def listed(folder, i, **more):
    return {"image": f"imagesTr/case_{i}_0000.nii.gz", "label": f"labelsTr/case_{i}.nii.gz", **more}


def test_nnunet_folder(folder):
    table = load_dataset(folder)
    assert table.channels == ("MR",) and table.classes == {"background": 0, "ball": 1, "box": 2} and table.ignore is None
    assert [case.name for case in table.cases] == [f"case_{i}" for i in range(5)]
    assert table.cases[2].images == (folder / "imagesTr/case_2_0000.nii.gz",)


def test_the_older_dataset_json_reads_the_same(folder):
    (folder / "dataset.json").write_text(json.dumps({"modality": {"0": "MR"}, "labels": {"0": "background", "1": "ball", "2": "box"}}))
    assert load_dataset(folder).classes == {"background": 0, "ball": 1, "box": 2}


def test_datalist_with_folds_and_without_class_names(folder):
    path = datalist(folder, {"training": [listed(folder, i, fold=i % 2) for i in range(4)]})
    table = load_dataset(path)
    assert table.classes == {"background": 0, "class_1": 1, "class_2": 2} and table.channels == ("channel_0",)
    training, validation = split(table, 1)
    assert [case.name for case in training] == ["case_0", "case_2"] and [case.name for case in validation] == ["case_1", "case_3"]


def test_a_datalists_validation_section_is_never_trained_on(folder):
    table = load_dataset(datalist(folder, {"training": [listed(folder, i) for i in range(4)], "validation": [listed(folder, 4)]}))
    training, validation = split(table, None)
    assert len(training) == 4 and [case.name for case in validation] == ["case_4"]
    assert all(case.name != "case_4" for part in split(table, 0, folds=2) for case in part)


def test_cases_of_one_file_name_are_told_apart(folder):
    for subject in ("sub-01", "sub-02"):
        image, label = volume(0, SMALL)
        write(folder / subject / "t1.nii.gz", image[..., 0])
        write(folder / subject / "seg.nii.gz", label)
    entries = [{"image": f"{subject}/t1.nii.gz", "label": f"{subject}/seg.nii.gz"} for subject in ("sub-01", "sub-02")]
    assert len({case.name for case in load_dataset(datalist(folder, {"training": entries})).cases}) == 2


def test_folds_are_a_partition(folder):
    table = load_dataset(folder)
    parts = [split(table, fold, folds=3, seed=4) for fold in range(3)]
    assert sorted(case.name for _, validation in parts for case in validation) == [f"case_{i}" for i in range(5)]
    assert all(not set(training) & set(validation) for training, validation in parts)


def test_folds_from_nnunets_file(folder):
    splits = [{"train": ["case_0", "case_1"], "val": ["case_3"]}]
    (folder / "splits_final.json").write_text(json.dumps(splits))
    training, validation = split(load_dataset(folder), 0, splits=folder / "splits_final.json")
    assert [case.name for case in training] == ["case_0", "case_1"] and [case.name for case in validation] == ["case_3"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"train": ["case_0", "case_9"], "val": ["case_3"]}, "lacks: case_9"),
        ({"train": ["case_0", "case_3"], "val": ["case_3"]}, "its own validation cases: case_3"),
    ],
)
def test_bad_split_files(folder, entry, message):
    (folder / "splits_final.json").write_text(json.dumps([entry]))
    with pytest.raises(UserError, match=message):
        split(load_dataset(folder), 0, splits=folder / "splits_final.json")


def test_a_fold_that_does_not_exist(folder):
    with pytest.raises(UserError, match=r"fold: expected one of \[0, 1, 2\], got 3"):
        split(load_dataset(folder), 3, folds=3)


def test_every_bad_file_is_one_line(folder):
    (folder / "imagesTr/case_0_0000.nii.gz").unlink()
    (folder / "labelsTr/case_1.nii.gz").write_text("not a NIfTI")
    write(folder / "labelsTr/case_2.nii.gz", np.zeros((12, 10, 7), np.uint8))
    write(folder / "labelsTr/case_3.nii.gz", np.zeros(SMALL, np.uint8), np.diag([1, 1, 2, 1]))
    with pytest.raises(UserError) as error:
        load_dataset(folder)
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    wanted = (
        ("case_0_0000", "no such file"),
        ("case_1", "not a readable NIfTI"),
        ("case_2", "shape (12, 10, 7), expected (12, 10, 8)"),
        ("case_3", "the affine puts a corner 7 mm away"),
    )
    assert all(name in line and reason in line for line, (name, reason) in zip(lines, wanted, strict=True))


def test_a_missing_channel(tmp_path):
    folder = nnunet_folder(tmp_path, cases=2, shape=SMALL, channels=("T1", "T2"))
    (folder / "imagesTr/case_1_0001.nii.gz").unlink()
    with pytest.raises(UserError, match=r"case_1_0001\.nii\.gz: no such file"):
        load_dataset(folder)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"labels": {"background": 0, "tumour": [1, 2]}, "channel_names": {"0": "MR"}},
            r"regions_class_order: expected for each of tumour one of its values, .* got None",
        ),
        ({"labels": {"background": 0}, "channel_names": {"0": "MR"}, "file_ending": ".bmp"}, "file_ending: expected one of .nii.gz,"),
        ({"labels": {"background": 0}}, "channel_names: expected"),
        ([1], "expected a JSON object, got list"),
    ],
)
def test_bad_dataset_json(folder, table, message):
    (folder / "dataset.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=message):
        load_dataset(folder)


def test_no_dataset_json(tmp_path):
    with pytest.raises(UserError, match=r"dataset\.json: no such file"):
        load_dataset(tmp_path)


def test_truncated_file(folder):
    path = folder / "imagesTr/case_0_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"case_0_0000\.nii\.gz: truncated or corrupt"):
        read_image([path])


def test_truncated_uncompressed_file(tmp_path):
    path = write(tmp_path / "a.nii", np.zeros(SMALL, np.float32))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="truncated or corrupt"):
        read_image([path])


@pytest.mark.parametrize(
    ("data", "affine", "message"),
    [
        (np.full(SMALL, np.nan, np.float32), np.eye(4), "960 voxel.s. are not finite"),
        (np.zeros(SMALL, np.complex64), np.eye(4), "voxels of the type complex64"),
        (np.zeros((4, 4, 4, 2, 3), np.float32), np.eye(4), "expected 2 or 3 axes"),
        (np.zeros(SMALL, np.float32), np.diag([1, 1, 0, 1]), "affine cannot be inverted"),
    ],
)
def test_bad_images(tmp_path, data, affine, message):
    image = nib.Nifti1Image(data, None)
    image.header.set_sform(affine, code=1)
    nib.save(image, tmp_path / "a.nii.gz")
    with pytest.raises(UserError, match=message):
        read_image([tmp_path / "a.nii.gz"])


def test_a_label_must_hold_integers(tmp_path):
    data = np.zeros(SMALL, np.float32)
    data[3, 4, 5] = 1.5
    with pytest.raises(UserError, match=r"expected integers as labels, got values such as 1\.5"):
        read_label(write(tmp_path / "a.nii.gz", data))
    assert read_label(write(tmp_path / "b.nii.gz", data * 2))[0].max() == 3


def test_channels_on_a_fourth_axis(tmp_path):
    data = np.random.default_rng(0).normal(size=(*SMALL, 3)).astype(np.float32)
    image, _ = read_image([write(tmp_path / "a.nii.gz", data)], 3)
    np.testing.assert_array_equal(image, np.moveaxis(data, -1, 0))
    with pytest.raises(UserError, match=r"expected 2 channel\(s\), got 3"):
        read_image([tmp_path / "a.nii.gz"], 2)


def test_cases_to_predict(tmp_path):
    for name in ("a_0000", "a_0001", "b"):
        write(tmp_path / f"{name}.nii.gz", np.zeros(SMALL, np.float32))
    (tmp_path / "notes.txt").write_text("")
    cases = cases_in(tmp_path, 2)
    assert [(case.name, len(case.images)) for case in cases] == [("a", 2), ("b", 1)]
    assert cases_in(tmp_path / "a_0001.nii.gz", 2)[0].images == cases[0].images
    with pytest.raises(UserError, match="no such file or folder"):
        cases_in(tmp_path / "c.nii.gz", 1)


def test_classes_by_file(folder):
    (folder / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1, "ignore": 2}, "channel_names": {"0": "CT"}}))
    assert load_classes(folder) == ({"background": 0, "liver": 1}, 2)
    assert load_dataset(folder).ignore == 2


def test_lengths_are_millimetres_whatever_the_unit(tmp_path):
    image = nib.Nifti1Image(np.zeros(SMALL, np.float32), np.diag([500, 500, 2000, 1]))
    image.header.set_xyzt_units("micron")
    np.testing.assert_allclose(nifti.record(image).spacing, [0.5, 0.5, 2.0])


def test_rounding_in_an_affine_is_no_difference():
    image, other = (nifti.record(nib.Nifti1Image(np.zeros(SMALL, np.float32), np.diag([edge, 1, 1, 1]))) for edge in (1.0, 1.0 + 1e-4))
    assert different_grid(image, other) is None


@pytest.mark.parametrize("shape", [(7, 6), (7, 6, 5), (7, 6, 5, 2)])
def test_a_label_map_takes_the_geometry_of_its_image(tmp_path, shape):
    affine = np.array([[0, -1.5, 0.1, 7], [2.0, 0.1, 0, -3], [0, 0, 3.0, 11], [0, 0, 0, 1]])
    like = nib.Nifti1Image(np.zeros(shape, np.int16), affine)
    like.header.set_qform(affine, code=1, strip_shears=True)
    like.header.set_sform(affine, code=4)
    like.header.set_xyzt_units("mm", "sec")
    like.header.set_slope_inter(2.0, 10.0)
    label = np.arange(np.prod((*shape, 1)[:3])).reshape((*shape, 1)[:3]).astype(np.uint8)
    write_image(tmp_path / "a.nii.gz", label, nifti.record(like))
    back = nib.load(tmp_path / "a.nii.gz")
    assert back.shape == shape[:3] and back.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(back.dataobj).reshape(label.shape), label)
    np.testing.assert_allclose(back.affine, affine)
    assert (int(back.header["sform_code"]), int(back.header["qform_code"])) == (4, 1) and back.header.get_xyzt_units() == ("mm", "sec")
