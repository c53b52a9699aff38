"""Whether the uncertainty of predictions is of any use: wrong voxels among the most uncertain ones, the reliability of probabilities, and how often
the intervals on volumes hold the reference.

A voxel is wrong where prediction and reference are not in the same classes. All voxels of an image are ranked, its background too. What needs no
network is ranked beside it: voxels by how near they are to the surface of what was predicted ("boundary").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from scipy import ndimage, stats

from medssm.errors import UserError
from medssm.segment.images import Image, aligned, open_image, read_label
from medssm.segment.uncertainty.ranking import Ranking
from medssm.segment.uncertainty.reliability import Reliability
from medssm.segment.uncertainty.sums import ENTROPY, MUTUAL_INFORMATION, PROBABILITIES, map_of
from medssm.segment.volumetry import VOLUMES, read_volumes, volumes

KINDS = (ENTROPY, MUTUAL_INFORMATION, BOUNDARY := "boundary")
SHARES = (0.01, 0.05, 0.1)  # of the voxels, the most uncertain ones
COVERAGES = np.unique(np.concatenate([np.linspace(0.01, 0.9, 90), np.linspace(0.9, 1, 101)]).round(4))
Classes: TypeAlias = "Mapping[str, tuple[int, ...]]"
Bootstrap: TypeAlias = "Callable[[Mapping[str, float]], tuple[float, float] | None]"


@dataclass(frozen=True)
class Pair:
    """A prediction and its reference on one grid; voxels that are not `counted` have no label. `image` is the prediction's file, turned to it."""

    prediction: Path
    found: np.ndarray
    truth: np.ndarray
    counted: np.ndarray
    image: Image

    @classmethod
    def read(cls, prediction: Path, reference: Path, ignore: int | None) -> Pair:
        truth, like = read_label(reference)
        found, image = read_label(prediction, like)
        return cls(prediction, found, truth, np.full(truth.shape, True) if ignore is None else truth != ignore, image)

    def beside(self, what: str) -> np.ndarray:
        """A map beside the prediction, (c, x, y, z). UserError where it cannot be read or lies on another grid."""
        return aligned(open_image(map_of(self.prediction, what)), self.image).voxels(np.float32)

    def wrong(self, classes: Classes) -> np.ndarray:
        """Where the two are not in the same classes."""
        differs = self.found != self.truth  # of regions, other values may be in the same ones
        some = np.nonzero(differs)
        found, truth = self.found[some], self.truth[some]
        differs[some] = np.any([np.isin(found, values) != np.isin(truth, values) for values in classes.values()], axis=0)
        return differs & self.counted

    def uncertainty(self, kind: str) -> np.ndarray:
        """What voxels are ranked by: a map, or 1 / (1 + mm from the nearest voxel at a surface of the prediction)."""
        if kind != BOUNDARY:
            return self.beside(kind)[0]
        edge = np.zeros(self.found.shape, bool)
        for axis in range(3):
            differs = np.diff(self.found, axis=axis) != 0
            for part in (slice(None, -1), slice(1, None)):
                edge[(slice(None),) * axis + (part,)] |= differs
        if not edge.any():
            return np.zeros(edge.shape, np.float32)
        return (1 / (1 + ndimage.distance_transform_edt(~edge, sampling=self.image.spacing))).astype(np.float32)


def assess(
    pairs: Mapping[str, tuple[Path, Path]],
    folder: Path,
    names: Classes | None,
    ignore: int | None,
    bootstrap: Bootstrap,
    show: Callable[[float, str], None] = lambda fraction, text: None,
) -> dict[str, Any]:
    """What the uncertainty of predictions is worth.

    Args:
        pairs: {case: (prediction, reference)}
        folder: of the predictions and of volumes.csv
        names: {class or region: its values}; None takes every value as a class
        ignore: value in the references whose voxels count for nothing
        bootstrap: the interval of a mean over cases, or None
        show: is called with the part that is done, 0 to 1, and a case's name

    Returns:
        {"cases": {case: {"voxels", "wrong", kind: ranked}}, "kinds": {kind: the same as means with intervals, and "curve" over all voxels},
        "volumes": {class: coverage}, "reliability": {class: Reliability.result}, "not_measured": [reasons]}, with the kinds entropy,
        mutual-information and boundary.

    Raises:
        UserError: no prediction has maps beside it, or a file cannot be read.
    """
    chosen = {name: pair for name, pair in pairs.items() if map_of(pair[0], ENTROPY).is_file()}
    if not chosen:
        raise UserError(f"uncertainty: expected maps beside the predictions, as medssm predict --uncertainty writes them, got none in {folder}")
    missing = Counter({"no map beside the prediction": len(pairs) - len(chosen)})
    table = read_volumes(folder / VOLUMES)
    cases: dict[str, Any] = {}
    pooled: dict[str, Ranking] = {}
    reliability: dict[str, Reliability] = {}
    measured: dict[str, dict[str, dict[str, float]]] = {}
    for i, (name, files) in enumerate(chosen.items()):
        pair = Pair.read(*files, ignore)
        classes = names or {str(value): (value,) for value in np.union1d(pair.found, pair.truth).tolist()}
        wrong, counted = pair.wrong(classes), pair.counted
        labelled = int((np.isin(pair.truth, [value for values in classes.values() for value in values if value]) & counted).sum())
        cases[name] = {"voxels": int(counted.sum()), "labelled": labelled, "wrong": int(wrong.sum())}
        for kind in KINDS:
            ranking = Ranking.of(pair.uncertainty(kind)[counted], wrong[counted])
            cases[name][kind] = _ranked(ranking, labelled)
            pooled[kind] = pooled[kind] + ranking if kind in pooled else ranking
        if why := add_probabilities(reliability, pair, names):
            missing[f"reliability of probabilities: {why}"] += 1
        reference = volumes(pair.truth, pair.image, classes)
        for label, row in table.get(name, {}).items():
            if label in reference and "members_low_ml" in row:
                measured.setdefault(label, {})[name] = {**row, "reference_ml": reference[label]["ml"]}
        show((i + 1) / len(chosen), name)
    if not measured:
        missing[f"intervals on volumes: {folder / VOLUMES} has none for these classes (--classes RUN names them)"] = len(chosen)
    return {
        "cases": cases,
        "kinds": {kind: _summary({name: case[kind] for name, case in cases.items()}, ranking, bootstrap) for kind, ranking in pooled.items()},
        "volumes": {label: _coverage(rows) for label, rows in measured.items()},
        "reliability": {label: counts.result() for label, counts in reliability.items()},
        "not_measured": [f"{why}, {count} case(s)" for why, count in missing.items() if count],
    }


