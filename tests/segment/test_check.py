"""medssm check: what a data set holds, each fault under its file's name, the page, and the exit status."""

import json
import re

import numpy as np
import pytest

from medssm import cli
from medssm.errors import UserError
from medssm.segment.check import check
from medssm.segment.images import open_image, write_image
from medssm.segment.train import train
from tests.segment.synthetic import nnunet_folder, write
from tests.segment.test_files_of_cases import datalist, pair
from tests.segment.test_intensity import ct, hounsfield

SHAPE = (20, 18, 16)


def found(folder, **options) -> set[tuple[str, str, str]]:
    """(level, kind, file's name) of each finding."""
    return {(f["level"], f["kind"], f["file"].rpartition("/")[2]) for f in check(folder, quiet=True, **options)["findings"]}


def changed(which: int, change):
    """An `edit` of `nnunet_folder` for one case."""

    def edit(seed, image, label):
        return change(image.copy(), label.copy()) if seed == which else (image, label)

    return edit


def test_a_good_data_set_in_numbers(tmp_path):
    affine = np.diag([-2, 1, 3, 1])
    folder = nnunet_folder(tmp_path, cases=3, shape=SHAPE, affine=affine, labels={"background": 0, "kidney_left": 1, "kidney_right": 2})
    result = check(folder, quiet=True)
    assert result["findings"] == [] and result["failed"] == {} and result["report"] is None and result["listed"] == 3
    assert result["shape"] == {part: list(SHAPE) for part in ("smallest", "median", "largest")}
    assert result["spacing"]["median"] == [2, 1, 3] and result["orientations"] == {"LAS": 3}
    assert result["sides"] == {"classes": ["kidney_left", "kidney_right"], "pairs": [["kidney_left", "kidney_right"]]}
    assert result["mirror"] == []
    box = result["classes"]["kidney_right"]  # 5 x 4 x 4 voxels of 6 cubic millimetres
    assert box == {"value": 2, "cases": 3, "voxels": 240, "ml": {"smallest": 0.48, "median": 0.48, "largest": 0.48}}
    assert sum(row["voxels"] for row in result["classes"].values()) == 3 * np.prod(SHAPE)
    channel = result["channels"]["MR"]
    assert channel["scheme"] == "zscore"
    assert channel["smallest"]["smallest"] < 30 < 90 < channel["median"]["median"] < 110 < 180 < channel["largest"]["largest"]
    assert result["cases"]["case_0"]["ml"][2] == 0.48


def test_statistics_are_numpys(tmp_path):
    image = np.arange(-100, 220, dtype=np.int16).reshape(8, 8, 5)
    label = (image > 200).astype(np.uint8)
    folder = datalist(tmp_path, training=[pair(tmp_path, "a", image, label)], labels={"background": 0, "top": 1}, channel_names={"0": "T1"})
    row = check(folder, quiet=True)["cases"]["a-label"]
    low, high = np.percentile(image, (0.5, 99.5))
    right = {"smallest": -100, "low": low, "median": 59.5, "high": high, "largest": 219, "mean": 59.5}
    assert row["channels"]["T1"] == pytest.approx(right, rel=1e-5)
    assert row["voxels"] == {0: 301, 1: 19}


def nan(image, label):
    image[0, 0, 0] = np.nan
    return image, label


def infinite(image, label):
    image[:] = np.inf
    return image, label


def constant(image, label):
    return np.full_like(image, 7), label


def strange_value(image, label):
    label[0, 0, 0] = 9
    return image, label


def no_class(image, label):
    return image, np.zeros_like(label)


def half_a_label(image, label):
    return image, label + 0.5


def padded(image, label):
    image /= 10  # so that it does not look like CT
    image[:, :3] = -3024
    return image, label


