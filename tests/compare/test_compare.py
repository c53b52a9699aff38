"""medssm compare: sets of predictions and runs on the same cases."""

import json
import re

import numpy as np
import pytest

from medssm import cli
from medssm.compare import compare, disturb, figures, sources
from medssm.errors import UserError
from medssm.segment.evaluate import evaluate
from medssm.segment.predict import predict
from medssm.segment.train import train
from tests.segment.browser import needs_browser, screenshot
from tests.segment.synthetic import UNET, nnunet_folder, write

EDGES = np.diag([1.0, 1.0, 2.0, 1.0])


def cube(side, shift=0, value=1):
    label = np.zeros((24, 20, 10), np.uint8)
    label[4 + shift : 4 + shift + side, 4:12, 2:8] = value
    return label


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """24 patients of one scan: references, a good side, one that is a little worse, and one that is much worse; scans too."""
    root, random = tmp_path_factory.mktemp("sides"), np.random.default_rng(0)
    for i in range(24):
        truth = cube(8 + i % 5)
        name = f"p{i:02d}.nii.gz"
        write(root / "labels" / name, truth, EDGES)
        write(root / "scans" / f"p{i:02d}_0000.nii.gz", (truth * 50 + random.normal(0, 5, truth.shape)).astype(np.float32), EDGES)
        for side, shift in (("good", i % 2), ("like", (i + 1) % 2), ("bad", 3)):
            write(root / side / name, np.roll(truth, shift, 0), EDGES)
    return root


