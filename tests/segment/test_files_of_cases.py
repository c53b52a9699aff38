"""Values and boundaries of what reads data sets and NIfTI files; each test is one that a change of a condition or a default would fail."""

import json
import random
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medssm.errors import UserError
from medssm.segment.cases import Case, cases_in
from medssm.segment.data import Dataset, check_values, load_classes, load_dataset, split
from medssm.segment.images import (
    Image,
    different_grid,
    far_apart,
    image_files,
    nifti,
    open_image,
    ras_grid,
    read_image,
    read_label,
    strip_ending,
    write_image,
)
from tests.segment.synthetic import nnunet_folder, write

SHAPE = (5, 4, 3)
ZEROS = np.zeros(SHAPE, np.float32)


def described(folder: Path, **changes) -> Path:
    """nnU-Net's folder with other entries in dataset.json; None takes an entry out."""
    table = json.loads((folder / "dataset.json").read_text()) | changes
    (folder / "dataset.json").write_text(json.dumps({key: value for key, value in table.items() if value is not None}))
    return folder


def datalist(root: Path, **table) -> Path:
    (root / "list.json").write_text(json.dumps(table))
    return root / "list.json"


def pair(root: Path, name: str, image=ZEROS, label=None) -> dict[str, str]:
    write(root / f"{name}-image.nii.gz", image)
    write(root / f"{name}-label.nii.gz", np.zeros(SHAPE, np.uint8) if label is None else label)
    return {"image": f"{name}-image.nii.gz", "label": f"{name}-label.nii.gz"}


def table(*folds) -> Dataset:
    """A data set whose case i has the i-th fold; no file is read."""
    return Dataset("", (), {}, None, tuple(Case(f"case_{i}", (), None, fold) for i, fold in enumerate(folds)))


def names(cases) -> list[str]:
    return [case.name for case in cases]


# ---- data sets


def test_a_data_set_has_its_own_name_or_its_folders(tmp_path):
    folder = nnunet_folder(tmp_path / "liver", cases=1, shape=(8, 8, 8))
    assert load_dataset(folder).name == "liver"
    assert load_dataset(described(folder, name="Livers")).name == "Livers"


def test_channels_without_names_are_counted(tmp_path):
    several = [f"{i}.nii.gz" for i in range(2)]
    for file in several:
        write(tmp_path / file, ZEROS)
    entry = pair(tmp_path, "a", np.zeros((*SHAPE, 3), np.float32))
    assert load_dataset(datalist(tmp_path, training=[entry])).channels == ("channel_0", "channel_1", "channel_2")
    assert load_dataset(datalist(tmp_path, training=[{**entry, "image": several}])).channels == ("channel_0", "channel_1")
    assert load_dataset(datalist(tmp_path, training=[pair(tmp_path, "b")])).channels == ("channel_0",)


@pytest.mark.parametrize("axes", [(*SHAPE, 3), SHAPE])
def test_a_file_with_other_channels_than_named(tmp_path, axes):
    path = datalist(tmp_path, training=[pair(tmp_path, "a", np.zeros(axes, np.float32))], channel_names={"0": "T1", "1": "T2"})
    with pytest.raises(UserError, match=r"a-image.nii.gz: expected 2 channel\(s\), got [13]"):
        load_dataset(path)
    path = datalist(tmp_path, training=[pair(tmp_path, "b", np.zeros((*SHAPE, 2), np.float32))], channel_names={"0": "T1", "1": "T2"})
    assert load_dataset(path).channels == ("T1", "T2")


def test_every_channel_lies_on_the_first_ones_grid(tmp_path):
    folder = nnunet_folder(tmp_path, cases=1, shape=SHAPE, channels=("T1", "T2"))
    write(folder / "imagesTr" / "case_0_0001.nii.gz", ZEROS, np.diag([1, 1, 2, 1]))
    with pytest.raises(UserError, match=r"case_0_0001\.nii\.gz: not on the grid of .*case_0_0000"):
        load_dataset(folder)


def test_channels_are_in_the_order_of_their_numbers(tmp_path):
    folder = nnunet_folder(tmp_path, cases=1, shape=SHAPE, channels=[str(i) for i in range(11)])
    described(folder, channel_names={key: f"c{key}" for key in sorted(map(str, range(11)))}, modality={"0": "old"})
    assert load_dataset(folder).channels == tuple(f"c{i}" for i in range(11))


