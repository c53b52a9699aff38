"""Which files are one case: nothing mixed up, nothing dropped, nothing guessed."""

import json

import nibabel as nib
import numpy as np
import pytest

from medssm.errors import UserError
from medssm.segment.cases import cases_in, grouped
from medssm.segment.data import load_dataset, split
from medssm.segment.evaluate import evaluate
from medssm.segment.images import different_grid, open_image
from medssm.segment.runs import CASES
from medssm.segment.train import train
from tests.segment.synthetic import UNET, nnunet_folder, volume, write

SHAPE = (5, 4, 3)
ZEROS = np.zeros(SHAPE, np.float32)


def files(folder, *names):
    return [write(folder / name, ZEROS) for name in names]


def found(cases):
    return {case.name: [file.name for file in case.images] for case in cases}


# -- channels


def test_numbered_scans_of_one_channel_are_scans(tmp_path):
    files(tmp_path, "amos_0002.nii.gz", "amos_0004.nii.gz", "amos_0005.nii.gz", "amos_0007.nii.gz")
    assert found(cases_in(tmp_path, 1)) == {f"amos_000{i}": [f"amos_000{i}.nii.gz"] for i in (2, 4, 5, 7)}


def test_a_file_that_is_named_is_itself(tmp_path):
    """Not the one with the number 0000 beside it."""
    files(tmp_path, "amos_0000.nii.gz", "amos_0002.nii.gz")
    assert found(cases_in(tmp_path / "amos_0002.nii.gz", 1)) == {"amos_0002": ["amos_0002.nii.gz"]}
    assert found(cases_in(tmp_path / "amos_0000.nii.gz", 1)) == {"amos": ["amos_0000.nii.gz"]}


def test_channels_are_those_below_the_networks_count_where_all_are_there(tmp_path):
    files(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "b.nii.gz")
    assert found(cases_in(tmp_path, 2)) == {"a": ["a_0000.nii.gz", "a_0001.nii.gz"], "b": ["b.nii.gz"]}
    assert found(cases_in(tmp_path / "a_0001.nii.gz", 2)) == {"a": ["a_0000.nii.gz", "a_0001.nii.gz"]}


def test_a_file_with_all_channels_is_itself_whatever_its_name(tmp_path):
    for i in range(2):
        write(tmp_path / f"both_{i:04d}.nii.gz", np.zeros((*SHAPE, 2), np.float32))
    assert found(cases_in(tmp_path, 2)) == {f"both_000{i}": [f"both_000{i}.nii.gz"] for i in range(2)}
    assert found(cases_in(tmp_path / "both_0001.nii.gz", 2)) == {"both_0001": ["both_0001.nii.gz"]}


def test_a_channel_too_many_is_an_error(tmp_path):
    files(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz")
    with pytest.raises(UserError, match=r"a_0001\.nii\.gz: expected 1 channel\(s\) as of a_0000\.nii\.gz, got one more.*rename them"):
        cases_in(tmp_path, 1)


def test_a_missing_channel_is_named_when_its_case_is_read(tmp_path):
    files(tmp_path, "a_0000.nii.gz")
    assert found(cases_in(tmp_path, 2)) == {"a": ["a_0000.nii.gz", "a_0001.nii.gz"]}


def test_two_files_that_would_give_one_output_are_named(tmp_path):
    files(tmp_path, "a.nii", "a.nii.gz")
    with pytest.raises(UserError, match=r"a\.nii.* and .*a\.nii.*: two files for the case a"):
        cases_in(tmp_path, 1)
    other = files(tmp_path / "b", "c_0000.nii.gz", "c.nii.gz")
    with pytest.raises(UserError, match=r"c.* and .*c.*: two files for the case c"):
        grouped(other, 1)


def test_a_folder_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "iterdir", refuse)
    with pytest.raises(UserError, match=r": cannot be read \(Permission denied\)"):
        cases_in(tmp_path, 1)


# -- data sets