@pytest.mark.parametrize(
    ("change", "findings"),
    [
        (nan, {("error", "not finite", "case_1_0000.nii.gz")}),
        (infinite, {("error", "not finite", "case_1_0000.nii.gz"), ("error", "intensities", "case_1_0000.nii.gz")}),
        (constant, {("error", "intensities", "case_1_0000.nii.gz")}),
        (strange_value, {("error", "label values", "case_1.nii.gz")}),
        (half_a_label, {("error", "unreadable", "case_1_0000.nii.gz")}),
        (no_class, {("warning", "no class", "case_1.nii.gz")}),
        (padded, {("note", "padding", "case_1_0000.nii.gz")}),
    ],
)
def test_faults_of_one_case(tmp_path, change, findings):
    folder = nnunet_folder(tmp_path / "data", cases=3, shape=SHAPE, edit=changed(1, change))
    assert found(folder) == findings
    if any(level == "error" for level, _, _ in findings):
        with pytest.raises(UserError, match=r"case_1"):
            train(folder, tmp_path / "run", device="cpu", patch=(16, 16, 16), max_steps=1, quiet=True)


def test_a_number_for_voxels_that_are_not_finite(tmp_path):
    assert found(nnunet_folder(tmp_path, cases=2, shape=SHAPE, edit=changed(1, nan)), nan=0.0) == set()


def test_faults_of_headers_and_names(tmp_path):
    folder = nnunet_folder(tmp_path, cases=7, shape=SHAPE, channels=("T1", "T2"))
    images, labels = folder / "imagesTr", folder / "labelsTr"
    (images / "case_0_0001.nii.gz").unlink()
    (images / "case_1_0000.nii.gz").write_bytes(b"no image")
    write(labels / "case_2.nii.gz", np.zeros(SHAPE, np.uint8), np.diag([1, 1, 2, 1]))
    write(labels / "case_3.nii.gz", np.zeros((4, 4, 4), np.uint8))
    (labels / "case_4.nii.gz").unlink()
    (images / "case_5_0000.nii.gz").write_bytes((images / "case_5_0000.nii.gz").read_bytes()[:2000])
    assert found(folder) == {
        ("error", "files", "case_0_0001.nii.gz"),
        ("error", "files", "case_1_0000.nii.gz"),
        ("error", "files", "case_2.nii.gz"),
        ("error", "files", "case_3.nii.gz"),
        ("error", "files", "case_4.nii.gz"),
        ("error", "unreadable", "case_5_0000.nii.gz"),
    }
    result = check(folder, quiet=True)
    assert list(result["cases"]) == ["case_6"] and len(result["failed"]) == 6


def test_a_surplus_channel_and_two_classes_of_one_value_do_not_hide_the_rest(tmp_path):
    labels = {"background": 0, "ball": 1, "box": 1, "other": 2}
    folder = nnunet_folder(tmp_path / "a", cases=3, shape=SHAPE, labels=labels, edit=changed(2, nan))
    write(folder / "imagesTr" / "case_0_0001.nii.gz", np.zeros(SHAPE, np.float32))
    result = check(folder, quiet=True)
    assert [f["text"].removeprefix(str(folder)) for f in result["findings"]] == [
        "/dataset.json: labels: ball and box have one value, 1",
        "/imagesTr/case_0_0001.nii.gz: expected 1 channel(s) as of case_0_0000.nii.gz, got one more. If these files are images of their own, rename "
        "them: an ending such as _0000 is a channel",
        "/imagesTr/case_2_0000.nii.gz: 1 voxel(s) are not finite (NaN or infinite): --nan VALUE puts a number in their place",
    ]
    assert list(result["cases"]) == ["case_0", "case_1", "case_2"] and list(result["classes"]) == ["background", "ball", "other"]
    with pytest.raises(UserError, match="ball and box have one value"):
        train(folder, tmp_path / "run", device="cpu", quiet=True)


def test_spacings_and_units(tmp_path):
    folder = nnunet_folder(tmp_path, cases=5, shape=SHAPE)
    for name, edge in (("case_3", (1, 1, 4)), ("case_4", (1000, 1000, 1000))):
        for file in (folder / "imagesTr" / f"{name}_0000.nii.gz", folder / "labelsTr" / f"{name}.nii.gz"):
            write(file, np.asarray(open_image(file).own.dataobj), np.diag([*edge, 1]))
    assert found(folder) == {
        ("warning", "spacing", "case_3_0000.nii.gz"),
        ("error", "units", "case_4_0000.nii.gz"),
        ("warning", "units", "case_4_0000.nii.gz"),
    }


