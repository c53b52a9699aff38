"""The CSV of a classifier's predictions: path, group, label, and the probability of each class as p_CLASS."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from medssm.classify.table import Sample
from medssm.errors import UserError
from medssm.files import begins_with, write_text

COLUMNS, PROBABILITY = ("path", "group", "label"), "p_"


def is_predictions(path: Path) -> bool:
    """Whether a file is such a CSV."""
    return begins_with(path, ",".join((*COLUMNS, PROBABILITY)))


def write_predictions(path: Path, samples: Iterable[Sample], probabilities: Iterable[np.ndarray], classes: Sequence[str]) -> None:
    """Write a row for each image; `label` is the class of the largest probability. Raises UserError if the file cannot be written."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow((*COLUMNS, *(PROBABILITY + name for name in classes)))
    for sample, row in zip(samples, probabilities, strict=True):
        rows.writerow((sample.path, sample.group or "", classes[int(row.argmax())], *(f"{value:.6f}" for value in row)))
    write_text(path, text.getvalue())


def read_predictions(path: Path) -> tuple[list[Sample], np.ndarray, tuple[str, ...]]:
    """(images with their group and the class that was found, probabilities (images, classes), classes).

    Raises UserError where it is no CSV of predictions.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable CSV ({error})") from error
    headings = rows[0] if rows else []
    classes = tuple(heading.removeprefix(PROBABILITY) for heading in headings if heading.startswith(PROBABILITY))
    if len(classes) < 2 or tuple(headings) != (*COLUMNS, *(PROBABILITY + name for name in classes)):
        raise UserError(
            f"{path}: expected the columns {', '.join(COLUMNS)}, {PROBABILITY}CLASS, ..., as medssm predict writes them, got {', '.join(headings)}"
        )
    samples, table = [], []
    for number, row in enumerate(rows[1:], 2):
        try:
            values = [float(value) for value in row[len(COLUMNS) :]]
            if len(row) != len(headings) or not np.isfinite(values).all() or abs(sum(values) - 1) > 0.01 or min(values) < 0:
                raise ValueError
        except ValueError as error:
            raise UserError(f"{path}: line {number}: expected probabilities that sum to 1, got {', '.join(row[len(COLUMNS) :])}") from error
        samples.append(Sample(row[0], Path(row[0]), row[2], row[1] or None))
        table.append(values)
    if not samples:
        raise UserError(f"{path}: no row in it")
    return samples, np.array(table), classes