def test_classes_are_in_the_order_of_their_values_after_a_background(tmp_path):
    folder = nnunet_folder(tmp_path, cases=1, shape=SHAPE)
    assert list(load_dataset(described(folder, labels={"ball": 2, "box": 1})).classes.items()) == [("background", 0), ("box", 1), ("ball", 2)]
    assert load_dataset(described(folder, labels={"air": 0, "ball": 1})).classes == {"air": 0, "ball": 1}
    with pytest.raises(UserError, match=r"labels: expected \{name: value\} or \{value: name\}"):
        load_dataset(described(folder, labels={"ball": "one"}))


def test_classes_beside_a_network_are_the_networks(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "data": 1, "ignore": 3}}))
    assert load_classes(tmp_path) == load_classes(tmp_path / "dataset.json") == ({"background": 0, "data": 1}, 3)
    (tmp_path / "fitted.json").write_text(json.dumps({"classes": {"background": 0, "network": 1}, "ignore": 4}))
    assert load_classes(tmp_path) == ({"background": 0, "network": 1}, 4)
    (tmp_path / "fitted.json").write_text(json.dumps({"labels": None}))
    with pytest.raises(UserError, match="names no classes"):
        load_classes(tmp_path)


def test_a_datalist_without_classes_has_a_background_even_where_no_voxel_is(tmp_path):
    entries = [pair(tmp_path, name, label=np.full(SHAPE, value, np.uint8)) for name, value in (("a", 3), ("b", 1))]
    assert load_dataset(datalist(tmp_path, training=entries)).classes == {"background": 0, "class_1": 1, "class_3": 3}


def test_a_stray_file_among_channel_files_is_named(tmp_path):
    folder = nnunet_folder(tmp_path, cases=1, shape=SHAPE)
    write(folder / "imagesTr" / "stray.nii.gz", ZEROS)
    with pytest.raises(UserError, match=r"labelsTr/stray\.nii\.gz: no such file"):
        load_dataset(folder)


@pytest.mark.parametrize("entry", [{"image": "a.nii.gz"}, {"label": "a.nii.gz"}, "a.nii.gz", {}])
def test_an_entry_needs_image_and_label(tmp_path, entry):
    good = pair(tmp_path, "a")
    with pytest.raises(UserError, match=r'list.json: validation\[1\]: expected \{"image": ..., "label": ...\}, got'):
        load_dataset(datalist(tmp_path, training=[good], validation=[good, entry]))


def test_equal_names_get_their_folders_and_others_keep_theirs(tmp_path):
    entries = [pair(tmp_path, "one"), *(pair(tmp_path, f"site/{i}/t1") for i in range(2))]
    assert names(load_dataset(datalist(tmp_path, training=entries)).cases) == ["one-label", "site_0_t1-label", "site_1_t1-label"]


@pytest.mark.parametrize(("count", "last"), [(20, "case_19"), (21, "and 1 more"), (23, "and 3 more")])
def test_at_most_twenty_bad_files_are_listed(tmp_path, count, last):
    folder = nnunet_folder(tmp_path, cases=1, shape=SHAPE)
    for i in range(count):
        (folder / "labelsTr" / f"case_{i}.nii.gz").write_text("")
        (folder / "imagesTr" / f"case_{i}_0000.nii.gz").write_bytes((folder / "imagesTr/case_0_0000.nii.gz").read_bytes())
    with pytest.raises(UserError) as error:
        load_dataset(folder)
    lines = str(error.value).splitlines()
    assert len(lines) == min(count, 21) and last in "\n".join(lines) and ("more" in lines[-1]) == (count > 20)


def test_strange_values_are_sorted_and_at_most_eight():
    case, values = Case("a", (), Path("a.nii.gz")), np.arange(30, 0, -1)
    with pytest.raises(UserError, match=r"^a.nii.gz: label value\(s\) 2, 3, 5, 6, 7, 8, 9, 10 outside the classes \[0, 1\]$"):
        check_values(case, values, {"background": 0, "ball": 1}, 4)
    check_values(case, np.array([0, 1, 4]), {"background": 0, "ball": 1}, 4)


# ---- folds


