"""medssm evaluate --uncertainty: rankings, reliability and coverage by hand, and the page in a real browser."""

import json
import math
import re

import nibabel as nib
import numpy as np
import pytest

from medssm import cli
from medssm.errors import UserError
from medssm.segment.evaluate import evaluate
from medssm.segment.uncertainty.ranking import Ranking
from medssm.segment.uncertainty.reliability import Reliability
from medssm.segment.volumetry import write_volumes
from tests.segment.browser import needs_browser, screenshot
from tests.segment.synthetic import volume, write

AFFINE = np.array([[-1.0, 0, 0, 12], [0, 1, 0, -3], [0, 0, 2, 5], [0, 0, 0, 1]])


def ranking(uncertainty, wrong):
    return Ranking.of(np.array(uncertainty, float), np.array(wrong, bool))


def test_a_ranking_by_hand():
    """Ten voxels: wrong are the most uncertain one, the third and the last."""
    found = ranking([0.1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 1.0], [1, 0, 1, 0, 0, 0, 0, 0, 0, 1])
    assert [found.found(share) for share in (0.1, 0.2, 0.3, 0.9, 1.0)] == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3, 1])
    assert found.to_find(1 / 3) == pytest.approx(1) and found.to_find(0.5) == pytest.approx(2.5) and found.to_find(1.0) == pytest.approx(10)
    np.testing.assert_allclose(found.curve(np.array([1.0, 0.9, 0.8, 0.7, 0.1])), [0.3, 2 / 9, 2 / 8, 1 / 7, 1])


def test_voxels_of_equal_uncertainty_count_as_in_any_order():
    found = ranking([0.5] * 8 + [0.0] * 2, [1, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    assert found.found(0.4) == pytest.approx(0.5) and found.to_find(0.5) == pytest.approx(4)
    assert ranking([0.0] * 5, [1, 0, 0, 0, 0]).area() == pytest.approx(0.2)


@pytest.mark.parametrize("seed", range(3))
def test_the_area_is_that_under_the_curve(seed):
    random = np.random.default_rng(seed)
    values, wrong = random.integers(0, 40, 3000) / 8, random.random(3000) < 0.2
    found = ranking(values, wrong)
    kept = np.linspace(0, 1, 200_001)[1:]
    assert found.area() == pytest.approx(found.curve(kept).mean(), abs=2e-5)
    best = ranking(wrong.astype(float), wrong)
    assert best.area() == pytest.approx(best.least_area()) and found.least_area() == best.least_area() < found.area()
    share = wrong.mean()
    assert best.area() == pytest.approx(share + (1 - share) * math.log(1 - share))


def test_what_is_less_certain_comes_first_at_any_size():
    values = np.exp(np.random.default_rng(0).uniform(-60, 3, 500))
    order = np.argsort(-values)
    wrong = np.zeros(500, bool)
    wrong[order[:5]] = True
    assert ranking(values, wrong).found(0.01) == 1 and ranking(-values, wrong).found(0.5) == pytest.approx(0.5)


def test_without_a_wrong_voxel_there_is_nothing_to_find():
    none, every = ranking([0.1, 0.2], [0, 0]), ranking([0.1, 0.2], [1, 1])
    assert none.found(0.5) is None and none.to_find(0.5) is None and none.area() == none.least_area() == 0
    assert every.area() == every.least_area() == 1 and (none + every).errors == 2


def test_reliability_by_hand():
    counts = Reliability()
    counts.add(np.array([0.0, 0.0, 0.62, 0.64, 0.63, 0.61, 1.0]), np.array([0, 0, 1, 0, 0, 1, 1]))
    result = counts.result()
    assert [row["voxels"] for row in result["bins"]] == [2, 4, 1] and result["bins"][1]["share"] == 0.5
    assert result["ece"] == pytest.approx(4 / 7 * 0.125) and result["ece_unsure"] == pytest.approx(0.125)
    counts.add(np.array([0.0]), np.array([1]))
    assert counts.result()["ece"] == pytest.approx((1 + 4 * 0.125) / 8)
    assert Reliability().result() == {"ece": None, "ece_unsure": None, "bins": []}


@pytest.fixture
def predicted(tmp_path):
    """Six cases: 60 voxels of the first plane are wrong, and the entropy is highest there, but for case_5, where it is highest elsewhere."""
    for seed in range(6):
        image, label = volume(seed, (20, 18, 16))
        found, entropy = label.copy(), np.full(label.shape, 0.001, np.float32)
        found[:3, :20, 0] = 2
        entropy[:3, :, 0] = 0.7
        if seed == 5:
            entropy = entropy[::-1].copy()
        name = f"case_{seed}"
        write(tmp_path / f"scans/{name}_0000.nii.gz", image[..., 0], AFFINE)
        write(tmp_path / f"references/{name}.nii.gz", label, AFFINE)
        write(tmp_path / f"predictions/{name}.nii.gz", found, AFFINE)
        write(tmp_path / f"predictions/{name}_entropy.nii.gz", entropy, AFFINE)
        write(tmp_path / f"predictions/{name}_mutual-information.nii.gz", entropy * 0.1, AFFINE)
        p = np.full((*label.shape, 3), 0.1, np.float32)
        np.put_along_axis(p, found[..., None].astype(int), 0.8, -1)
        write(tmp_path / f"predictions/{name}_probabilities.nii.gz", p, AFFINE)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "ball": 1, "box": 2}}))
    return tmp_path


