"""Post-processing of label maps: for each class or region the steps that raised its Dice on the held-out cases, kept beside the weights.

    fill_holes          holes of the background inside of it become part of it
    largest_component   only its largest connected part is kept
    smallest_ml         connected parts below so many millilitres are removed

What is removed becomes background. Parts are connected across faces, edges and corners; a hole is what no path across faces leads out of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from scipy import ndimage

from medssm.errors import UserError
from medssm.files import read_json, write_json

POSTPROCESSING = "postprocessing.json"
_WORDS = {"fill_holes": "holes filled", "largest_component": "largest component", "smallest_ml": "no part below {:.3g} ml"}
_SHARES = (0.5, 0.1)  # of the smallest volume among the references: what is tried as the smallest part
Steps: TypeAlias = "dict[str, dict[str, float]]"  # {structure: {step: True, or its millilitres}}, in the order of the steps
Structures: TypeAlias = "Mapping[str, tuple[Sequence[int], int]]"  # {name: (its values in a label map, the one that a filled hole gets)}


def processed(labels: np.ndarray, steps: Steps, structures: Structures, voxel_ml: float) -> np.ndarray:
    """A label map (x, y, z) after the steps of each structure, one structure after the other. Without any step it is the map itself."""
    chosen = {name: how for name, how in steps.items() if how}
    labels = labels.copy() if chosen else labels
    for name, how in chosen.items():
        values, written = structures[name]
        for box in ndimage.find_objects(_mask(labels, values).view(np.uint8)):
            labels[box] = _changed(labels[box], values, written, how, voxel_ml)
    return labels


def _changed(labels: np.ndarray, values: Sequence[int], written: int, how: Mapping[str, float], voxel_ml: float) -> np.ndarray:
    """The part of a label map that holds all of a structure, after the structure's steps."""
    mask = _mask(labels, values)
    kept = _cleaned(mask, how, voxel_ml)
    return np.where(mask & ~kept, 0, np.where(kept & ~mask & (labels == 0), written, labels)).astype(labels.dtype)