def test_parts_are_shuffled_by_the_seed_whatever_the_order_of_the_cases():
    data = table(*[None] * 7)
    for seed in (0, 4):
        wanted = [f"case_{i}" for i in range(7)]
        random.Random(seed).shuffle(wanted)
        for cases in (data.cases, data.cases[::-1]):
            training, validation = split(Dataset("", (), {}, None, cases), 1, folds=3, seed=seed)
            assert set(names(validation)) == {wanted[1], wanted[4]} and len(training) == 5
    assert split(data, 1, folds=3) == split(data, 1, folds=3, seed=0) != split(data, 1, folds=3, seed=4)
    assert [len(split(data, fold)[1]) for fold in range(5)] == [2, 2, 1, 1, 1]  # five parts by default
    with pytest.raises(UserError, match=r"fold: expected one of \[0, 1, 2, 3, 4\], got 5"):
        split(data, 5)


@pytest.mark.parametrize("folds", [-1, 0, 1, 5])
def test_parts_are_at_least_two_and_at_most_the_cases(folds):
    assert all(len(split(table(*[None] * 4), 0, folds=good)[1]) == 4 // good for good in (2, 4))
    with pytest.raises(UserError, match=rf"folds: expected 2 to 4 \(the number of cases\), got {folds}"):
        split(table(*[None] * 4), 0, folds=folds)


def test_a_case_without_a_number_is_always_trained_on():
    training, validation = split(table(0, 1, None, "validation"), 1)
    assert (names(training), names(validation)) == (["case_0", "case_2"], ["case_1"])


@pytest.mark.parametrize(("folds", "fold", "known"), [((0, 0), 0, r"\[0\]"), ((0, 2, None), 1, r"\[0, 2\]")])
def test_a_fold_needs_cases_on_both_sides(folds, fold, known):
    with pytest.raises(UserError, match=rf"fold: expected one of {known}, got {fold}"):
        split(table(*folds), fold)


@pytest.mark.parametrize("fold", [-1, 2])
def test_a_splits_file_has_folds_from_zero(tmp_path, fold):
    splits = [{"train": ["case_0"], "val": ["case_1"]}, {"train": ["case_1"], "val": ["case_0"]}]
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    data = table(0, 0)
    assert names(split(data, 1, splits=tmp_path / "splits.json")[1]) == ["case_0"]  # before the folds of the cases
    with pytest.raises(UserError, match=rf"fold: expected 0 to 1 .*, got {fold}"):
        split(data, fold, splits=tmp_path / "splits.json")
    (tmp_path / "splits.json").write_text(json.dumps([{"train": ["case_0"]}]))
    with pytest.raises(UserError, match="expected a list of"):
        split(data, 0, splits=tmp_path / "splits.json")


# ---- what is predicted


def test_hidden_and_other_files_are_no_cases(tmp_path):
    for name in (".partial-1-b.nii.gz", "b.nii.gz", "a.nii", "c.txt"):
        (tmp_path / name).write_text("")
    assert names(image_files(tmp_path)) == ["a.nii", "b.nii.gz"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no image in this folder"):
        cases_in(tmp_path / "empty", 1)


def test_channel_files_keep_their_ending(tmp_path):
    write(tmp_path / "a_0000.nii", ZEROS)
    (case,) = cases_in(tmp_path, 2)
    assert (case.name, case.images) == ("a", (tmp_path / "a_0000.nii", tmp_path / "a_0001.nii"))
    assert [strip_ending(Path(name)) for name in ("x/a.nii.gz", "a.nii", "a.gz", "a.nii.txt")] == ["a", "a", "a.gz", "a.nii.txt"]


# ---- NIfTI


def bad_affine(**changes) -> nib.Nifti1Image:
    image = nib.Nifti1Image(ZEROS, np.eye(4))
    for key, value in changes.items():
        image.header[key] = value
    return image


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.nii", nib.Nifti1Image(np.zeros((0, 4, 4), np.float32), np.eye(4)), "expected 2 or 3 axes"),
        ("a.nii", nib.Nifti1Image(np.zeros(7, np.float32), np.eye(4)), r"got the shape \(7,\)"),
        ("a.mgz", nib.MGHImage(ZEROS, np.eye(4)), r"a\.mgz: no format that is read \(\.nii\.gz, "),
        ("a.nii", bad_affine(srow_x=[np.nan, 0, 0, 0], sform_code=1, qform_code=0), "the affine cannot be inverted"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path, name, content, message):
    if name == "a.nii" and "affine" in message:
        data = bytearray(nib.Nifti1Image(ZEROS, np.eye(4)).to_bytes())
        data[280:284] = np.array(np.nan, "<f4").tobytes()  # srow_x[0]
        (tmp_path / name).write_bytes(data)
    else:
        nib.save(content, tmp_path / name)
    with pytest.raises(UserError, match=message):
        open_image(tmp_path / name)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match="expected an image file, got a folder"):
        open_image(tmp_path)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
@pytest.mark.parametrize("edge", [1e-3, 1.0])  # 1 micrometre is a voxel too
def test_numbers_of_every_kind_are_read(tmp_path, dtype, edge):
    write(tmp_path / "a.nii", np.arange(60).reshape(SHAPE).astype(dtype), np.diag([edge, edge, edge, 1]))
    data, _ = read_image([tmp_path / "a.nii"], 1)
    assert data.dtype == np.float32 and np.array_equal(data[0], np.arange(60).reshape(SHAPE))


def test_channels_have_one_grid_and_none_of_them_four_axes(tmp_path):
    one, other = write(tmp_path / "a.nii", ZEROS), write(tmp_path / "b.nii", ZEROS, np.diag([1, 1, 2, 1]))
    with pytest.raises(UserError, match=r"b\.nii: not on the grid of .*a\.nii: the affine"):
        read_image([one, other])
    four = [write(tmp_path / f"{i}.nii", np.zeros((*SHAPE, 2), np.float32)) for i in range(2)]
    with pytest.raises(UserError, match=r"expected 1 channel beside the other channels' files, got 2"):
        read_image(four)
    for channels in (1, 3):
        with pytest.raises(UserError, match=rf"0\.nii: expected {channels} channel\(s\), got 2"):
            read_image(four[:1], channels)
    two = [one, write(tmp_path / "c.nii", ZEROS + 1)]
    assert read_image(two, 2)[0][:, 0, 0, 0].tolist() == [0, 1] and read_image(two)[0].shape == (2, *SHAPE)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite_are_counted(tmp_path, value):
    data = ZEROS.copy()
    data[:2, 0, 0] = value
    with pytest.raises(UserError, match=r"a\.nii: 2 voxel\(s\) are not finite"):
        read_image([write(tmp_path / "a.nii", data)])


def test_a_plane_has_one_slice(tmp_path):
    data, image = read_image([write(tmp_path / "a.nii", np.arange(20, dtype=np.float32).reshape(5, 4))])
    assert data.shape == (1, 5, 4, 1) and image.shape == (5, 4, 1)


def test_labels_may_be_off_by_a_thousandth(tmp_path):
    data = np.array([[[0.0, 1.0009, 1.9991, -1.0, 70_000.0]]], np.float32)
    values, _ = read_label(write(tmp_path / "a.nii", data))
    assert values.dtype == np.int32 and values.tolist() == [[[0, 1, 2, -1, 70_000]]]
    for bad, shown in ((1.0011, "1.0011"), (np.inf, "inf"), (np.nan, "nan"), (3e9, r"3e\+09")):
        data[0, 0, 1] = bad
        with pytest.raises(UserError, match=rf"expected integers as labels, got values such as {shown}"):
            read_label(write(tmp_path / "a.nii", data))


def test_integers_keep_their_type_and_size(tmp_path):
    values, _ = read_label(write(tmp_path / "a.nii", np.full(SHAPE, 3_000_000_000, np.uint32)))
    assert values.dtype == np.uint32 and values.max() == 3_000_000_000


def test_a_label_is_one_map(tmp_path):
    assert read_label(write(tmp_path / "a.nii", np.ones((*SHAPE, 1), np.uint8)))[0].shape == SHAPE
    with pytest.raises(UserError, match=r"expected one label map, got 2 channels"):
        read_label(write(tmp_path / "a.nii", np.ones((*SHAPE, 2), np.uint8)))


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1), ("micron", 0.001), ("meter", 1000), ("unknown", 1)])
def test_edges_are_lengths_of_columns_in_millimetres(unit, factor):
    image = nib.Nifti1Image(ZEROS, np.array([[0, -2.0, 0, 9], [3.0, 0, 0, 9], [0, 0, 4.0, 9], [0, 0, 0, 1]]))
    image.header.set_xyzt_units(unit)
    np.testing.assert_allclose(nifti.record(image).spacing, np.array([3.0, 2.0, 4.0]) * factor)
    np.testing.assert_allclose(nifti.record(image).affine[:3, 3], np.full(3, 9.0) * factor)