@pytest.fixture(scope="module")
def compared(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    return out, compare(
        [folders / name for name in ("good", "like", "bad")], references=folders / "labels", images=folders / "scans", out=out, quiet=True
    )


def test_each_side_has_what_evaluate_finds(folders, compared):
    _, result = compared
    for side in ("good", "like", "bad"):
        wanted = evaluate(folders / side, folders / "labels", quiet=True)
        own = result["sides"][side]
        for metric in ("dice", "hd95", "nsd"):
            assert own["classes"]["1"][metric]["mean"] == pytest.approx(wanted["classes"]["1"][metric]["mean"])
            assert own["mean"][metric]["mean"] == pytest.approx(wanted["mean"][metric]["mean"])
        ends = own["classes"]["1"]["dice"]
        np.testing.assert_allclose([ends["low"], ends["high"]], [wanted["classes"]["1"]["dice"][end] for end in ("low", "high")], atol=0.005)
    row = result["sides"]["bad"]["cases"]["p03"]["1"]
    assert row["ml"] == row["reference_ml"] == pytest.approx(11 * 8 * 6 * 2 / 1000) and row["error_ml"] == 0


def test_differences_are_paired_and_judged(compared):
    _, result = compared
    assert result["baseline"] == "good" and list(result["differences"]) == ["like", "bad"] and result["patients"] == 24
    cases = {side: [case["1"]["dice"] for case in result["sides"][side]["cases"].values()] for side in ("good", "like", "bad")}
    for side in ("like", "bad"):
        own = result["differences"][side]["classes"]["1"]["dice"]
        assert own["mean"] == pytest.approx(np.mean(np.array(cases[side]) - np.array(cases["good"]))) and own["low"] < own["mean"] < own["high"]
    assert result["differences"]["bad"]["verdict"] == result["differences"]["bad"]["classes"]["1"]["verdict"] == "not established"


def test_a_side_that_is_as_good_is_non_inferior(folders):
    same = compare([folders / "good", folders / "labels", folders / "bad"], references=folders / "labels", quiet=True)
    assert {side: row["verdict"] for side, row in same["differences"].items()} == {"labels": "non-inferior", "bad": "not established"}
    few = compare([folders / "good", folders / "labels"], references=folders / "labels", fewest=25, quiet=True)
    assert few["differences"]["labels"]["verdict"] == "not established"
    assert few["differences"]["labels"]["classes"]["1"]["verdict"] == "too few patients"
    wide = compare([folders / "good", folders / "bad"], references=folders / "labels", baseline="good", dice_margin=0.9, hd95_margin=20.0, quiet=True)
    assert wide["differences"]["bad"]["verdict"] == "non-inferior"
    other = compare([folders / "good", folders / "bad"], references=folders / "labels", baseline="bad", names=["a", "bad"], quiet=True)
    assert list(other["differences"]) == ["a"] and other["differences"]["a"]["verdict"] == "non-inferior"


def test_the_files_hold_the_same(compared):
    out, result = compared
    kept = json.loads((out / "compare.json").read_text())
    assert kept == json.loads(json.dumps({name: value for name, value in result.items() if name != "page"}))
    assert {file.name for file in out.iterdir()} == {"compare.json", "compare.html", "differences.png", "dice.png", "volumes.png"}
    text = (out / "compare.html").read_text()
    first = re.findall(r'<img alt="(p\d\d) by (\w+)"', text)
    lowest = sorted(result["cases"], key=lambda case: result["sides"]["bad"]["cases"][case]["1"]["dice"])
    assert first[0][0] == lowest[0] and len(first) == 3 * 12
    assert "not established" in text and "http" not in text.replace("http-equiv", "")


@needs_browser
def test_the_page_opens_in_a_browser(compared, tmp_path):
    picture = screenshot(compared[0] / "compare.html", tmp_path, height=2600)
    assert (
        picture.std() > 20 and (np.abs(picture.astype(int) - picture.mean(-1, keepdims=True)).max(-1) > 60).sum() > 500
    )  # text, and colours of plots


def test_classes_that_are_empty(tmp_path):
    """Empty in both: left out and counted. Found where the reference has none: it counts for that side, and not in the difference."""
    empty, ball = cube(0), cube(6)
    for i in range(6):
        write(tmp_path / "labels" / f"{i}.nii.gz", empty if i < 2 else ball, EDGES)
        write(tmp_path / "a" / f"{i}.nii.gz", empty if i < 2 else ball, EDGES)
        write(tmp_path / "b" / f"{i}.nii.gz", empty if i in (0, 5) else ball, EDGES)
    result = compare([tmp_path / "a", tmp_path / "b"], references=tmp_path / "labels", classes={"ball": 1}, quiet=True)
    a, b = (result["sides"][side]["classes"]["ball"] for side in "ab")
    assert (a["n"], a["empty_in_both"], a["empty_in_reference"]) == (4, 2, 0) and a["dice"]["mean"] == 1.0
    assert (b["n"], b["empty_in_both"], b["empty_in_reference"]) == (5, 1, 1) and b["dice"]["mean"] == pytest.approx(3 / 5)
    difference = result["differences"]["b"]["classes"]["ball"]
    assert difference["dice"]["n"] == 4 and difference["left_out"] == 1 and difference["dice"]["mean"] == pytest.approx(-1 / 4)
    diagonal = np.linalg.norm([24, 20, 20])
    assert difference["hd95"]["mean"] == pytest.approx(diagonal / 4) and difference["verdict"] == "too few patients"


def test_patients_of_several_scans(tmp_path):
    for i in range(6):
        for scan in range(2):
            for side, shift in (("labels", 0), ("a", 1), ("b", i % 3)):
                write(tmp_path / side / f"p{i}_{scan}.nii.gz", cube(8, shift), EDGES)
    result = compare([tmp_path / "a", tmp_path / "b"], references=tmp_path / "labels", patient=r"(p\d)", quiet=True)
    assert result["patients"] == 6 and result["differences"]["b"]["classes"]["1"]["dice"]["n"] == 12
    assert result["differences"]["b"]["classes"]["1"]["dice"]["patients"] == 6


def test_a_case_that_one_side_lacks(folders, tmp_path):
    for name in ("p00", "p01", "p02", "p03", "p04", "p05"):
        write(tmp_path / "some" / f"{name}.nii.gz", cube(8), EDGES)
    write(tmp_path / "some" / "extra.nii.gz", cube(8), EDGES)
    sides = [folders / "good", tmp_path / "some"]
    with pytest.raises(UserError, match=r"predictions: some lacks p06, p07, p08, p09, p10 and 13 more, which another one has: --common compares"):
        compare(sides, references=folders / "labels", quiet=True)
    result = compare(sides, references=folders / "labels", common=True, quiet=True)
    assert len(result["cases"]) == 6 and len(result["left_out"]["good"]["others_lack"]) == 18
    assert result["left_out"]["some"] == {"others_lack": [], "no_reference": ["extra"]}
    only = compare([tmp_path / "some", folders / "good"], references=folders / "labels", common=True, quiet=True)
    assert only["baseline"] == "some"


def test_a_case_that_cannot_be_compared_has_failed_and_is_left_out_of_all(folders, tmp_path, capsys):
    for i in range(3):
        write(tmp_path / "a" / f"p{i:02d}.nii.gz", cube(8), EDGES)
        write(tmp_path / "b" / f"p{i:02d}.nii.gz", cube(8), EDGES if i else np.eye(4))
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--references", str(folders / "labels"), "--common", "--json"]) == 1
    printed, error = capsys.readouterr()
    result = json.loads(printed)
    assert list(result["failed"]) == ["p00"] and list(result["cases"]) == list(result["sides"]["a"]["cases"]) == ["p01", "p02"]
    assert "medssm compare: b: " in error and "p00.nii.gz" in error


def test_the_command_prints_tables(folders, capsys):
    words = ["compare", str(folders / "good"), str(folders / "bad"), "--references", str(folders / "labels"), "--resamples", "200"]
    assert cli.main(words) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "paired differences from good" in printed and "bad: not established" in printed and "24 case(s) of 24 patient(s)" in printed


@pytest.mark.parametrize(
    ("sides", "options", "line"),
    [
        (["good"], {}, r"predictions: expected two or more folders, got 1"),
        (["good", "good"], {}, r"predictions: .*good is named twice"),
        (["good", "none"], {}, r"predictions: .*none: no such folder"),
        (["good", "bad"], {"names": ["a"]}, r"names: expected 2 different ones, one for each folder, got a"),
        (["good", "bad"], {"baseline": "best"}, r"baseline: expected one of good, bad, got 'best'"),
        (["good", "bad"], {"references": "nowhere"}, r"references: nowhere: no such file or folder"),
        (["good", "bad"], {"nsd_mm": -1}, r"nsd_mm: expected 0 or more, got -1"),
        (["good", "bad"], {"resamples": 10}, r"resamples: expected 100 or more, got 10"),
        (["good", "bad"], {"dice_margin": float("nan")}, r"dice_margin: expected 0 or more, got nan"),
        (["good", "bad"], {"images": "nowhere"}, r"images: nowhere: no such folder"),
        (["good", "bad"], {"patient": r"(sub-\d+)"}, r"patient: .* is not in the name p00"),
        (["good", "bad"], {"disturb": ["fog"]}, r"disturb: expected noise, bias-field, thick-slices, got 'fog'"),
        (["good", "bad"], {"disturb": ["noise"]}, r"disturb: expected runs, which can segment disturbed scans, got the folder of label maps good"),
        (["good", "bad"], {"measure": True}, r"measure: expected a run, got folders of label maps: good, bad"),
        (["good", "bad"], {"classes": {"other": 2}}, r"label value\(s\) 1 outside the classes"),
    ],
)
def test_bad_input_gets_one_line(folders, sides, options, line):
    with pytest.raises(UserError, match=line):
        compare([folders / side for side in sides], **{"references": folders / "labels", "quiet": True, **options})


def test_nothing_of_other_origin_is_written_over(folders, tmp_path):
    (tmp_path / "compare.html").write_text("mine")
    sides = [folders / "good", folders / "bad"]
    with pytest.raises(UserError, match=r"compare.html is there already, and this command did not write it"):
        compare(sides, references=folders / "labels", out=tmp_path, quiet=True)
    for _ in range(2):
        compare(sides, references=folders / "labels", out=tmp_path, resamples=200, overwrite=_ == 0, quiet=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data set, and two folds of one training on it."""
    root = tmp_path_factory.mktemp("runs")
    folder = nnunet_folder(root / "data", shape=(20, 18, 16))
    few = {"patch": (16, 16, 16), "max_steps": 2, "folds": 4, "validations": 0, "device": "cpu", "quiet": True}
    for fold in range(2):
        train(folder, root / "trained" / f"fold_{fold}", model="monai.networks.nets.UNet", model_kwargs=UNET, fold=fold, **few)
    return folder, root / "trained"


def test_runs_are_predicted(trained, tmp_path):
    """Two folds of one training against one of them: the held-out cases of both, with what is known of the training."""
    folder, trained = trained
    with pytest.raises(UserError, match=r"fold_0 lacks case_\d, which another one has"):
        compare([trained, trained / "fold_0"], references=folder / "labelsTr", quiet=True)
    tmp_path = tmp_path / "compared"
    result = compare([trained, trained / "fold_0"], references=folder / "labelsTr", names=["both", "first"], common=True, out=tmp_path, quiet=True)
    held_out = {
        fold: [case["name"] for case in json.loads((trained / fold / "cases.json").read_text())["validation"]] for fold in ("fold_0", "fold_1")
    }
    assert list(result["cases"]) == held_out["fold_0"] and result["left_out"]["both"]["others_lack"] == held_out["fold_1"]
    facts = result["sides"]["both"]["facts"]
    assert (
        facts["runs"] == 2
        and facts["steps"] == 2
        and facts["parameters"] > 1000
        and facts["multiply_adds"] > 1e6
        and facts["file_bytes"] == (trained / "fold_0" / "model.safetensors").stat().st_size
        and facts["training_joules"] is None
    )
    assert result["differences"]["first"]["classes"]["1"]["dice"]["mean"] == 0.0
    text = (tmp_path / "compare.html").read_text()
    assert result["disturbed"] == {} and (tmp_path / "pareto.png").is_file() and "cold_seconds" not in facts
    assert "not measured" in text and "Disturbed scans" not in text and f"{facts['parameters'] / 1e6:.2f} M" in text


def test_runs_segment_disturbed_scans(trained, tmp_path, capsys):
    """The scans are those of `disturb`; each side is compared with the baseline under the same disturbance, and with itself without it."""
    folder, trained = trained
    words = [
        "compare",
        trained / "fold_0",
        trained,
        "--references",
        folder / "labelsTr",
        "--common",
        "--names",
        "first",
        "both",
        "--resamples",
        "200",
    ]
    words += ["--disturb", "noise", "thick-slices", "noise", "--out", tmp_path / "compared"]
    assert cli.main(list(map(str, words))) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "disturbed scans" in printed and "thick-slices" in printed
    result = json.loads((tmp_path / "compared" / "compare.json").read_text())
    assert list(result["disturbed"]) == ["noise", "thick-slices"]
    (case,) = result["cases"]
    listed, failed = disturb.write(sources._held_out(trained / "fold_0"), 1, "noise", tmp_path / "scans", 0)
    predict(trained / "fold_0", listed, tmp_path / "found", format="nifti", postprocessing="none", device="cpu", quiet=True)
    wanted = evaluate(tmp_path / "found", folder / "labelsTr", classes={"1": 1, "2": 2}, quiet=True)["cases"][case]
    found = result["disturbed"]["noise"]
    assert not failed and found["sides"]["first"]["cases"][case]["1"]["dice"] == pytest.approx(wanted["1"]["dice"])
    assert found["differences"]["both"]["mean"]["dice"]["mean"] == 0.0
    before, after = result["sides"]["first"]["mean"]["dice"]["mean"], found["sides"]["first"]["mean"]["dice"]["mean"]
    assert found["changes"]["first"]["mean"]["dice"]["mean"] == pytest.approx(after - before)
    assert "Disturbed scans" in (tmp_path / "compared" / "compare.html").read_text()


@pytest.mark.thorough  # a new process
def test_runs_are_measured(trained, tmp_path):
    folder, trained = trained
    out, references = tmp_path / "found", folder / "labelsTr"
    side = sources.sides_of([trained / "fold_0", trained / "fold_1"], None)[0]
    wanted = {file.name.removesuffix(".nii.gz"): file for file in references.iterdir()}
    sources.find(side, out, "cpu", True, wanted)
    facts = side.facts
    assert 0 < facts["ece"] < 1 and 0 < facts["ece_unsure"] < 1 and facts["cold_seconds"] > 0.5 and facts["peak_bytes"] > 2**26
    (case,) = side.files
    assert [file.name for file in out.glob("*.nii.gz")] == [f"{case}.nii.gz"]


def test_plots_of_one_patient_are_drawn_without_intervals(folders, tmp_path):
    for side in ("a", "b"):
        write(tmp_path / side / "p00.nii.gz", cube(8), EDGES)
    result = compare([tmp_path / "a", tmp_path / "b"], references=folders / "labels", quiet=True)
    assert set(figures.plots(result)) == {"dice", "volumes"} and result["differences"]["b"]["classes"]["1"]["dice"]["low"] is None
