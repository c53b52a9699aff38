"""Intervals over patients, and what they allow to say."""

import numpy as np
import pytest

from medssm.compare.scores import averaged
from medssm.compare.statistics import intervals, overall, verdict

OPTIONS = {"dice_margin": 0.01, "hd95_margin": 1.0, "fewest": 20}


def by_hand(values, groups, draws=20_000):
    """Percentiles of the mean over cases with patients drawn anew, one draw after the other."""
    random, names = np.random.default_rng(1), sorted(set(groups.values()))
    means = []
    for _ in range(draws):
        drawn = random.choice(names, len(names))
        own = [values[case] for name in drawn for case in values if groups[case] == name]
        means.append(np.mean(own))
    return np.percentile(means, (2.5, 97.5, 5, 95))


def column(seed, patients=30, scans=1, mean=0.8, spread=0.05):
    random = np.random.default_rng(seed)
    own = random.normal(mean, spread, patients)
    return {f"p{i:02d}_{scan}": float(own[i] + random.normal(0, 0.002)) for i in range(patients) for scan in range(scans)}


@pytest.mark.parametrize("scans", [1, 3])
def test_intervals_are_those_of_a_direct_bootstrap(scans):
    values = column(0, patients=25, scans=scans)
    groups = {case: case[:3] for case in values}
    found = intervals({"a": values}, groups, resamples=9999, seed=0)["a"]
    assert (found["n"], found["patients"]) == (25 * scans, 25) and found["mean"] == pytest.approx(np.mean(list(values.values())))
    wanted = by_hand(values, groups, draws=4000)
    ends = [found[name] for name in ("low", "high", "lower", "upper")]
    np.testing.assert_allclose(ends, wanted, atol=0.15 * (wanted[1] - wanted[0]))
    assert found["low"] < found["lower"] < found["mean"] < found["upper"] < found["high"]


def test_patients_with_different_numbers_of_cases_weigh_by_their_cases():
    values = {"a_0": 0.0, "a_1": 0.0, "a_2": 0.0, **{f"{letter}_0": 1.0 for letter in "bcdef"}}
    found = intervals({"x": values}, {case: case[0] for case in values}, resamples=2000, seed=0)["x"]
    assert found["mean"] == 5 / 8 and found["low"] < 5 / 8 < found["high"] <= 1.0


def test_a_patient_is_drawn_with_all_cases():
    """Nearly one value, of one to nine cases each: drawn apart, sums and numbers would vary far more."""
    cases = {f"{patient:02d}_{i}": 0.5 + 0.01 * (patient % 7) for patient in range(30) for i in range(patient % 9 + 1)}
    groups = {case: case[:2] for case in cases}
    found, wanted = intervals({"a": cases}, groups, resamples=4999, seed=0)["a"], by_hand(cases, groups, draws=4000)
    np.testing.assert_allclose([found[name] for name in ("low", "high")], wanted[:2], atol=0.15 * (wanted[1] - wanted[0]))


@pytest.mark.parametrize(
    ("lower", "upper", "says"), [(-0.009, 0.9, "non-inferior"), (-0.011, 0.9, "not established"), (-0.009, 1.1, "not established")]
)
def test_the_one_sided_bounds_decide(lower, upper, says):
    dice = {"patients": 20, "low": -0.02, "lower": lower, "upper": 0.0, "high": 0.1}
    hd95 = {"patients": 20, "low": -2.0, "lower": -1.0, "upper": upper, "high": 2.0}
    assert verdict(dice, hd95, **OPTIONS) == says


def test_the_seed_gives_the_same_interval_and_columns_share_their_draws():
    one, other = column(0), column(1)
    groups = {case: case for case in one}
    table = {"a": one, "b": other, "difference": {case: one[case] - other[case] for case in one}}
    found = intervals(table, groups, resamples=999, seed=3)
    assert found == intervals(table, groups, resamples=999, seed=3) != intervals(table, groups, resamples=999, seed=4)
    assert found["a"] == pytest.approx(intervals({"a": one}, groups, resamples=999, seed=3)["a"])


def test_equal_values_have_an_interval_of_no_length():
    values = {f"{i}": 0.0 for i in range(30)}
    found = intervals({"same": values}, {case: case for case in values}, resamples=999, seed=0)["same"]
    assert [found[name] for name in ("mean", "low", "high", "lower", "upper")] == [0.0] * 5


def test_below_five_patients_there_is_no_interval():
    values = {f"{i}_{scan}": 0.1 * i for i in range(4) for scan in range(9)}
    found = intervals({"few": values, "none": {}}, {case: case[0] for case in values}, resamples=999, seed=0)
    assert found["few"] == {"n": 36, "patients": 4, "mean": pytest.approx(0.15), "low": None, "high": None, "lower": None, "upper": None}
    assert found["none"]["mean"] is None and found["none"]["n"] == 0


def judged(dice_effect, hd95_effect, patients=60, seed=0):
    """The verdict on patients whose Dice differ by `dice_effect` and HD95 by `hd95_effect` mm in the mean."""
    random = np.random.default_rng(seed)
    groups = {f"{i}": f"{i}" for i in range(patients)}
    table = {"dice": random.normal(dice_effect, 0.02, patients), "hd95": random.normal(hd95_effect, 1.0, patients)}
    columns = {name: dict(zip(groups, values.tolist(), strict=True)) for name, values in table.items()}
    found = intervals(columns, groups, resamples=1999, seed=0)
    return verdict(found["dice"], found["hd95"], **OPTIONS)


@pytest.mark.parametrize("seed", range(5))
def test_non_inferiority_is_established_where_it_is_there_and_nowhere_else(seed):
    assert judged(0.0, 0.0, seed=seed) == "non-inferior"
    assert judged(0.02, -1.0, seed=seed) == "non-inferior"
    assert judged(-0.02, 0.0, seed=seed) == "not established"
    assert judged(0.0, 2.0, seed=seed) == "not established"
    assert judged(-0.01, 0.0, seed=seed) == "not established"  # at the margin
    assert judged(0.0, 0.0, patients=19, seed=seed) == "too few patients"


def test_at_the_margin_it_is_established_in_five_percent():
    wrong = sum(judged(-0.01, -5.0, patients=40, seed=seed) == "non-inferior" for seed in range(200))
    assert 2 <= wrong <= 22


def test_of_several_classes_each_one_that_has_enough_patients_counts():
    assert overall({"a": "non-inferior", "b": "too few patients"}) == "non-inferior"
    assert overall({"a": "non-inferior", "b": "not established"}) == "not established"
    assert overall({"a": "too few patients"}) == overall({}) == "not established"


def test_several_seeds_count_as_their_mean():
    row = dict.fromkeys(("dice", "hd95", "nsd", "ml", "reference_ml", "error_ml", "absolute_error_ml"), 1.0)
    half = {**row, "dice": 0.5}
    found = averaged([{"x": {"a": row, "b": None}}, {"x": {"a": half, "b": None}, "y": {"a": None, "b": half}}])
    assert found["x"]["a"]["dice"] == 0.75 and found["x"]["b"] is None and found["y"] == {"a": None, "b": half}