def test_edges_and_shape_along_the_axes_of_ras():
    edges, shape = ras_grid(grid([[0, 0, -4.0, 0], [2.0, 0, 0, 0], [0, 3.0, 0, 0], [0, 0, 0, 1]]))  # the file's axes: front, up, left
    assert (edges.tolist(), shape.tolist()) == ([4, 2, 3], [3, 5, 4])


def test_spacings_of_two_units_differ_along_every_axis():
    one = np.ones(3)
    assert [far_apart(one, one * np.array(factors)) for factors in ([51, 51, 51], [51, 51, 49], [0.019, 0.019, 0.019], [0.019, 1, 1])] == [
        True,
        False,
    ] * 2


def grid(affine, shape=SHAPE) -> Image:
    return nifti.record(nib.Nifti1Image(np.zeros(shape, np.uint8), np.asarray(affine, float)))


@pytest.mark.parametrize("axis", range(3))
def test_grids_differ_from_a_tenth_of_the_smallest_edge_on(axis):
    """Every corner of the last voxels counts: an edge 1 + e longer moves the corner (size - 1) e away."""
    edges = np.array([2.0, 0.5, 1.0])
    for apart, same in ((0.049, True), (0.051, False)):
        shifted, longer = np.diag([*edges, 1.0]), np.diag([*edges, 1.0])
        shifted[axis, 3] = -apart
        longer[axis, axis] += apart / (SHAPE[axis] - 1)
        for other in (shifted, longer):
            assert (different_grid(grid(other), grid(np.diag([*edges, 1.0]))) is None) == same
    assert different_grid(grid(np.eye(4), (5, 4, 4)), grid(np.eye(4))) == "shape (5, 4, 4), expected (5, 4, 3)"
    assert different_grid(grid(np.eye(4), (5, 4)), grid(np.eye(4), (5, 4, 1))) is None
    found = different_grid(grid(np.diag([1, 1, 2, 1])), grid(np.eye(4)))
    assert found == "the affine puts a corner 2 mm away (at most 0.1 mm)"