def test_ct_under_another_name_and_the_other_way_round(tmp_path):
    unnamed = nnunet_folder(tmp_path / "a", cases=1, shape=SHAPE, channels=("image",), edit=ct)
    assert found(unnamed) == {("error", "intensities", "case_0_0000.nii.gz")}
    assert found(unnamed, modality=["ct"]) == set()
    assert found(unnamed, modality=["mri"]) == {("warning", "intensities", "case_0_0000.nii.gz")}
    named = nnunet_folder(tmp_path / "b", cases=1, shape=SHAPE, channels=("MRI",), edit=ct)
    assert found(named) == {("warning", "intensities", "case_0_0000.nii.gz")}
    positive = nnunet_folder(tmp_path / "c", cases=1, shape=SHAPE, channels=("CT",), edit=lambda seed, image, label: (np.abs(image), label))
    assert found(positive) == {("warning", "intensities", "case_0_0000.nii.gz")}


def test_one_constant_channel_of_two(tmp_path):
    def spoil(seed, image, label):
        image[..., 1] = 5
        return image, label

    assert found(nnunet_folder(tmp_path, cases=1, shape=SHAPE, channels=("T1", "T2"), edit=spoil)) == {("warning", "constant", "case_0_0000.nii.gz")}


def test_equal_images_under_two_names(tmp_path):
    folder = nnunet_folder(tmp_path, cases=3, shape=SHAPE)
    first = open_image(folder / "imagesTr" / "case_0_0000.nii.gz")
    write_image(folder / "imagesTr" / "case_2_0000.nii.gz", first.voxels()[0], first)
    text = [f["text"] for f in check(folder, quiet=True)["findings"]]
    assert len(text) == 1 and re.fullmatch(r"\S+case_0_0000.nii.gz and \S+case_2_0000.nii.gz: equal images", text[0])


def test_classes_that_no_case_has_names_that_are_alike_and_sides(tmp_path):
    labels = {"background": 0, "ball": 1, "Ball": 2, "ghost": 3, "kidney_left": 4}
    findings = check(nnunet_folder(tmp_path, cases=1, shape=SHAPE, labels=labels), quiet=True)["findings"]
    assert [(f["level"], f["text"]) for f in findings] == [
        ("warning", "classes: no training case has ghost"),
        ("warning", "classes: no training case has kidney_left"),
        ("warning", "classes: ball and Ball differ in capital letters or spaces alone"),
        ("note", "classes: kidney_left has a side and no partner, so --mirror swap is not possible"),
    ]


def test_a_datalist_that_names_nothing(tmp_path):
    label = np.zeros((5, 4, 3), np.uint8)
    label[0, 0, 0] = 3
    image = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.float32)
    entries = [{"image": "missing.nii.gz", "label": "missing-label.nii.gz"}, pair(tmp_path, "a", image, label)]
    result = check(datalist(tmp_path, training=entries), quiet=True)
    assert {name: row["voxels"] for name, row in result["classes"].items()} == {"background": 59, "class_3": 1}
    assert list(result["channels"]) == ["channel_0"] and len(result["failed"]) == 2  # the image and the label map that are missing


def test_planes(tmp_path):
    flat = nnunet_folder(tmp_path / "a", cases=2, shape=(20, 18, 1), labels={"background": 0, "box": 2})
    assert found(flat) == {("note", "planes", "")} and check(flat, quiet=True)["mirror"] == [0]
    mixed = nnunet_folder(tmp_path / "b", cases=2, shape=SHAPE)
    image, label = (np.asarray(open_image(mixed / part).own.dataobj)[..., 3:4] for part in ("imagesTr/case_1_0000.nii.gz", "labelsTr/case_1.nii.gz"))
    write(mixed / "imagesTr" / "case_1_0000.nii.gz", image)
    write(mixed / "labelsTr" / "case_1.nii.gz", label)
    assert ("warning", "planes", "case_1_0000.nii.gz") in found(mixed)