def assessed(root, **options):
    options = {"classes": root / "dataset.json", "uncertainty": root / "page", "images": root / "scans", "quiet": True} | options
    return evaluate(root / "predictions", root / "references", **options)["uncertainty"]


def test_values_by_hand(predicted):
    rows = {f"case_{i}": {"ball": {"voxels": 1, "ml": 0.1}, "box": {"voxels": 1, "ml": 0.1}} for i in range(6)}
    truth = {i: [float((volume(i, (20, 18, 16))[1] == value).sum()) * 2 / 1000 for value in (1, 2)] for i in range(6)}
    for i in range(6):
        ball, box = rows[f"case_{i}"].values()
        ball |= {"members_low_ml": 0, "members_high_ml": 1e-3, "conformal_low_ml": truth[i][0] * 0.9, "conformal_high_ml": truth[i][0] * 1.1}
        ball["conformal_level"] = 0.9
        box |= {"members_low_ml": truth[i][1] * (1.5 if i == 2 else 0.5), "members_high_ml": truth[i][1] * 2}
    write_volumes(predicted / "predictions/volumes.csv", rows)
    result = assessed(predicted)
    total = 20 * 18 * 16
    for i in range(6):
        case = result["cases"][f"case_{i}"]
        assert case["voxels"] == total and case["wrong"] == 54
        assert case["entropy"]["found_0.05"] == pytest.approx(1 if i < 5 else (0.05 * total - 54) / (total - 54), abs=1e-6)
        assert case["entropy"]["to_halve"] == pytest.approx(27 if i < 5 else 54 + (total - 54) / 2)
        assert case["entropy"]["wrong_share"] == pytest.approx(54 / total)
    entropy = result["kinds"]["entropy"]
    assert entropy["halved_by_0.05"] == pytest.approx(5 / 6) and entropy["found_0.05"]["n"] == 6 and entropy["found_0.05"]["low"] < 1
    assert entropy == result["kinds"]["mutual-information"]
    ball, box = result["volumes"]["ball"], result["volumes"]["box"]
    assert ball["conformal"]["inside"] == 6 and ball["level"] == 0.9 and ball["members"]["inside"] == 0
    assert ball["conformal"]["low"] == pytest.approx(0.025 ** (1 / 6)) and ball["conformal"]["high"] == 1  # Clopper and Pearson's
    assert box["members"]["coverage"] == pytest.approx(5 / 6) and "conformal" not in box and box["level"] is None
    bins = result["reliability"]["ball"]["bins"]
    assert [row["probability"] for row in bins] == pytest.approx([0.1, 0.8], abs=1e-6) and bins[1]["share"] == pytest.approx(1, abs=0.01)
    assert result["not_measured"] == []


def test_the_surface_of_the_prediction_is_ranked_beside_the_maps(tmp_path):
    """A ball that is predicted a voxel too large: all wrong voxels lie at its surface, where the maps say nothing."""
    grid = np.linalg.norm(np.stack(np.meshgrid(*[np.arange(20) - 10] * 3, indexing="ij"), -1), axis=-1)
    write(tmp_path / "predictions/a.nii.gz", (grid < 6).astype(np.uint8), AFFINE)
    write(tmp_path / "references/a.nii.gz", (grid < 5.2).astype(np.uint8), AFFINE)
    for what in ("entropy", "mutual-information"):
        write(tmp_path / f"predictions/a_{what}.nii.gz", np.zeros((20, 20, 20), np.float32), AFFINE)
    result = evaluate(tmp_path / "predictions", tmp_path / "references", uncertainty=tmp_path / "page", quiet=True)
    found = result["uncertainty"]["cases"]["a"]
    assert result["unused"] == [] and found["boundary"]["found_0.1"] > 0.99 and found["entropy"]["found_0.1"] == pytest.approx(0.1)
    assert any("--classes RUN" in line for line in result["uncertainty"]["not_measured"])


