"""The CSV of a classifier: path, group (empty here), label, and the probability of each class as p_CLASS, as medssm predict writes it."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from medssm_runtime.errors import UserError
from medssm_runtime.files import whole

ENDING = ".csv"
_BEGIN = "path,group,label,p_"


def check(out: Path, reads: Sequence[Path], overwrite: bool) -> None:
    """UserError where `out` is no name of a CSV, or where a file would be lost: one that is read, or one of other origin without `overwrite`."""
    if out.suffix.lower() != ENDING or out.is_dir():
        raise UserError(f"out: expected a file that ends in {ENDING}, as the network classifies, got {out}")
    if not out.exists():
        return
    if any(file.exists() and out.samefile(file) for file in reads):
        raise UserError(f"out: {out} is a file that is read; name another one")
    if not overwrite and out.read_bytes()[: len(_BEGIN)] != _BEGIN.encode():
        raise UserError(f"out: {out} is there already, and medssm did not write it: name another one, or pass --overwrite")


def write(out: Path, rows: Mapping[str, np.ndarray], classes: Sequence[str]) -> None:
    """Write a row for each image, {its path: (classes,)}; whole or, with UserError, not at all."""
    with whole(out) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("path", "group", "label", *(f"p_{name}" for name in classes)))
        table.writerows((path, "", classes[int(row.argmax())], *(f"{value:.6f}" for value in row)) for path, row in rows.items())
