"""medssm evaluate: values computed by hand, empty classes, intervals over patients, and what is refused."""

import contextlib
import csv
import json
import re

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from scipy import ndimage

from medssm import cli
from medssm.errors import UserError
from medssm.segment import evaluate as evaluation
from medssm.segment.evaluate import bootstrap, evaluate
from medssm.segment.metrics import compare
from tests.segment.synthetic import write

SHAPE, SPACING = (12, 10, 8), (1.0, 2.0, 3.0)
DIAGONAL = float(np.linalg.norm(np.array(SHAPE) * SPACING))


def box(*corners, value=1):
    data = np.zeros(SHAPE, np.uint8)
    data[tuple(slice(*corner) for corner in corners)] = value
    return data


A = box((2, 6), (2, 6), (2, 6))
MOVED = box((3, 7), (2, 6), (2, 6))  # one voxel, 1 mm, along the first axis


def files(root, **cases):
    """{name: (prediction, reference)} as two folders."""
    for name, (prediction, reference) in cases.items():
        write(root / "p" / f"{name}.nii.gz", prediction, np.diag([*SPACING, 1]))
        write(root / "r" / f"{name}.nii.gz", reference, np.diag([*SPACING, 1]))
    return root / "p", root / "r"


def test_values_by_hand():
    """Cubes of 64 voxels a voxel apart: 48 shared; every surface voxel is at most 1 mm from the other surface."""
    result = compare(A > 0, MOVED > 0, SPACING, nsd_mm=1.0)
    assert result == {"dice": 2 * 48 / 128, "hd95": 1.0, "nsd": 1.0}
    far = compare(A > 0, MOVED > 0, (5.0, 2.0, 3.0), nsd_mm=2.5)
    # 56 of a cube's 64 voxels are on its surface. The 16 of its outermost layer are 5 mm from the other cube; the 4 in the middle of
    # the layer inside the other cube are a voxel of 2 mm from its rim; all others lie on the other surface.
    assert far["nsd"] == pytest.approx(1 - 16 / 56) and far["hd95"] == 5.0


def test_two_voxels_by_hand():
    a, b = box((0, 1), (0, 1), (0, 1)) > 0, box((3, 4), (0, 1), (4, 5)) > 0
    apart = float(np.hypot(3 * 1.0, 4 * 3.0))
    assert compare(a, b, SPACING, nsd_mm=apart) == {"dice": 0.0, "hd95": pytest.approx(apart), "nsd": 1.0}
    assert compare(a, b, SPACING, nsd_mm=apart - 0.01)["nsd"] == 0.0