def test_paths_that_a_description_lists_win(tmp_path):
    """The Medical Segmentation Decathlon's layout, with names that end as channels do."""
    names = [f"amos_{i:04d}.nii.gz" for i in (0, 1, 2)]
    for name in names:
        files(tmp_path / "imagesTr", name)
        write(tmp_path / "labelsTr" / name, np.zeros(SHAPE, np.uint8))
    entries = [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names]
    table = {"channel_names": {"0": "MR"}, "labels": {"background": 0}, "training": entries}
    (tmp_path / "dataset.json").write_text(json.dumps(table))
    assert found(load_dataset(tmp_path).cases) == {name[:-7]: [name] for name in names}


def test_nnunets_first_layout_lists_names_that_are_not_there(tmp_path):
    folder = nnunet_folder(tmp_path, cases=2, shape=SHAPE)
    table = json.loads((folder / "dataset.json").read_text())
    table["training"] = [{"image": f"./imagesTr/case_{i}.nii.gz", "label": f"./labelsTr/case_{i}.nii.gz"} for i in range(2)]
    (folder / "dataset.json").write_text(json.dumps(table))
    assert found(load_dataset(folder).cases) == {f"case_{i}": [f"case_{i}_0000.nii.gz"] for i in range(2)}


def test_a_surplus_channel_in_a_data_set_is_an_error(tmp_path):
    folder = nnunet_folder(tmp_path, cases=2, shape=SHAPE)
    files(folder / "imagesTr", "case_1_0001.nii.gz")
    with pytest.raises(UserError, match=r"case_1_0001\.nii\.gz: expected 1 channel\(s\)"):
        load_dataset(folder)


@pytest.mark.parametrize(("key", "meant"), [("image2", "image"), ("fold:", "fold"), ("Fold", "fold"), ("flod", "fold"), ("labels", "label")])
def test_a_misspelt_entry_is_an_error(tmp_path, key, meant):
    (image, label) = files(tmp_path, "a.nii.gz", "a-label.nii.gz")
    entry = {"image": image.name, "label": label.name, key: 1}
    (tmp_path / "list.json").write_text(json.dumps({"training": [entry]}))
    with pytest.raises(UserError, match=rf"list.json: training\[0\]: '{key}': no such entry; '{meant}' is one"):
        load_dataset(tmp_path / "list.json")


def test_other_entries_of_a_datalist_are_left_alone(tmp_path):
    image = write(tmp_path / "a.nii.gz", ZEROS)
    label = write(tmp_path / "a-label.nii.gz", np.zeros(SHAPE, np.uint8))
    entry = {"image": image.name, "label": label.name, "site": "north", "age": 61}
    (tmp_path / "list.json").write_text(json.dumps({"training": [entry]}))
    assert len(load_dataset(tmp_path / "list.json").cases) == 1


# -- names


def site(root, *places):
    """A datalist whose images have one name in different folders; folds 0, 1, 0, 1, …"""
    entries = []
    for i, place in enumerate(places):
        image, label = volume(i, (16, 16, 16))
        write(root / place / "anat" / "scan.nii.gz", image[..., 0])
        write(root / place / "anat" / "seg.nii.gz", label)
        entries.append({"image": f"{place}/anat/scan.nii.gz", "label": f"{place}/anat/seg.nii.gz", "fold": i % 2})
    (root / "list.json").write_text(json.dumps({"channel_names": {"0": "MR"}, "labels": {"background": 0, "ball": 1, "box": 2}, "training": entries}))
    return root / "list.json"


def test_equal_names_of_two_sites_are_two_cases(tmp_path):
    table = load_dataset(site(tmp_path, "siteA/sub-01", "siteB/sub-01", "siteA/sub-02"))
    assert [case.name for case in table.cases] == ["siteA_sub-01_anat_seg", "siteB_sub-01_anat_seg", "sub-02_anat_seg"]
    training, validation = split(table, 1)
    assert [str(case.label.relative_to(tmp_path)) for case in validation] == ["siteB/sub-01/anat/seg.nii.gz"]
    assert len(training) == 2 and not set(training) & set(validation)


