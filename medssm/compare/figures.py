"""The plots of a comparison: differences with their intervals, Dice of every patient, volumes against those of the references, Dice over cost."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from medssm.compare.result import MEAN
from medssm.compare.scores import over_classes
from medssm.segment.pages import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 130
_COSTS = {  # facts that a network is better with less of: what to divide by, and the label
    "inference_seconds": (1, "seconds a case"),
    "multiply_adds": (1e9, "multiply-adds of a patch, G"),
    "file_bytes": (2**20, "file, MiB"),
    "peak_bytes": (2**20, "memory of a new process, MiB"),
}
_MARKS = "^sv"


def plots(result: Mapping[str, Any]) -> dict[str, bytes]:
    """{name: PNG}: differences (where there are any with an interval), dice, volumes, pareto (where the cost of two sides is known)."""
    drawn = {"differences": _differences(result), "dice": _dice(result), "volumes": _volumes(result), "pareto": _pareto(result)}
    return {name: _png(figure) for name, figure in drawn.items() if figure is not None}


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _differences(result: Mapping[str, Any]) -> Figure | None:
    """A forest plot for Dice and one for HD95: a row for each side and class, the 95 % interval, and the margin."""
    rows = [(side, label, found) for side, row in result["differences"].items() for label, found in {**row["classes"], MEAN: row[MEAN]}.items()]
    rows = [row for row in rows if row[2]["dice"]["low"] is not None]
    if not rows:
        return None
    figure = _figure(9, 1.2 + 0.28 * len(rows))
    for number, (metric, margin, title) in enumerate(
        (("dice", -result["dice_margin"], "Dice (right is better)"), ("hd95", result["hd95_margin"], "HD95 in mm (left is better)"))
    ):
        axes = figure.add_subplot(1, 2, number + 1)
        for place, (_, label, found) in enumerate(rows):
            value = found[metric]
            colour = "black" if label == MEAN else "tab:blue"
            axes.plot((value["low"], value["high"]), (place, place), color=colour, linewidth=1.4)
            axes.plot(value["mean"], place, "D" if label == MEAN else "o", color=colour, markersize=4.5)
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.axvline(margin, color="tab:red", linewidth=0.8, linestyle="--")
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [f"{side}, {label}" if number == 0 else "" for side, label, _ in rows], fontsize=8)
        axes.set_title(f"difference from {result['baseline']}: {title}", fontsize=9)
        axes.grid(axis="x", alpha=0.3)
    return figure


def _dice(result: Mapping[str, Any]) -> Figure:
    """Each patient's mean Dice over cases and classes: a point for each side, and a line for each patient."""
    sides = list(result["sides"])
    table: dict[str, dict[str, list[float]]] = {}
    for side in sides:
        for case, rows in result["sides"][side]["cases"].items():
            row = over_classes(rows)
            if row:
                table.setdefault(result["cases"][case], {}).setdefault(side, []).append(row["dice"])
    figure = _figure(max(5.0, 1.5 + 1.3 * len(sides)), 4.2)
    axes = figure.add_subplot()
    for means in table.values():
        there = [i for i, side in enumerate(sides) if side in means]
        axes.plot(there, [float(np.mean(means[sides[i]])) for i in there], "-o", color="grey", alpha=0.35, linewidth=0.6, markersize=2.5)
    for i, side in enumerate(sides):
        own = [float(np.mean(means[side])) for means in table.values() if side in means]
        if own:
            axes.boxplot(own, positions=[i], widths=0.35, showfliers=False, medianprops={"color": COLOURS[5], "linewidth": 2})
    axes.set_xticks(range(len(sides)), sides, fontsize=8, rotation=20, ha="right")
    axes.set_ylabel("mean Dice of a patient")
    axes.grid(axis="y", alpha=0.3)
    return figure


