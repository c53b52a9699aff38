"""Conformal bounds on volumes: the exact quantile, coverage on exchangeable patients, and what training keeps for them."""

import json
import math
import re

import numpy as np
import pytest
from scipy import stats

from medssm.errors import UserError
from medssm.segment.images import read_label
from medssm.segment.predict import predict
from medssm.segment.train import train
from medssm.segment.uncertainty.conformal import CONFORMAL, fewest, interval, load, save, score
from medssm.segment.volumetry import VOLUMES, read_volumes
from tests.segment.synthetic import UNET, nnunet_folder


def test_the_score_by_hand():
    assert score(3, 1) == score(1, 3) == pytest.approx(math.log(2))
    assert score(0, 0) == 0 and score(0, 1) == pytest.approx(math.log(2))


@pytest.mark.parametrize(("n", "level", "rank"), [(9, 0.9, 9), (10, 0.9, 10), (19, 0.9, 18), (99, 0.56, 56), (99, 0.9, 90), (100, 0.9, 91)])
def test_the_quantile_is_the_finite_sample_one(n, level, rank):
    """The ceil((n + 1) level)-th smallest score, whatever their order."""
    scores = [0.01 * (i + 1) for i in range(n)]
    np.random.default_rng(0).shuffle(scores)
    low, high = interval([4.0], [scores], level)
    assert high == pytest.approx(5 * math.exp(0.01 * rank) - 1) and low == pytest.approx(5 * math.exp(-0.01 * rank) - 1)


def test_too_few_patients_have_no_interval():
    assert [fewest(level) for level in (0.5, 0.8, 0.9, 0.95, 0.99)] == [1, 4, 9, 19, 99]
    assert interval([4.0], [[0.1] * 8], 0.9) is None and interval([4.0], [[0.1] * 9], 0.9) is not None


def test_no_volume_is_below_0():
    assert interval([0.1], [[1.0] * 9], 0.9) == (0.0, pytest.approx(1.1 * math.e - 1))


def test_folds_compare_a_held_out_patient_with_its_own_run():
    """CV+: two runs with five patients each; by hand of ten bounds the first and the last one."""
    scores = [[0.1, 0.2, 0.3, 0.4, 0.5], [0.0, 0.0, 0.0, 0.0, 0.9]]
    low, high = interval([1.0, 3.0], scores, 0.9)
    assert low == pytest.approx(2 * math.exp(-0.5) - 1) and high == pytest.approx(4 * math.exp(0.9) - 1)
    low, high = interval([1.0, 3.0], scores, 0.7)  # the third one from either end
    assert low == pytest.approx(2 * math.exp(-0.3) - 1) and high == pytest.approx(3.0)


@pytest.mark.parametrize("folds", [1, 3])
def test_coverage_on_exchangeable_patients(folds):
    """Over many draws of held-out patients and one new patient: at least the level; of one run exactly ceil((n + 1) level) / (n + 1)."""
    random, draws, n, level = np.random.default_rng(0), 3000, 24, 0.9
    inside = 0
    for _ in range(draws):
        reference = random.gamma(2, 2, n + 1)
        bias = random.normal(0, 0.1, folds)  # of each run
        found = [reference * np.exp(b + random.normal(0, 0.2, n + 1)) for b in bias]
        scores = [[score(found[k][i], reference[i]) for i in range(k, n, folds)] for k in range(folds)]
        low, high = interval([one[n] for one in found], scores, level)
        inside += low <= reference[n] <= high
    wanted = math.ceil((n + 1) * level) / (n + 1)
    low, high = stats.binom.interval(0.999, draws, wanted)
    assert low <= inside and (folds > 1 or inside <= high)


def measured(*patients, found=2.0, reference=1.0):
    pair = {"found_ml": found, "reference_ml": reference}
    return {f"case_{i}": {"patient": patient, "volumes": {"ball": pair}} for i, patient in enumerate(patients)}


def test_a_patient_counts_once_with_the_largest_score(tmp_path):
    save(tmp_path / CONFORMAL, measured("a", "a", "b") | {"worse": {"patient": "a", "volumes": {"ball": {"found_ml": 7.0, "reference_ml": 1.0}}}})
    (scores,), said = load([tmp_path], ["ball"], 0.5)
    assert scores == {"a": {"ball": pytest.approx(math.log(4))}, "b": {"ball": pytest.approx(math.log(1.5))}}
    assert said == "conformal intervals of level 0.5 from 2 held-out patients"


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ({"one": None}, "one has no conformal.json"),
        ({"one": measured(*map(str, range(8)))}, r"8 held-out patient\(s\), a level of 0.9 needs 9"),
        ({"one": measured(*map(str, range(9))), "two": measured("x", "3")}, "patient 3 was held out by two of the runs"),
    ],
)
def test_why_there_are_no_intervals_is_said(tmp_path, runs, said):
    for name, cases in runs.items():
        (tmp_path / name).mkdir()
        if cases:
            save(tmp_path / name / CONFORMAL, cases)
    scores, line = load([tmp_path / name for name in runs], ["ball"], 0.9)
    assert not scores and line.startswith("no conformal intervals: ") and re.search(said, line)


@pytest.mark.parametrize("text", ['{"cases": 3}', '{"cases": {"a": {"patient": "a", "volumes": {}}}}', "[]", "{"])
def test_a_damaged_file_is_one_line(tmp_path, text):
    (tmp_path / CONFORMAL).write_text(text)
    with pytest.raises(UserError, match=r"conformal.json: ") as error:
        load([tmp_path], ["ball"], 0.9)
    assert len(str(error.value).splitlines()) == 1