@pytest.mark.parametrize("shape", [(20, 18, 16), (24, 20, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_the_definitions_are_monais(shape, seed):
    random = np.random.default_rng(seed)
    a, b = (ndimage.gaussian_filter(random.normal(size=shape), 1.5) > 0.02 for _ in range(2))
    spacing, axes = (1.0, 0.7, 2.5), 3 if shape[2] > 1 else 2
    x, y = (torch.from_numpy(mask.reshape(shape[:axes]))[None, None] for mask in (a, b))
    result = compare(a, b, spacing, nsd_mm=1.5)
    options = {"include_background": True, "spacing": spacing[:axes]}
    assert result["hd95"] == pytest.approx(compute_hausdorff_distance(x, y, percentile=95, **options).item(), rel=1e-5)
    assert result["nsd"] == pytest.approx(compute_surface_dice(x, y, [1.5], **options).item(), rel=1e-5)


def test_a_structure_one_voxel_thick_is_all_surface():
    """In a volume: unlike a plane, where the third axis does not count."""
    slab = box((2, 8), (2, 8), (3, 4)) > 0
    assert compare(slab, box((4, 5), (4, 5), (3, 4)) > 0, SPACING, nsd_mm=0.0)["nsd"] == 2 / 37


def test_an_image_of_one_voxel():
    one = np.ones((1, 1, 1), bool)
    assert compare(one, one, (1, 1, 1), 2.0) == {"dice": 1.0, "hd95": 0.0, "nsd": 1.0}


def test_empty_classes(tmp_path):
    empty = np.zeros(SHAPE, np.uint8)
    folders = files(tmp_path, both=(empty, empty), found=(A, empty), missed=(empty, A), right=(A, A))
    result = evaluate(*folders, classes={"bg": 0, "ball": 1}, quiet=True)
    none = {"dice": 0.0, "hd95": pytest.approx(DIAGONAL), "nsd": 0.0}
    assert result["cases"] == {
        "both": {"ball": None},
        "found": {"ball": none},
        "missed": {"ball": none},
        "right": {"ball": {"dice": 1.0, "hd95": 0.0, "nsd": 1.0}},
    }
    ball = result["classes"]["ball"]
    assert (ball["n"], ball["empty_in_both"]) == (3, 1) and ball["dice"]["mean"] == pytest.approx(1 / 3)
    assert ball["hd95"]["mean"] == pytest.approx(2 * DIAGONAL / 3) and ball["dice"]["low"] is None


def test_a_class_that_is_nowhere(tmp_path):
    empty = np.zeros(SHAPE, np.uint8)
    result = evaluate(*files(tmp_path, a=(empty, empty)), classes={"bg": 0, "ball": 1}, quiet=True)
    ball = result["classes"]["ball"]
    assert (ball["n"], ball["empty_in_both"]) == (0, 1) and ball["dice"] == ball["hd95"] == {"mean": None, "low": None, "high": None}


def test_the_mean_is_over_the_classes_of_each_case(tmp_path):
    two = A + box((8, 10), (8, 10), (6, 8), value=2)
    result = evaluate(*files(tmp_path, a=(A, two), b=(MOVED, A)), quiet=True)
    assert set(result["classes"]) == {"1", "2"} and result["cases"]["b"]["2"] is None
    assert result["mean"]["dice"]["mean"] == pytest.approx(((1.0 + 0.0) / 2 + 0.75) / 2)


def test_millimetres_of_any_unit(tmp_path):
    for folder, data in (("p", MOVED), ("r", A)):
        image = nib.Nifti1Image(data, np.diag([1e-3, 2e-3, 3e-3, 1]))
        image.header.set_xyzt_units("meter")
        (tmp_path / folder).mkdir()
        nib.save(image, tmp_path / folder / "a.nii.gz")
    assert evaluate(tmp_path / "p", tmp_path / "r", quiet=True)["cases"]["a"]["1"]["hd95"] == pytest.approx(1.0)


def test_ignored_voxels_count_for_nothing(tmp_path):
    reference = A.copy()
    reference[6:] = 9
    prediction = A + box((7, 10), (2, 6), (2, 6))
    folders = files(tmp_path, a=(prediction, reference))
    assert evaluate(*folders, classes={"bg": 0, "ball": 1}, ignore=9, quiet=True)["mean"]["dice"]["mean"] == 1.0
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "ball": 1, "ignore": 9}}))
    assert evaluate(*folders, classes=tmp_path, quiet=True)["cases"]["a"]["ball"]["dice"] == 1.0
    with pytest.raises(UserError, match=r"r/a\.nii\.gz: label value\(s\) 9 outside the classes \[0, 1\]"):  # the option comes before the file
        evaluate(*folders, classes=tmp_path, ignore=8, quiet=True)


def test_no_interval_below_five_patients():
    values = {f"{patient}_{scan}": 0.5 + 0.1 * patient for patient in range(4) for scan in range(5)}
    assert bootstrap(values, {case: case[0] for case in values}) is None
    low, high = bootstrap({f"{i}": i / 10 for i in range(5)}, {f"{i}": f"{i}" for i in range(5)})
    assert 0 < low < 0.2 < high < 0.4


def test_the_interval_is_over_patients_and_not_over_scans():
    """Ten copies of every patient's scan say nothing new."""
    random = np.random.default_rng(0)
    values = {f"sub-{i}_scan-0": float(value) for i, value in enumerate(random.uniform(0.5, 1, 8))}
    copies = {f"sub-{i}_scan-{scan}": values[f"sub-{i}_scan-0"] for i in range(8) for scan in range(10)}
    by_patient = {case: case.split("_")[0] for case in copies}
    assert bootstrap(copies, by_patient) == pytest.approx(bootstrap(values, {case: case for case in values}))
    low, high = bootstrap(copies, {case: case for case in copies})
    patients = bootstrap(copies, by_patient)
    assert high - low < 0.5 * (patients[1] - patients[0])


