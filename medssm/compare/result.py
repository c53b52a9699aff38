"""The comparison itself: every side's means and every side's paired differences from one of them, from the scores of their cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medssm.compare.scores import COMPARED, METRICS, Cases, Row, over_classes
from medssm.compare.statistics import Column, intervals, overall, verdict

MEAN = "mean"  # of a case's classes, beside their names


def compared(
    sides: Mapping[str, Cases],
    patients: Mapping[str, str],
    *,
    baseline: str,
    dice_margin: float,
    hd95_margin: float,
    fewest: int,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """{"classes", "sides", "differences"} of sides that have the same cases.

    sides: {side: {"classes": {class: {"n", "empty_in_both", "empty_in_reference", metric: interval}}, "mean": the same over the classes of a case}}.
    differences, of each side but the baseline: {side: {"classes": {class: {"left_out", metric: interval, "verdict"}}, "mean": ..., "verdict"}}.
    An interval is {"n", "patients", "mean", "low", "high", "lower", "upper"}; see `statistics.intervals`. A case counts in a difference where both
    sides have the metric; `left_out` is the number of cases in which only one of the two has it: the class is in neither the reference nor the
    other prediction.
    """
    classes = list(dict.fromkeys(name for cases in sides.values() for rows in cases.values() for name in rows))
    columns: dict[tuple[str, str, str], dict[str, float]] = {}  # by side, class and metric
    tables = {side: {name: _rows(cases, name) for name in (*classes, MEAN)} for side, cases in sides.items()}
    for side, table in tables.items():
        for name, rows in table.items():
            for metric in METRICS:
                columns[side, name, metric] = {case: row[metric] for case, row in rows.items() if row}
    pairs = {
        (side, name, metric): _differences(columns[side, name, metric], columns[baseline, name, metric])
        for side in sides
        if side != baseline
        for name in (*classes, MEAN)
        for metric in COMPARED
    }
    named: dict[str, Column] = {" ".join(("of", *key)): column for key, column in columns.items()}
    named |= {" ".join(("difference", *key)): column for key, column in pairs.items()}
    found = intervals(named, patients, resamples=resamples, seed=seed)
    own: dict[str, Any] = {side: {} for side in sides}
    for side, table in tables.items():
        for name, rows in table.items():
            there = [row for row in rows.values() if row]
            own[side][name] = {
                "n": len(there),
                "empty_in_both": len(rows) - len(there),
                "empty_in_reference": sum(row["reference_ml"] == 0 for row in there),
                **{metric: found[" ".join(("of", side, name, metric))] for metric in METRICS},
            }
    differences: dict[str, Any] = {}
    for side in sides:
        if side == baseline:
            continue
        rows_of = {}
        for name in (*classes, MEAN):
            row = {metric: found[" ".join(("difference", side, name, metric))] for metric in COMPARED}
            both = {case for who in (side, baseline) for case in columns[who, name, "dice"]}
            rows_of[name] = {"left_out": len(both) - row["dice"]["n"], **row}
        for name in classes:
            rows_of[name]["verdict"] = verdict(
                rows_of[name]["dice"], rows_of[name]["hd95"], dice_margin=dice_margin, hd95_margin=hd95_margin, fewest=fewest
            )
        differences[side] = {
            "classes": {name: rows_of[name] for name in classes},
            MEAN: rows_of[MEAN],
            "verdict": overall({name: rows_of[name]["verdict"] for name in classes}),
        }
    return {
        "classes": classes,
        "sides": {side: {"classes": {name: table[name] for name in classes}, MEAN: table[MEAN]} for side, table in own.items()},
        "differences": differences,
    }


def change(before: Cases, after: Cases, patients: Mapping[str, str], **statistics: Any) -> dict[str, Any]:
    """A side's differences of the cases `after` from the same cases `before`, as `compared` gives them."""
    cases = {case: before[case] for case in after}
    found: dict[str, Any] = compared({"before": cases, "after": after}, patients, baseline="before", **statistics)["differences"]["after"]
    return found


def worst_first(tables: Mapping[str, Cases], cases: Sequence[str]) -> list[str]:
    """The cases by their lowest Dice of any class of any side, the lowest first; those without a class last."""

    def lowest(case: str) -> tuple[float, float]:
        dice = [row["dice"] for table in tables.values() for row in table[case].values() if row]
        means = [row["dice"] for table in tables.values() if (row := over_classes(table[case]))]
        return (min(dice), sum(means)) if dice else (2.0, 2.0)

    return sorted(cases, key=lowest)


def _rows(cases: Cases, name: str) -> dict[str, Row]:
    """{case: its row of a class, or the mean over its classes}."""
    return {case: over_classes(rows) if name == MEAN else rows.get(name) for case, rows in cases.items()}


def _differences(column: Column, other: Column) -> Column:
    """The first column less the other one, where both have a case."""
    return {case: value - other[case] for case, value in column.items() if case in other}
