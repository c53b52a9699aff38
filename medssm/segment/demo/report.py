"""The demo's report: one HTML file with the figures inside. The page itself is the template report.html."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from medssm.files import write_text
from medssm.segment.pages import inline, page


class _Metric(NamedTuple):
    """How a metric is shown. `share`: it lies between 0 and 1, and 1 is best; else 0 is best."""

    name: str
    meaning: str
    digits: int
    share: bool


_METRICS = {
    "dice": _Metric("Dice", "overlap, 1 is best", 3, True),
    "hd95": _Metric("HD95", "95th percentile of the distance between the surfaces in mm, 0 is best", 1, False),
    "nsd": _Metric("Surface Dice", "share of the surfaces within {nsd_mm:g} mm of each other, 1 is best", 3, True),
}


def write_report(path: Path, metrics: Mapping[str, Any], figures: Mapping[str, Path], viewer: str | None) -> None:
    """Write the report as one HTML file that needs no other.

    Args:
        path: the file to write
        metrics: what metrics.json holds (see `pipeline.structures`)
        figures: the PNG files "found", "overlays", "split", "dice" and "curves"
        viewer: a page that shows the tested side, None for a report without it
    """
    columns, split = [*metrics["classes"], "mean"], metrics["split"]
    text = page(
        Path(__file__).with_name("report.html"),
        "medssm demo",
        **{row["key"]: row for row in metrics["rows"] if row["key"] in ("ours", "monai", "mirrored", "look_up")},
        m=metrics,
        viewer=viewer,
        trained=split["trained"],
        tested=split["tested"],
        gap=f"{split['gap_mm']:g}",
        columns=columns,
        tables=[_table(name, metric, metrics, columns) for name, metric in _METRICS.items()],
        about={row["title"]: _about(row) for row in metrics["rows"]},
        method=_method(metrics),
        image={name: inline(file.read_bytes()) for name, file in figures.items()},
    )
    write_text(path, text)


def _table(name: str, metric: _Metric, metrics: Mapping[str, Any], columns: list[str]) -> dict[str, Any]:
    """One metric: rows by classes, the best of each class in bold, a bar behind a value between 0 and 1."""
    values = [[round(row[name][column], metric.digits) for column in columns] for row in metrics["rows"]]
    best = [(max if metric.share else min)(column) for column in zip(*values, strict=True)]
    rows = []
    for row, line in zip(metrics["rows"], values, strict=True):
        cells = [
            {
                "text": f"{value:.{metric.digits}f}",
                "classes": " ".join(["bar"] * metric.share + ["best"] * (value == top)),
                "part": f"{100 * value:.0f}" if metric.share else "0",
            }
            for value, top in zip(line, best, strict=True)
        ]
        rows.append({"title": row["title"], "cells": cells})
    return {"name": metric.name, "meaning": metric.meaning.format(**metrics), "rows": rows}


def _about(row: Mapping[str, Any]) -> str:
    return row["about"] + (f" {row['predict_seconds']:.1f} seconds to segment the tested side." if "predict_seconds" in row else "")


def _method(metrics: Mapping[str, Any]) -> dict[str, str]:
    recipe, trained, tested = metrics["recipe"], metrics["split"]["trained"], metrics["split"]["tested"]
    rates = " and ".join(f"{row['lr']:g} for {row['title']}" for row in metrics["rows"] if "steps" in row)
    edges, patch = (" x ".join(f"{value:g}" for value in recipe[name]) for name in ("spacing", "patch"))
    return {
        "Data": f"{metrics['data']['credit']} Cropped to the brain; the two sides of a structure are one class.",
        "Split": f"Trained on the {trained} hemisphere, tested on the {tested} one. The {metrics['split']['gap_mm']:g} mm around the "
        "midline (x = 0) belong to neither, and each side is a file of its own: no window or patch reaches across.",
        "Left and right": "One hemisphere is roughly the mirror image of the other. So half of the training patches, drawn at random, are mirrored "
        "left to right, for all networks alike. The tested side is segmented as it is, never flipped.",
        "Recipe": f"For each network: {recipe['max_steps']:,} training steps, {recipe['batch']} patches of {patch} voxels at {edges} mm in each, "
        f"{recipe['foreground']:.0%} of them centred on a structure; rotation, zoom, noise, blur, contrast and low resolution on some; Dice and "
        f"cross-entropy; AdamW; the learning rate falls along a cosine from {rates}. Windows in prediction overlap by {metrics['overlap']:.3g} of "
        "their edge. All this was chosen with the sides exchanged: trained on the left one, tested on the right one.",
        "Metrics": "By medssm evaluate, in millimetres. If nothing of a class was found, its HD95 is the image's diagonal.",
    }