def test_the_interval_covers_the_mean_of_a_normal():
    """Against the textbook: mean -+ 1.96 s / sqrt(n)."""
    values = dict(enumerate(np.random.default_rng(1).normal(0.8, 0.1, 200)))
    low, high = bootstrap(values, {i: i for i in values})
    mean, half = np.mean(list(values.values())), 1.96 * np.std(list(values.values())) / 200**0.5
    assert low == pytest.approx(mean - half, abs=0.05 * half) and high == pytest.approx(mean + half, abs=0.05 * half)


def test_the_command_prints_a_table_and_writes_json_and_csv(tmp_path, capsys):
    prediction, reference = files(tmp_path, **{f"sub-{i}": (MOVED if i % 2 else A, A) for i in range(6)})
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "ball": 1, "box": 2}}))
    command = [
        "evaluate",
        str(prediction),
        str(reference),
        "--classes",
        str(tmp_path / "dataset.json"),
        "--nsd-mm",
        "0.5",
        "--json-file",
        str(tmp_path / "a.json"),
        "--csv",
        str(tmp_path / "a.csv"),
    ]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "6 case(s) of 6 patient(s)" in shown and "0.875 [" in shown and "no interval" not in shown
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["classes"]["box"]["empty_in_both"] == 6 and result["nsd_mm"] == 0.5
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert len(rows) == 12 and rows[2] == {"case": "sub-1", "class": "ball", "dice": "0.75", "hd95": "1", "nsd": rows[2]["nsd"]}
    assert rows[1]["dice"] == ""
    assert cli.main([*command, "--patient", "^sub-[01]|^sub"]) == 0
    assert "no interval: 3 patient(s)" in capsys.readouterr().out
    assert cli.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mean"]["n"] == 6


def test_one_file_against_one_file_or_a_folder(tmp_path):
    prediction, reference = files(tmp_path, a=(MOVED, MOVED), b=(A, A))
    assert evaluate(prediction / "a.nii.gz", reference / "b.nii.gz", quiet=True)["cases"]["a"]["1"]["dice"] == 0.75
    assert evaluate(prediction / "b.nii.gz", reference, quiet=True)["cases"]["b"]["1"]["dice"] == 1.0
    with pytest.raises(UserError, match=r"no reference for c\.nii\.gz"):
        evaluate(write(tmp_path / "c.nii.gz", A, np.diag([*SPACING, 1])), reference, quiet=True)


def test_predictions_without_a_reference_are_listed(tmp_path):
    prediction, reference = files(tmp_path, a=(A, A), b=(A, A))
    (reference / "b.nii.gz").unlink()
    assert evaluate(prediction, reference, quiet=True)["unused"] == ["b"]


def test_a_missing_prediction_is_a_failed_case(tmp_path):
    prediction, reference = files(tmp_path, a=(MOVED, A), b=(A, A))
    (prediction / "b.nii.gz").unlink()
    result = evaluate(prediction, reference, quiet=True)
    assert result["failed"] == {"b": f"{prediction}: no prediction for b"} and list(result["cases"]) == ["a"]
    assert result["patients"] == 1 and result["mean"]["dice"]["mean"] == 0.75


