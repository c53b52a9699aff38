"""Cases of one patient are on one side of a fold."""

import json
from pathlib import Path

import numpy as np
import pytest

from medssm import cli
from medssm.errors import UserError
from medssm.segment.cases import Case
from medssm.segment.data import Dataset, load_dataset, split
from medssm.segment.patients import patient_of
from tests.segment.synthetic import UNET, nnunet_folder, write

SHAPE = (6, 5, 4)


def table(*names: str, **patients: str) -> Dataset:
    """A data set of cases of these names; no file is read."""
    return Dataset("", ("MR",), {"background": 0}, None, tuple(Case(name, (), Path(f"{name}.nii"), patient=patients.get(name)) for name in names))


def names(cases) -> list[str]:
    return sorted(case.name for case in cases)


SCANS = [f"sub-{patient}_ses-{session}" for patient in range(5) for session in range(3)]


def test_folds_are_a_partition_of_patients():
    held_out = []
    for fold in range(3):
        training, validation = split(table(*SCANS), fold, folds=3, group=r"(sub-\d+)")
        assert not {case.patient for case in training} & {case.patient for case in validation} and len(training) + len(validation) == 15
        assert all(case.patient == case.name[:5] for case in (*training, *validation))
        assert len(validation) in (3, 6)  # one or two patients with three scans each
        held_out += names(validation)
    assert sorted(held_out) == sorted(SCANS)
    ungrouped = split(table(*SCANS), 0, folds=3)
    assert {case.name[:5] for case in ungrouped[0]} & {case.name[:5] for case in ungrouped[1]}  # what the option is for


def test_a_fold_does_not_depend_on_the_order_of_the_cases():
    found = [names(split(table(*order), 1, folds=2, group=r"sub-\d")[1]) for order in (SCANS, SCANS[::-1])]
    assert found[0] == found[1]


def test_the_first_group_is_the_patient():
    assert patient_of("siteA_sub-07_run1", r"sub-(\d+)_run(\d)", "group") == "07"
    assert patient_of("siteA_sub-07_run1", r"sub-\d+", "group") == "sub-07"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(pat\d+)", r"group: '\(pat\\\\d\+\)' is not in the name sub-0_ses-0"),
        ("(", "group: '\\(' is no regular expression"),
        ("s(x)?", "is not in the name"),
    ],
)
def test_a_pattern_that_fits_no_case(pattern, message):
    with pytest.raises(UserError, match=message):
        split(table(*SCANS), 0, group=pattern)


def test_there_are_as_many_folds_as_patients():
    with pytest.raises(UserError, match=r"folds: expected 2 to 5 \(the number of patients\), got 6"):
        split(table(*SCANS), 0, folds=6, group=r"sub-\d")
    with pytest.raises(UserError, match="fold: expected at least 2 patients to hold one out, got 1"):
        split(table(*SCANS), 0, group="sub")


def datalist(root: Path, *entries: dict, **sections) -> Path:
    for name in "abcd":
        write(root / f"{name}.nii.gz", np.random.default_rng(0).random(SHAPE).astype(np.float32))
        write(root / f"{name}-seg.nii.gz", np.zeros(SHAPE, np.uint8))
    made = [{"image": f"{name}.nii.gz", "label": f"{name}-seg.nii.gz", **entry} for name, entry in zip("abcd", entries, strict=False)]
    (root / "list.json").write_text(json.dumps({"labels": {"background": 0}, "training": made, **sections}))
    return root / "list.json"


def test_a_datalist_names_patients(tmp_path):
    data = load_dataset(datalist(tmp_path, {"patient": 1}, {"patient": "2"}, {"patient": 1}, {"patient": "2"}))
    training, validation = split(data, 0, folds=2)
    assert sorted((names(training), names(validation))) == [["a-seg", "c-seg"], ["b-seg", "d-seg"]]
    assert split(data, 0, folds=4, group="[abcd]")[1][0].patient in "abcd"  # the option comes before the datalist


def test_a_patient_on_both_sides_is_an_error(tmp_path):
    one = {"image": "d.nii.gz", "label": "d-seg.nii.gz", "patient": 2}
    path = datalist(tmp_path, {"patient": 1, "fold": 0}, {"patient": 1, "fold": 1}, {"patient": 2, "fold": 1}, validation=[one])
    with pytest.raises(UserError, match="patient 1: b-seg is trained on and a-seg is held out"):
        split(load_dataset(path), 0)
    with pytest.raises(UserError, match="patient 2: c-seg is trained on and d-seg is held out"):
        split(load_dataset(path), None)


def test_all_cases_or_none_have_a_patient(tmp_path):
    with pytest.raises(UserError, match=r"b-seg\.nii\.gz: has no patient"):
        split(load_dataset(datalist(tmp_path, {"patient": 1}, {})), 0)
    with pytest.raises(UserError, match="'patients': no such entry; 'patient' is one"):
        load_dataset(datalist(tmp_path, {"patients": 1}))


def test_patients_are_said_and_kept(tmp_path, capsys):
    data = nnunet_folder(tmp_path / "data", cases=4, shape=(16, 16, 16))
    words = ["--group", r"case_([01]|[23])", "--model", "monai.networks.nets.UNet", "--model-kwargs", json.dumps(UNET), "--patch", "16", "16", "16"]
    assert cli.main(["train", str(data), str(tmp_path / "run"), *words, "--fold", "0", "--folds", "2", "--max-steps", "1", "--device", "cpu"]) == 0
    assert "2 (of 2 patients) to train on, 2 (of 2 patients) held out" in capsys.readouterr().err
    kept = json.loads((tmp_path / "run" / "cases.json").read_text())
    assert {case["patient"] for case in kept["training"] + kept["validation"]} == set("0123")
    assert "group: case_([01]|[23])" in (tmp_path / "run" / "train.yaml").read_text()