def _ranked(ranking: Ranking, labelled: int) -> dict[str, float | None]:
    """What a ranking finds.

    found_0.05     the share of the wrong voxels that is among the most uncertain 5 %
    to_halve       the number of the most uncertain voxels that hold half of the wrong ones; also as a share of all voxels (to_halve_share), and of
                   those of a class in the reference (to_halve_of_labelled)
    area           under the curve of the wrong share over the share of voxels that is kept; least_area is the best order's, wrong_share that of an
                   order by chance
    """
    to_halve = ranking.to_find(0.5)
    return {
        **{f"found_{share:g}": ranking.found(share) for share in SHARES},
        "to_halve": to_halve,
        "to_halve_share": None if to_halve is None else to_halve / ranking.total,
        "to_halve_of_labelled": None if to_halve is None or not labelled else to_halve / labelled,
        "area": ranking.area(),
        "least_area": ranking.least_area(),
        "wrong_share": ranking.errors / ranking.total,
    }


def _summary(rows: Mapping[str, Mapping[str, float | None]], pooled: Ranking, bootstrap: Bootstrap) -> dict[str, Any]:
    """The mean over cases of each number, with its interval, and the curve over the voxels of all cases."""
    result: dict[str, Any] = {}
    for key in next(iter(rows.values())):
        values = {name: value for name, row in rows.items() if (value := row[key]) is not None}
        low, high = bootstrap(values) or (None, None)
        result[key] = {"mean": sum(values.values()) / len(values) if values else None, "low": low, "high": high, "n": len(values)}
    found = [row["found_0.05"] for row in rows.values() if row["found_0.05"] is not None]
    result["halved_by_0.05"] = sum(value >= 0.5 for value in found) / len(found) if found else None
    result["curve"] = {"kept": COVERAGES.tolist(), "wrong": pooled.curve(COVERAGES).tolist(), "found": [pooled.found(1 - c) for c in COVERAGES]}
    return result


def add_probabilities(reliability: dict[str, Reliability], pair: Pair, names: Classes | None) -> str:
    """Take the probabilities beside a prediction in; why not, where that cannot be done."""
    if not map_of(pair.prediction, PROBABILITIES).is_file():
        return "no probabilities beside the prediction (predict --save-probabilities)"
    if names is None:
        return "which of them is which class is not known (--classes RUN)"
    p = pair.beside(PROBABILITIES)
    if len(p) != len(names):
        return f"expected {len(names)} of them as of {', '.join(names)}, got {len(p)}"
    for (label, values), probability in zip(names.items(), p, strict=True):
        if values != (0,):
            reliability.setdefault(label, Reliability()).add(probability[pair.counted], np.isin(pair.truth, values)[pair.counted])
    return ""


def _coverage(rows: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """How many references lie within the members' range and within the conformal bounds, with exact binomial intervals over cases."""
    result: dict[str, Any] = {"cases": {name: dict(row) for name, row in rows.items()}}
    for kind in ("members", "conformal"):
        low, high = f"{kind}_low_ml", f"{kind}_high_ml"
        kept = [row for row in rows.values() if low in row]
        if not kept:
            continue
        inside = sum(row[low] <= row["reference_ml"] <= row[high] for row in kept)
        interval = stats.binomtest(inside, len(kept)).proportion_ci()
        result[kind] = {
            "n": len(kept),
            "inside": inside,
            "coverage": inside / len(kept),
            "low": float(interval.low),
            "high": float(interval.high),
            "mean_width_ml": float(np.mean([row[high] - row[low] for row in kept])),
        }
    levels: Sequence[float] = sorted({row["conformal_level"] for row in rows.values() if "conformal_level" in row})
    return result | {"level": levels[0] if len(levels) == 1 else None}


def said(result: Mapping[str, Any]) -> list[str]:
    """A line on each of the things that were measured."""
    found = result["kinds"][ENTROPY]["found_0.05"]["mean"]
    lines = [] if found is None else [f"checking the 5 % of the voxels with the highest entropy finds {100 * found:.0f} % of the wrong ones"]
    for name, table in result["volumes"].items():
        if row := table.get("conformal"):
            of_level = "" if table["level"] is None else f" of level {table['level']:g}"
            lines.append(f"{name}: {row['inside']} of {row['n']} references lie in the conformal intervals{of_level} ({100 * row['coverage']:.0f} %)")
    return [*lines, *(f"not measured: {line}" for line in result["not_measured"])]