@pytest.mark.parametrize(
    ("data", "affine", "message"),
    [
        (A[:-1], np.diag([*SPACING, 1]), r"not on the grid of .*: shape \(11, 10, 8\), expected \(12, 10, 8\)"),
        (A, np.diag([1, 2, 3.3, 1]), r"not on the grid of .*: the affine puts a corner"),
        (A, np.diag([-1, 2, 3, 1]), r"not on the grid of .*: the affine puts a corner"),
        (A * 7, np.diag([*SPACING, 1]), r"p/a\.nii\.gz: label value\(s\) 7 outside the classes \[0, 1\]"),
    ],
)
def test_what_cannot_be_compared_is_a_failed_case(tmp_path, data, affine, message):
    prediction, reference = files(tmp_path, a=(A, A), b=(MOVED, A))
    write(prediction / "a.nii.gz", data, affine)
    result = evaluate(prediction, reference, classes={"bg": 0, "ball": 1}, quiet=True)
    assert list(result["failed"]) == ["a"] and re.search(message, result["failed"]["a"]) and len(result["failed"]["a"].splitlines()) == 1
    assert list(result["cases"]) == ["b"] and result["mean"]["dice"]["mean"] == 0.75
    with pytest.raises(UserError, match=message):  # the only case
        evaluate(prediction / "a.nii.gz", reference / "a.nii.gz", classes={"bg": 0, "ball": 1}, quiet=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nsd_mm": -1}, "nsd_mm: expected 0 or more"),
        ({"nsd_mm": float("nan")}, "nsd_mm: expected 0 or more"),
        ({"nsd_mm": float("inf")}, "nsd_mm: expected 0 or more"),
        ({"patient": "("}, "is no regular expression"),
        ({"patient": "x+"}, "is not in the name a"),
        ({"patient": ""}, "is not in the name a"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        evaluate(*files(tmp_path, a=(A, A)), quiet=True, **options)


def test_classes_without_names_are_in_the_order_of_their_values(tmp_path):
    result = evaluate(*files(tmp_path, a=(A * 10, A * 10), b=(A * 2, A * 9)), quiet=True)
    assert list(result["classes"]) == ["2", "9", "10"] == list(result["cases"]["a"])


def test_the_seed_is_the_bootstraps(tmp_path):
    folders = files(tmp_path, **{f"case-{i}": (box((2 + i, 6), (2, 6), (2, 6)), A) for i in range(5)})
    first, again, other = (evaluate(*folders, quiet=True, **options)["mean"]["dice"] for options in ({}, {"seed": 0}, {"seed": 1}))
    assert first == again and first["mean"] == other["mean"] and first["low"] != other["low"]


def test_patients_are_a_group_of_the_expression_or_its_match(tmp_path):
    folders = files(tmp_path, **{f"{hospital}-{i}_{scan}": (A, A) for hospital in "xy" for i in range(2) for scan in "ab"})
    counts = {pattern: evaluate(*folders, patient=pattern, quiet=True)["patients"] for pattern in (None, "^[xy]-[01]", "^[xy]", "_(.)", "-(.)_.")}
    assert counts == {None: 8, "^[xy]-[01]": 4, "^[xy]": 2, "_(.)": 2, "-(.)_.": 2}


def test_five_patients_have_an_interval_and_every_column_a_heading(tmp_path, capsys):
    prediction, reference = files(tmp_path, **{f"case-{i}": (A, A) for i in range(5)})
    assert cli.main(["evaluate", str(prediction), str(reference), "--nsd-mm", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert "no interval" not in shown and shown.count("[1.000,") == 4  # Dice and surface Dice of the class and of the mean
    words = " ".join(shown.split())
    assert all(heading in words for heading in ("class", "Dice", "HD95", "surface", "0.5", "cases", "empty"))


def test_progress_is_told_after_each_case(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(evaluation, "progress", lambda title, quiet: contextlib.nullcontext(lambda *step: told.append(step)))
    evaluate(*files(tmp_path, a=(A, A), b=(A, A)), quiet=True)
    assert told == [(0.5, "a"), (1.0, "b")]


def test_a_row_of_the_table_is_a_line_with_six_digits(tmp_path):
    evaluate(*files(tmp_path, a=(box((2, 6), (2, 6), (2, 5)), A)), csv_file=tmp_path / "t.csv", nsd_mm=0, quiet=True)
    first, second, end = (tmp_path / "t.csv").read_bytes().split(b"\n")
    assert (first, second.rpartition(b",")[0], end) == (b"case,class,dice,hd95,nsd", b"a,1,0.857143,3", b"")
