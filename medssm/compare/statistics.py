"""Means over cases with bootstrap intervals over patients, and what paired differences allow to say.

A column holds a number for each case. Patients are drawn anew with replacement, with all their cases, and the same patients for every column that
has the same ones: so a difference of two columns is taken pair by pair. Intervals are bias-corrected and accelerated (BCa, Efron 1987), and plain
percentiles where that has no answer, as where all values are equal.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from scipy import stats

FEWEST = 5  # patients that an interval is given for
_AT_A_TIME = 500  # of the draws, in memory

Column: TypeAlias = "Mapping[str, float]"  # {case: value}


def intervals(columns: Mapping[str, Column], patients: Mapping[str, str], *, resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """{column: {"n", "patients", "mean", "low", "high", "lower", "upper"}}.

    n cases of so many patients; low and high: the 95 % interval of the mean; lower and upper: its one-sided 95 % bounds. None below five patients;
    the mean of an empty column is None.

    Args:
        columns: the values of each
        patients: {case: patient}
        resamples: how often patients are drawn anew
        seed: of the draws
    """
    result: dict[str, dict[str, Any]] = {}
    alike: dict[tuple[str, ...], list[str]] = {}  # columns by their patients
    for name, column in columns.items():
        there = tuple(sorted({patients[case] for case in column}))
        mean = float(np.mean(list(column.values()))) if column else None
        result[name] = {"n": len(column), "patients": len(there), "mean": mean, **dict.fromkeys(("low", "high", "lower", "upper"))}
        if len(there) >= FEWEST:
            alike.setdefault(there, []).append(name)
    for there, names in alike.items():
        position = {patient: i for i, patient in enumerate(there)}
        sums, counts = np.zeros((2, len(names), len(there)))
        for row, name in enumerate(names):
            for case, value in columns[name].items():
                sums[row, position[patients[case]]] += value
                counts[row, position[patients[case]]] += 1
        for name, ends in zip(names, _ends(sums, counts, resamples, seed), strict=True):
            result[name] |= dict(zip(("low", "high", "lower", "upper"), map(float, ends), strict=True))
    return result


def _ends(sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """(columns, 4): low and high, lower and upper, of sums and numbers of cases (columns, patients)."""
    options: dict[str, Any] = {"paired": True, "vectorized": True, "axis": -1, "batch": _AT_A_TIME, "method": "BCa"}
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        drawn = stats.bootstrap((sums, counts), _mean, n_resamples=resamples, rng=np.random.default_rng(seed), confidence_level=0.95, **options)
        again = stats.bootstrap((sums, counts), _mean, n_resamples=0, bootstrap_result=drawn, confidence_level=0.9, **options)
    ends = np.stack([*drawn.confidence_interval, *again.confidence_interval], -1)
    plain = np.percentile(drawn.bootstrap_distribution, (2.5, 97.5, 5, 95), axis=-1).T
    return np.where(np.isfinite(ends).all(-1, keepdims=True), ends, plain)


def _mean(sums: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
    return np.asarray(sums.sum(axis) / counts.sum(axis))


def verdict(dice: Mapping[str, Any], hd95: Mapping[str, Any], *, dice_margin: float, hd95_margin: float, fewest: int) -> str:
    """What paired differences from a baseline say of a class, of their intervals: "non-inferior", "not established" or "too few patients".

    It is non-inferior where with 95 % confidence, one-sided, the mean Dice is less than `dice_margin` below the baseline's and the mean HD95 less
    than `hd95_margin` mm above it; `fewest` patients are needed to say so.
    """
    if min(dice["patients"], hd95["patients"]) < max(fewest, FEWEST):
        return "too few patients"
    return "non-inferior" if dice["lower"] > -dice_margin and hd95["upper"] < hd95_margin else "not established"


def overall(verdicts: Mapping[str, str]) -> str:
    """The verdict on all classes: those with too few patients do not count, and one of the others at least is needed."""
    judged = [found for found in verdicts.values() if found != "too few patients"]
    return "non-inferior" if judged and set(judged) == {"non-inferior"} else "not established"