def _mask(labels: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Where a label map has one of the values: as np.isin, in a tenth of the memory."""
    mask: np.ndarray = labels == values[0]
    for value in values[1:]:
        mask |= labels == value
    return mask


def _cleaned(mask: np.ndarray, how: Mapping[str, float], voxel_ml: float) -> np.ndarray:
    flat = tuple(axis for axis, size in enumerate(mask.shape) if size == 1)
    mask = np.squeeze(mask, flat)  # in a plane a hole is one in two dimensions
    if how.get("fill_holes"):
        mask = ndimage.binary_fill_holes(mask)
    if how.get("largest_component") or how.get("smallest_ml"):
        parts, count = ndimage.label(mask, np.ones((3,) * mask.ndim))
        sizes = np.bincount(parts.reshape(-1), minlength=count + 1)
        sizes[0] = 0
        keep = sizes * voxel_ml >= how.get("smallest_ml", 0)
        if how.get("largest_component"):
            keep &= np.arange(count + 1) == sizes.argmax()
        keep[0] = False
        mask = keep[parts]
    return np.expand_dims(mask, flat)


class Held:
    """A held-out case: how its voxels are labelled and found, counted once, so that a change counts only what it changes.

    Args:
        found: the predicted label map (x, y, z), positions from 0 to less than `classes`
        truth: its reference, the same; voxels below 0 count for nothing
        voxel_ml: a voxel's volume in millilitres
        classes: their number
    """

    def __init__(self, found: np.ndarray, truth: np.ndarray, voxel_ml: float, classes: int):
        self.found, self.truth, self.voxel_ml, self.classes = found.copy(), np.where(truth < 0, classes, truth), voxel_ml, classes
        self.table = self._count(self.found, self.truth)
        self.boxes = ndimage.find_objects(self.found, classes)

    def _count(self, found: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """(classes + 1, classes): voxels by reference and prediction; the last row has those that do not count."""
        pairs = truth.astype(np.int32).reshape(-1) * self.classes + found.reshape(-1)
        return np.bincount(pairs, minlength=(self.classes + 1) * self.classes).reshape(self.classes + 1, self.classes)

    def changed(self, values: Sequence[int], written: int, how: Mapping[str, float]) -> tuple[tuple[slice, ...], np.ndarray, np.ndarray] | None:
        """(where, the label map there, the table) after the steps of a structure; None where it is not found."""
        boxes = [self.boxes[value - 1] for value in values if self.boxes[value - 1]]
        if not boxes:
            return None
        where = tuple(slice(min(part.start for part in axis), max(part.stop for part in axis)) for axis in zip(*boxes, strict=True))
        old, truth = self.found[where], self.truth[where]
        new = _changed(old, values, written, how, self.voxel_ml)
        return where, new, self.table + self._count(new, truth) - self._count(old, truth)

    def take(self, where: tuple[slice, ...], labels: np.ndarray, table: np.ndarray) -> None:
        """Keep what `changed` gave."""
        self.found[where], self.table = labels, table
        self.boxes = ndimage.find_objects(self.found, self.classes)


def _dice(table: np.ndarray, structures: Structures) -> np.ndarray:
    """The Dice of each structure, 1 where it is neither found nor there."""
    row = []
    for values, _ in structures.values():
        size = table[:-1, values].sum() + table[values, :].sum()
        row.append(2 * table[np.ix_(values, values)].sum() / size if size else 1.0)
    return np.array(row, float)


def choose(
    cases: Sequence[Held], structures: Structures, reduced: Callable[[np.ndarray, str], np.ndarray] = lambda values, how: values
) -> tuple[Steps, dict[str, list[float]]]:
    """The steps that raise the Dice of their structure, and {structure: [its Dice before all steps, after them]}.

    Dice is the mean over the cases, 1 where a structure is neither found nor there. A step that lowers the mean over all structures is not taken,
    even where it raises its own one's: a region may hold another.

    Args:
        cases: those of this process
        structures: what is segmented, by positions
        reduced: the "sum" or the "min" of an array over all processes
    """
    number = max(1.0, reduced(np.array([float(len(cases))]), "sum")[0])

    def mean(tables: Sequence[np.ndarray]) -> np.ndarray:
        total = np.zeros(len(structures))
        for table in tables:
            total += _dice(table, structures)
        return reduced(total, "sum") / number

    steps: Steps = {}
    before = now = mean([case.table for case in cases])
    for i, (name, (values, written)) in enumerate(structures.items()):
        volumes = [case.table[values, :].sum() * case.voxel_ml for case in cases]
        smallest = reduced(np.array([min((float(volume) for volume in volumes if volume), default=np.inf)]), "min")[0]
        tried: list[tuple[str, float]] = [("fill_holes", True), ("largest_component", True)]
        tried += [("smallest_ml", float(f"{share * smallest:.3g}")) for share in _SHARES if np.isfinite(smallest)]
        steps[name] = {}
        for step, value in tried:
            if step in steps[name]:  # with a larger size
                continue
            changes = [case.changed(values, written, {step: value}) for case in cases]
            then = mean([change[2] if change else case.table for case, change in zip(cases, changes, strict=True)])
            if then[i] <= now[i] + 1e-6 or then.mean() < now.mean():
                continue
            steps[name][step], now = value, then
            for case, change in zip(cases, changes, strict=True):
                if change:
                    case.take(*change)
    return steps, {name: [round(float(one), 6), round(float(other), 6)] for name, one, other in zip(structures, before, now, strict=True)}


def save(path: Path, steps: Steps, dice: Mapping[str, Sequence[float]]) -> None:
    """Write the steps with the Dice on the held-out cases before and after them. Raises UserError where the file cannot be written."""
    write_json(path, {"steps": steps, "validation_dice": {name: {"before": one, "after": other} for name, (one, other) in dice.items()}})


def load(folders: Sequence[Path], names: Sequence[str]) -> Steps:
    """The steps that all of these trainings chose, of different sizes the smallest one; of one without the file none.

    Raises UserError where a file does not hold what `save` writes.
    """
    chosen = [_read(folder / POSTPROCESSING, names) for folder in folders]
    return {
        name: {step: min(steps[name][step] for steps in chosen) for step in _WORDS if all(step in steps.get(name, {}) for steps in chosen)}
        for name in names
    }


def _read(path: Path, names: Sequence[str]) -> Steps:
    if not path.is_file():
        return {}
    table: Any = read_json(path)
    steps: Any = table.get("steps") if isinstance(table, dict) else None
    known = isinstance(steps, dict) and steps.keys() <= set(names) and all(isinstance(how, dict) for how in steps.values())
    if not known or any(how.keys() - _WORDS.keys() for how in steps.values()):
        raise UserError(f"{path}: expected steps {', '.join(_WORDS)} for some of {', '.join(names)}, got {steps!r}")
    return steps


def described(steps: Steps) -> str:
    """The steps in words; "none" without any."""
    lines = [f"{name} {' and '.join(_WORDS[step].format(value) for step, value in how.items())}" for name, how in steps.items() if how]
    return ", ".join(lines) or "none"