def _volumes(result: Mapping[str, Any]) -> Figure:
    """For each class, volumes against the reference's, and below their differences against their mean with 95 % limits of agreement."""
    classes, sides = result["classes"], list(result["sides"])
    figure = _figure(max(4.5, 3.4 * len(classes)), 6.2)
    for column, label in enumerate(classes):
        upper, lower = (figure.add_subplot(2, len(classes), row * len(classes) + column + 1) for row in range(2))
        ends: list[float] = []
        for i, side in enumerate(sides):
            rows = [row for case in result["sides"][side]["cases"].values() if (row := case.get(label))]
            if not rows:
                continue
            colour = COLOURS[i % len(COLOURS)]
            truth, found = (np.array([row[name] for row in rows]) for name in ("reference_ml", "ml"))
            ends += [*truth.tolist(), *found.tolist()]
            upper.plot(truth, found, "o", color=colour, markersize=3, alpha=0.6, label=side)
            lower.plot((truth + found) / 2, found - truth, "o", color=colour, markersize=3, alpha=0.6)
            mean, spread = float((found - truth).mean()), 1.96 * float((found - truth).std(ddof=1)) if len(rows) > 1 else 0.0
            for height, style in ((mean, "-"), (mean - spread, ":"), (mean + spread, ":")):
                lower.axhline(height, color=colour, linestyle=style, linewidth=1)
        if ends:
            upper.plot((min(ends), max(ends)), (min(ends), max(ends)), color="grey", linewidth=0.8)
        upper.set_title(label, fontsize=9)
        upper.set_xlabel("reference, ml", fontsize=8)
        upper.set_ylabel("prediction, ml", fontsize=8)
        lower.axhline(0, color="grey", linewidth=0.8)
        lower.set_xlabel("mean of both, ml", fontsize=8)
        lower.set_ylabel("prediction - reference, ml", fontsize=8)
        if column == 0 and ends:
            upper.legend(fontsize=7)
    return figure


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points (cost, value) that no other one beats: it costs no more and is worth no less, and is better in one. By their cost."""
    kept: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not kept or points[i][1] > points[kept[-1]][1]:
            kept.append(i)
    return kept


def _pareto(result: Mapping[str, Any]) -> Figure | None:
    """The mean Dice of each side over each of its costs, and small marks for the Dice in disturbed scans."""
    known = {name: [side for side, row in result["sides"].items() if row["facts"].get(name) is not None] for name in _COSTS}
    costs = {name: sides for name, sides in known.items() if len(sides) > 1}
    if not costs:
        return None
    figure = _figure(max(6.0, 4.2 * len(costs)), 4.4)
    colours = {side: COLOURS[i % len(COLOURS)] for i, side in enumerate(result["sides"])}
    for number, (name, sides) in enumerate(costs.items(), 1):
        axes = figure.add_subplot(1, len(costs), number)
        unit, label = _COSTS[name]
        points = []
        for side in sides:
            cost, dice = result["sides"][side]["facts"][name] / unit, result["sides"][side][MEAN]["dice"]
            points.append((cost, dice["mean"] or 0.0))
            if dice["low"] is not None:
                axes.plot((cost, cost), (dice["low"], dice["high"]), color=colours[side], linewidth=1.2)
            axes.plot(*points[-1], "o", color=colours[side], markersize=7, label=side if number == 1 else None)
            for mark, found in zip(_MARKS, result["disturbed"].values(), strict=False):
                axes.plot(cost, found["sides"][side][MEAN]["dice"]["mean"], mark, color=colours[side], markersize=4, fillstyle="none")
        line = [points[i] for i in front(points)]
        axes.plot(*zip(*line, strict=True), color="grey", linewidth=1, zorder=0)
        axes.set_xlabel(label, fontsize=8)
        axes.set_xlim(0, 1.08 * max(cost for cost, _ in points))
        axes.grid(alpha=0.3)
        if number == 1:
            for mark, kind in zip(_MARKS, result["disturbed"], strict=False):
                axes.plot([], [], mark, color="grey", markersize=4, fillstyle="none", label=kind)
            axes.set_ylabel("mean Dice")
            axes.legend(fontsize=7)
    return figure