AFFINE = np.array([[-1.4, 0, 0, 9], [0, 0, 1.1, 2], [0, 0.9, 0, 3], [0, 0, 0, 1.0]])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that held out 10 of 12 cases, at another spacing than theirs and along other axes."""
    root = tmp_path_factory.mktemp("held_out")
    folder = nnunet_folder(root / "data", cases=12, shape=(16, 20, 18), affine=AFFINE)
    splits = [{"train": ["case_0", "case_1"], "val": [f"case_{i}" for i in range(2, 12)]}]
    (folder / "splits.json").write_text(json.dumps(splits))
    options = {"model": "monai.networks.nets.UNet", "model_kwargs": {**UNET, "norm": "batch"}, "patch": (16, 16, 16), "lr": 0.01, "validations": 1}
    spacing = (1.2, 1.2, 1.2)
    train(folder, root / "run", splits=folder / "splits.json", fold=0, spacing=spacing, max_steps=40, device="cpu", quiet=True, **options)
    return root / "run"


def test_training_measures_its_held_out_cases_as_predict_does(run, tmp_path):
    kept = json.loads((run / CONFORMAL).read_text())["cases"]
    listed = run / "cases.json"
    volumes = predict(run, listed, tmp_path, section="validation", device="cpu", quiet=True)["volumes"]
    assert sorted(kept) == sorted(volumes) and len(kept) == 10
    for name, case in kept.items():
        assert case["patient"] == name
        assert {label: row["found_ml"] for label, row in case["volumes"].items()} == {label: row["ml"] for label, row in volumes[name].items()}
        truth = read_label(run.parent / f"data/labelsTr/{name}.nii.gz")[0]
        voxel = 1.4 * 1.1 * 0.9 / 1000
        assert case["volumes"]["ball"]["reference_ml"] == pytest.approx((truth == 1).sum() * voxel)
    assert any(row["found_ml"] > 0 for case in kept.values() for row in case["volumes"].values())


def test_predict_gives_the_interval_of_the_run(run, tmp_path, capsys):
    """About what the run finds without mirroring, whatever the members are."""
    image = run.parent / "data/imagesTr/case_0_0000.nii.gz"
    plain = predict(run, image, tmp_path / "plain", device="cpu", quiet=True)["volumes"]["case_0"]
    predict(run, image, tmp_path / "out", device="cpu", uncertainty="mirror", level=0.8)
    assert "2 mirrored passes; conformal intervals of level 0.8 from 10 held-out patients" in capsys.readouterr().err
    kept = json.loads((run / CONFORMAL).read_text())["cases"]
    rows = read_volumes(tmp_path / "out" / VOLUMES)["case_0"]
    for label, row in rows.items():
        scores = sorted(score(*case["volumes"][label].values()) for case in kept.values())
        low, high = ((plain[label]["ml"] + 1) * math.exp(sign * scores[8]) - 1 for sign in (-1, 1))  # ceil(11 x 0.8) = 9
        assert row["conformal_low_ml"] == pytest.approx(max(0, low), rel=1e-4) and row["conformal_high_ml"] == pytest.approx(high, rel=1e-4)
        assert row["conformal_level"] == 0.8 and row["members_low_ml"] <= plain[label]["ml"] * 1.00001 <= row["members_high_ml"] * 1.0001


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": "best", "overlap": 0.25}, "training measured the held-out patients without --weights best, --overlap"),
        ({"postprocessing": "none"}, "without --postprocessing none"),
        ({"level": 0.95}, r"10 held-out patient(s), a level of 0.95 needs 19"),
    ],
)
def test_no_bound_is_given_that_does_not_hold(run, tmp_path, options, said):
    image = run.parent / "data/imagesTr/case_0_0000.nii.gz"
    result = predict(run, image, tmp_path, device="cpu", quiet=True, uncertainty="auto", **options)
    assert said in result["uncertainty"]["intervals"]
    assert not any("conformal_low_ml" in row for row in result["volumes"]["case_0"].values())
    (line,) = {line.partition(",")[2].rpartition(",")[2] for line in (tmp_path / VOLUMES).read_text().splitlines()[1:]}
    assert line == ""  # no number in the column of the level


def test_training_anew_leaves_no_old_bounds(tmp_path):
    folder = nnunet_folder(tmp_path / "data", cases=2, shape=(16, 16, 16))
    options = {"model": "monai.networks.nets.UNet", "model_kwargs": UNET, "patch": (16, 16, 16), "max_steps": 1, "device": "cpu", "quiet": True}
    train(folder, tmp_path / "run", fold=0, folds=2, **options)
    assert len(json.loads((tmp_path / "run" / CONFORMAL).read_text())["cases"]) == 1
    train(folder, tmp_path / "run", overwrite=True, **options)
    assert not (tmp_path / "run" / CONFORMAL).exists()


def test_voxels_without_a_label_make_no_volume(tmp_path):
    labels = {"background": 0, "ball": 1, "box": 2, "ignore": 3}
    folder = nnunet_folder(tmp_path / "data", cases=2, shape=(16, 16, 16), labels=labels)
    options = {"model": "monai.networks.nets.UNet", "model_kwargs": UNET, "patch": (16, 16, 16), "max_steps": 1, "device": "cpu", "quiet": True}
    train(folder, tmp_path / "run", fold=0, folds=2, **options)
    assert (tmp_path / "run/postprocessing.json").exists() and not (tmp_path / "run" / CONFORMAL).exists()
