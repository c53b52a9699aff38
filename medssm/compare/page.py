"""A comparison as one HTML page, and its plots as files beside it. The page itself is the template compare.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medssm.compare import figures, table
from medssm.compare.result import MEAN
from medssm.compare.scores import COMPARED
from medssm.files import write_bytes, write_text
from medssm.segment import pages

GENERATOR = "medssm compare"
_FACTS = {
    "parameters": "parameters",
    "multiply_adds": "multiply-adds of a patch",
    "file_bytes": "file",
    "training_seconds": "training",
    "training_joules": "energy of the training",
    "inference_seconds": "inference of a case",
    "inference_joules": "energy of the inference",
    "cold_seconds": "first case of a new process",
    "peak_bytes": "memory of that process",
    "ece": "calibration error",
    "ece_unsure": "the same of unsure voxels",
}


def write(out: Path, name: str, result: Mapping[str, Any], worst: Sequence[str], pictures: Mapping[str, Mapping[str, str]]) -> None:
    """Write the page and the plots.

    Args:
        out: the folder
        name: of the page's file
        result: what `compare` returns
        worst: the cases, the worst first
        pictures: {case: {side: address of an image}}

    Raises:
        UserError: a file cannot be written.
    """
    plots = figures.plots(result)
    for plot, picture in plots.items():
        write_bytes(out / f"{plot}.png", picture)
    sides, known = result["sides"], table.facts_of(result)
    text = pages.page(
        Path(__file__).with_name("compare.html"),
        GENERATOR,
        result=result,
        scores=[
            (side, label, own["n"], [table.interval(own[metric], digits) for metric, (_, digits) in table.HEADINGS.items()])
            for side, row in sides.items()
            for label, own in {**row["classes"], MEAN: row[MEAN]}.items()
        ],
        score_headings=[heading for heading, _ in table.HEADINGS.values()],
        differences=[
            (side, label, [_difference(own, metric) for metric in COMPARED], row["verdict"] if label == MEAN else own["verdict"])
            for side, row in result["differences"].items()
            for label, own in {**row["classes"], MEAN: row[MEAN]}.items()
        ],
        difference_headings=[table.HEADINGS[metric][0] for metric in COMPARED],
        facts={side: [table.fact(row["facts"], fact) for fact in known] for side, row in sides.items() if row["facts"]},
        fact_headings=[_FACTS[fact] for fact in known],
        disturbed=table.disturbed_rows(result),
        disturbed_headings=table.DISTURBED,
        remarks=table.remarks(result),
        plots={plot: pages.inline(picture) for plot, picture in plots.items()},
        pictures=pictures,
        cases=[(case, {side: _case(row["cases"][case]) for side, row in sides.items()}) for case in worst],
    )
    write_text(out / name, text)


def _difference(own: Mapping[str, Any], metric: str) -> str:
    return table.interval(own[metric], table.HEADINGS[metric][1] + (metric == "dice"), True)


def _case(rows: Mapping[str, Any]) -> str:
    """The Dice of a case's classes as text."""
    return ", ".join(f"{label} {row['dice']:.3f}" for label, row in rows.items() if row) or "no class"