def test_what_was_trained_and_held_out_is_written_by_path(tmp_path):
    described = site(tmp_path, "siteA/sub-01", "siteB/sub-01")
    train(
        described,
        tmp_path / "run",
        model="monai.networks.nets.UNet",
        model_kwargs=UNET,
        patch=(16, 16, 16),
        max_steps=1,
        fold=1,
        device="cpu",
        quiet=True,
    )
    kept = json.loads((tmp_path / "run" / CASES).read_text())
    (trained,), (held_out,) = kept["training"], kept["validation"]
    assert trained["images"] == [str(tmp_path / "siteA/sub-01/anat/scan.nii.gz")] and trained["label"].endswith("siteA/sub-01/anat/seg.nii.gz")
    assert held_out["images"] == [str(tmp_path / "siteB/sub-01/anat/scan.nii.gz")] and trained["name"] != held_out["name"]


def test_an_image_on_both_sides_is_an_error(tmp_path):
    image = write(tmp_path / "a.nii.gz", ZEROS)
    labels = [write(tmp_path / f"{name}-label.nii.gz", np.zeros(SHAPE, np.uint8)) for name in "ab"]
    entries = [{"image": image.name, "label": label.name, "fold": i} for i, label in enumerate(labels)]
    (tmp_path / "list.json").write_text(json.dumps({"training": entries}))
    with pytest.raises(UserError, match=r"a\.nii\.gz: an image of a training case and of a validation case"):
        split(load_dataset(tmp_path / "list.json"), 0)


def test_a_label_that_is_listed_twice_is_an_error(tmp_path):
    image = write(tmp_path / "a.nii.gz", ZEROS)
    label = write(tmp_path / "a-label.nii.gz", np.zeros(SHAPE, np.uint8))
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": image.name, "label": label.name}] * 2}))
    with pytest.raises(UserError, match=r"a-label\.nii\.gz: listed twice"):
        load_dataset(tmp_path / "list.json")


def test_one_case_cannot_be_divided(tmp_path):
    with pytest.raises(UserError, match="fold: expected at least 2 cases to hold one out, got 1"):
        split(load_dataset(nnunet_folder(tmp_path, cases=1, shape=SHAPE)), 0)


# -- units of length


def unit(path, code, affine=None):
    image = nib.Nifti1Image(ZEROS, np.eye(4) if affine is None else affine)
    image.header["xyzt_units"] = code
    nib.save(image, path)
    return open_image(path)


@pytest.mark.parametrize(("code", "factor"), [(0, 1), (1, 1000), (2, 1), (3, 0.001), (7, 1), (10, 1)])
def test_one_function_reads_a_headers_geometry(tmp_path, code, factor):
    """Metres, millimetres and microns, no unit, a code that NIfTI does not have, and millimetres with seconds."""
    image = unit(tmp_path / "a.nii.gz", code, np.diag([2, 3, 4, 1.0]))
    np.testing.assert_allclose(image.spacing, np.array([2, 3, 4]) * factor)
    np.testing.assert_allclose(image.affine, np.diag([2 * factor, 3 * factor, 4 * factor, 1]))


def test_one_grid_in_two_units_is_one_grid(tmp_path):
    micron, millimetre = unit(tmp_path / "a.nii.gz", 3, np.diag([500, 500, 500, 1.0])), unit(tmp_path / "b.nii.gz", 2, np.diag([0.5, 0.5, 0.5, 1]))
    assert different_grid(micron, millimetre) is None
    assert different_grid(unit(tmp_path / "c.nii.gz", 3, np.diag([0.5, 0.5, 0.5, 1])), millimetre) is not None


def test_evaluate_takes_any_code(tmp_path):
    for folder in ("found", "truth"):
        (tmp_path / folder).mkdir()
        image = nib.Nifti1Image(volume(0, (12, 10, 8))[1], np.eye(4))
        image.header["xyzt_units"] = 7
        nib.save(image, tmp_path / folder / "a.nii.gz")
    assert evaluate(tmp_path / "found", tmp_path / "truth", quiet=True)["mean"]["dice"]["mean"] == 1
