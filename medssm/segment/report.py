"""The report of a training: one HTML page with its curves, the held-out cases that went best and worst, its settings and its cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medssm.files import write_text
from medssm.segment import pages
from medssm.segment.cases import Case

_PICTURES = 3  # of the best cases, and of the worst


def write(
    path: Path,
    result: Mapping[str, Any],
    chosen: Mapping[str, str],
    arguments: str,
    curves: Path,
    rows: Sequence[Mapping[str, Any]],
    training: Sequence[Case],
) -> None:
    """Write the report.

    Args:
        path: the .html file
        result: what `train` returns
        chosen: what was found, fitted or chosen, {what: text}
        arguments: of `train`, as YAML
        curves: the PNG of the learning curves
        rows: the held-out cases, the best first; see `Validation.rows`
        training: the cases that were trained on

    Raises:
        UserError: it cannot be written.
    """
    scored = [row for row in rows if row["mean"] is not None]
    best = scored[:_PICTURES]
    worst = [row for row in scored[::-1] if row not in best][:_PICTURES]
    page = pages.page(
        "train.html",
        "medssm train",
        result=result,
        chosen=chosen,
        arguments=arguments,
        curves=pages.inline(curves.read_bytes()),
        rows=rows,
        names=list(dict.fromkeys(name for row in rows for name in row["dice"])),
        shown={"Best": best, "Worst": worst},
        training=training,
    )
    write_text(path, page)
