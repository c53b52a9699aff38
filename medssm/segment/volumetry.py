"""Volumes of the segmented classes, and the table of them beside the label maps: volumes.csv; of an ensemble with intervals."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from medssm.files import begins_with, write_text
from medssm.scratch import slabs
from medssm.segment.images import Image, Voxels

VOLUMES = "volumes.csv"
_PART = 2**21  # voxels that are counted together
_COLUMNS = ("case", "class", "voxels", "ml")
INTERVALS = ("members_low_ml", "members_high_ml", "conformal_low_ml", "conformal_high_ml", "conformal_level")
Volumes: TypeAlias = "dict[str, dict[str, float]]"  # {class: {"voxels": number, "ml": millilitres}}, and some of INTERVALS


def volumes(labels: Voxels, image: Image, structures: Mapping[str, Sequence[int]]) -> Volumes:
    """How large each class of a label map is; `image` has the map's geometry, `structures` is {name: values}, as of regions.

    1 ml is 1000 mm^3. A voxel has the volume |det A| of the affine A in millimetres, so an oblique grid is measured right.
    """
    numbers = dict.fromkeys((value for values in structures.values() for value in values), 0)
    for z in slabs(labels.shape[2], labels.shape[0] * labels.shape[1], _PART):
        part = labels[:, :, z]
        for value in numbers:
            numbers[value] += int(np.count_nonzero(part == value))
    counts = {name: sum(numbers[value] for value in values) for name, values in structures.items()}
    return {name: {"voxels": count, "ml": count * voxel_ml(image)} for name, count in counts.items()}


def voxel_ml(image: Image) -> float:
    """A voxel's volume in millilitres."""
    return abs(float(np.linalg.det(image.affine[:3, :3]))) / 1000


def read_volumes(path: Path) -> dict[str, Volumes]:
    """The table of a file that `write_volumes` wrote, {case: volumes}; {} where there is none."""
    if not is_volumes(path):
        return {}
    found: dict[str, Volumes] = {}
    with open(path, encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            intervals = {column: float(row[column]) for column in INTERVALS if row.get(column)}
            found.setdefault(row["case"], {})[row["class"]] = {"voxels": int(row["voxels"]), "ml": float(row["ml"]), **intervals}
    return found


def write_volumes(path: Path, cases: Mapping[str, Volumes]) -> None:
    """Write a row for each case and class, with the columns of INTERVALS where any row has one. Raises UserError where the file cannot be written."""
    more = INTERVALS if any(column in row for table in cases.values() for row in table.values() for column in INTERVALS) else ()
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow((*_COLUMNS, *more))
    for case, table in sorted(cases.items()):
        for name, row in table.items():
            intervals = (f"{row[column]:.6g}" if column in row else "" for column in more)
            rows.writerow((case, name, row["voxels"], f"{row['ml']:.6g}", *intervals))
    write_text(path, text.getvalue())


def is_volumes(path: Path) -> bool:
    """Whether a file is such a table."""
    return any(begins_with(path, ",".join(columns) + "\n") for columns in (_COLUMNS, (*_COLUMNS, *INTERVALS)))