def test_an_image_on_both_sides(tmp_path):
    entry = pair(tmp_path, "a", hounsfield(0), np.ones(SHAPE, np.uint8))
    write(tmp_path / "b-label.nii.gz", np.ones(SHAPE, np.uint8))
    listed = datalist(tmp_path, training=[entry], validation=[{**entry, "label": "b-label.nii.gz"}], channel_names={"0": "CT"})
    assert found(listed) == {("error", "split", ""), ("warning", "equal images", "a-image.nii.gz"), ("note", "sides", "")}


# -- the command


def test_the_exit_status(tmp_path, capsys):
    good = nnunet_folder(tmp_path / "good", cases=2, shape=SHAPE)
    warned = nnunet_folder(tmp_path / "warned", cases=2, shape=SHAPE, edit=changed(1, no_class))
    wrong = nnunet_folder(tmp_path / "wrong", cases=2, shape=SHAPE, edit=changed(1, nan))
    assert [cli.main(["check", str(folder), *words]) for folder in (good, warned, wrong) for words in ([], ["--strict"])] == [0, 0, 0, 1, 1, 1]
    said = capsys.readouterr()
    warning = f"{warned / 'labelsTr' / 'case_1.nii.gz'}: a label map without any class"
    assert f"warning: {warning}\n" in said.out and f"medssm check: {warning}\n" in said.err
    assert f"medssm check: {wrong / 'imagesTr' / 'case_1_0000.nii.gz'}: 1 voxel(s) are not finite" in said.err
    assert cli.main(["check", str(wrong), "--quiet"]) == 1
    assert capsys.readouterr().out == ""
    assert cli.main(["check", str(tmp_path / "nothing")]) == 2


def test_json(tmp_path, capsys):
    assert cli.main(["check", str(nnunet_folder(tmp_path, cases=2, shape=SHAPE)), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"]["box"]["voxels"] == 160


def test_few_of_many_are_printed(tmp_path, capsys):
    folder = nnunet_folder(tmp_path, cases=7, shape=SHAPE, edit=lambda seed, image, label: (image, np.zeros_like(label)))
    assert cli.main(["check", str(folder)]) == 0
    said = capsys.readouterr().out
    assert said.count("a label map without any class") == 5 and "warning: 2 more of the kind 'no class'" in said


def test_no_file_is_changed_or_added(tmp_path):
    folder = nnunet_folder(tmp_path / "data", cases=2, shape=SHAPE, edit=changed(1, nan))
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    check(folder, out=tmp_path / "report", quiet=True)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


# -- the page


def test_the_page_has_each_case_and_loads_nothing(tmp_path):
    folder = nnunet_folder(tmp_path / "data", cases=3, shape=SHAPE, edit=changed(2, no_class))
    result = check(folder, out=tmp_path / "report", quiet=True)
    page = (tmp_path / "report" / "check.html").read_text()
    assert result["report"] == str(tmp_path / "report" / "check.html")
    assert page.count("data:image/jpeg;base64,") == 3 and "case_2.nii.gz: a label map without any class" in page
    assert not re.search(r"(src|href)=.(?!data:)|url\(|@import|<script", page)


def test_nothing_is_written_over(tmp_path):
    folder = nnunet_folder(tmp_path / "data", cases=1, shape=SHAPE)
    for _ in range(2):  # its own page is written anew
        check(folder, out=tmp_path / "page.html", quiet=True)
    (tmp_path / "notes.html").write_text("mine")
    with pytest.raises(UserError, match=r"notes.html is there already"):
        check(folder, out=tmp_path / "notes.html", quiet=True)
    assert (tmp_path / "notes.html").read_text() == "mine"
    check(folder, out=tmp_path / "notes.html", overwrite=True, quiet=True)
    assert "<!DOCTYPE html>" in (tmp_path / "notes.html").read_text()