def test_the_smallest_edge_of_an_oblique_grid_is_that_of_its_voxels():
    turned = np.eye(4)
    turned[:2, :2] = np.array([[1, -1], [1, 1]]) / np.sqrt(2) @ np.diag([1.0, 4.0])
    shifted = turned.copy()
    shifted[0, 3] = 0.15
    assert different_grid(grid(shifted), grid(turned)) == "the affine puts a corner 0.15 mm away (at most 0.1 mm)"


def test_what_is_written_has_no_scale_intent_or_display_range_of_the_image(tmp_path):
    like = nib.Nifti1Image(np.zeros(SHAPE, np.int16), np.eye(4))
    like.header.set_slope_inter(2.0, 10.0)
    like.header.set_intent("estimate")
    like.header["cal_min"], like.header["cal_max"] = 5, 9
    data = np.random.default_rng(0).random((*SHAPE, 2)).astype(np.float32)
    write_image(tmp_path / "a.nii.gz", data, nifti.record(like))
    back = nib.load(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(np.asarray(back.dataobj), data)
    assert (back.header.get_intent()[0], float(back.header["cal_min"]), float(back.header["cal_max"])) == ("none", 0.0, 0.0)
    assert like.header.get_intent()[0] == "estimate"  # a copy was changed


def test_probabilities_of_a_plane_have_one_slice(tmp_path):
    like = nib.Nifti1Image(np.zeros((5, 4), np.int16), np.eye(4))
    write_image(tmp_path / "a.nii", np.zeros((5, 4, 1), np.uint8), nifti.record(like))
    assert nib.load(tmp_path / "a.nii").shape == (5, 4)
    write_image(tmp_path / "b.nii", np.zeros((5, 4, 1, 3), np.float32), nifti.record(like))
    assert nib.load(tmp_path / "b.nii").shape == (5, 4, 1, 3)