def test_regions_and_voxels_without_a_label(tmp_path):
    """2 and 3 are in the same region, so a 3 in place of a 2 is right; a voxel that is ignored is neither right nor wrong."""
    truth, found = np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)
    truth[0], found[0] = 2, 3
    found[1, 0] = 1
    truth[2], found[2] = 9, 1
    write(tmp_path / "predictions/a.nii.gz", found)
    write(tmp_path / "references/a.nii.gz", truth)
    for what in ("entropy", "mutual-information"):
        write(tmp_path / f"predictions/a_{what}.nii.gz", found.astype(np.float32))
    options = {"classes": {"whole": (1, 2, 3), "core": (2, 3)}, "ignore": 9, "uncertainty": tmp_path / "page", "quiet": True}
    case = evaluate(tmp_path / "predictions", tmp_path / "references", **options)["uncertainty"]["cases"]["a"]
    assert (case["voxels"], case["wrong"], case["labelled"]) == (48, 4, 16)


def test_the_page_has_the_worst_case_first_and_loads_nothing(predicted):
    changed = predicted / "predictions/case_3.nii.gz"
    write(changed, np.asarray(nib.load(changed).dataobj) * 0, AFFINE)
    result = assessed(predicted)
    text = (predicted / "page/uncertainty.html").read_text()
    assert re.findall(r'alt="(case_\d): prediction', text)[0] == "case_3"
    assert {address[:11] for address in re.findall(r'(?:src|href)="([^"]*)', text)} == {"data:image/"}
    assert json.loads((predicted / "page/uncertainty.json").read_text())["cases"] == json.loads(json.dumps(result["cases"]))
    assert "No scan is known" not in text
    assessed(predicted, images=None)  # over its own page
    assert "No scan is known for case_3" in (predicted / "page/uncertainty.html").read_text()


def test_by_the_command(predicted, capsys):
    words = ["evaluate", str(predicted / "predictions"), str(predicted / "references"), "--classes", str(predicted / "dataset.json")]
    assert cli.main([*words, "--uncertainty", str(predicted / "page")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "checking the 5 % of the voxels with the highest entropy finds 84 % of the wrong ones" in shown
    assert "uncertainty.html" in shown.replace(" ", "") and "not measured: intervals on volumes" in shown


def test_what_cannot_be_shown(predicted):
    (predicted / "page").mkdir()
    (predicted / "page/uncertainty.html").write_text("mine")
    with pytest.raises(UserError, match=r"uncertainty: .*uncertainty.html is there already"):
        assessed(predicted)
    with pytest.raises(UserError, match="nowhere"):
        assessed(predicted, uncertainty=predicted / "other", images=predicted / "nowhere")
    write(predicted / "predictions/case_0_entropy.nii.gz", np.zeros((3, 3, 3), np.float32))
    with pytest.raises(UserError, match=r"case_0_entropy.nii.gz: not on the grid"):
        assessed(predicted, uncertainty=predicted / "other")
    for file in (predicted / "predictions").glob("*_entropy.nii.gz"):
        file.unlink()
    with pytest.raises(UserError, match=r"uncertainty: expected maps beside the predictions, as medssm predict --uncertainty writes them"):
        assessed(predicted, uncertainty=predicted / "other")
    assert not (predicted / "other").exists() and (predicted / "page/uncertainty.html").read_text() == "mine"


def test_names_cannot_run_in_the_page(predicted):
    for folder, what in (("references", ""), ("predictions", ""), ("predictions", "_entropy"), ("predictions", "_mutual-information")):
        (predicted / folder / f"case_0{what}.nii.gz").rename(predicted / folder / f"<script>alert(1){what}.nii.gz")
    assessed(predicted)
    assert "<script>alert" not in (predicted / "page/uncertainty.html").read_text()


@needs_browser
def test_a_browser_shows_the_curves_and_the_pictures(predicted):
    """The figures lie on white, in the middle of the page; the prediction's colours and the orange of the wrong voxels are to be seen."""
    assessed(predicted)
    picture = screenshot(predicted / "page/uncertainty.html", predicted, width=1100, height=2600).astype(int)
    assert picture.shape == (2600, 1100, 3)
    assert (picture[:2500, 1062:1080] == picture[0, 1070]).all()  # no table runs over the page's edge
    blue = (np.abs(picture - np.array([31, 119, 180])).max(-1) < 40).sum()  # matplotlib's first colour
    orange = ((picture[..., 0] > 150) & (picture[..., 2] < 80) & (picture[..., 1] > 90) & (picture[..., 1] < 190)).sum()
    assert blue > 300 and orange > 1000
    assert (picture.min(-1) < 60).sum() > 5000  # text and scans
