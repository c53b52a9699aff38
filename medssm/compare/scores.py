"""What a side of a comparison got in each case: Dice, HD95, surface Dice and volumes of each class, as `medssm evaluate` takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from medssm.segment.evaluate import read_pair, scores
from medssm.segment.images import Image
from medssm.segment.volumetry import volumes

# dice, hd95 (mm), nsd: as of `evaluate`. ml, reference_ml: volumes. error_ml: ml - reference_ml. absolute_error_ml: its size.
METRICS = ("dice", "hd95", "nsd", "ml", "reference_ml", "error_ml", "absolute_error_ml")
COMPARED = ("dice", "hd95", "nsd", "absolute_error_ml")  # those of which a difference is better or worse
HIGHER = {"dice": True, "hd95": False, "nsd": True, "absolute_error_ml": False}  # whether more is better

Row: TypeAlias = "dict[str, float] | None"  # a class of a case: its metrics, None where it is empty in both label maps
Cases: TypeAlias = "dict[str, dict[str, Row]]"  # {case: {class: row}}


def score(
    prediction: Path, reference: Path, names: Mapping[str, tuple[int, ...]] | None, ignore: int | None, nsd_mm: float, files: list[Image]
) -> dict[str, Row]:
    """A case's classes. The files that were read are added to `files`. Raises UserError; see `evaluate.read_pair`."""
    found, truth, file = read_pair(prediction, reference, names, ignore, files)
    result = scores(found, truth, file.spacing.tolist(), names, nsd_mm)
    wanted = {name: (names or {}).get(name) or (int(name),) for name in result}
    ours, theirs = volumes(found, file, wanted), volumes(truth, file, wanted)
    for name, row in result.items():
        if row is not None:
            error = ours[name]["ml"] - theirs[name]["ml"]
            row |= {"ml": ours[name]["ml"], "reference_ml": theirs[name]["ml"], "error_ml": error, "absolute_error_ml": abs(error)}
    return result


def over_classes(case: Mapping[str, Row]) -> Row:
    """Each metric's mean over the classes that a case has."""
    rows = [row for row in case.values() if row]
    return {metric: sum(row[metric] for row in rows) / len(rows) for metric in METRICS} if rows else None


def averaged(sets: Sequence[Cases]) -> Cases:
    """Each case's mean over those of several trainings; a class that one of them found and the reference has not counts where it was found."""
    result: Cases = {}
    for case in dict.fromkeys(case for cases in sets for case in cases):
        there = [cases[case] for cases in sets if case in cases]
        result[case] = {}
        for name in dict.fromkeys(name for rows in there for name in rows):
            rows = [row for case_rows in there if (row := case_rows.get(name))]
            result[case][name] = {metric: sum(row[metric] for row in rows) / len(rows) for metric in METRICS} if rows else None
    return result
