"""Post-processing of label maps: for each class or region the steps that raised its Dice on the held-out cases, kept beside the weights.

    fill_holes          holes of the background inside of it become part of it
    largest_component   only its largest connected part is kept
    smallest_ml         connected parts below so many millilitres are removed

What is removed becomes background. Parts are connected across faces, edges and corners; a hole is what no path across faces leads out of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from medssm.errors import UserError
from medssm.files import read_json, write_json
from medssm.scratch import Store, slabs

POSTPROCESSING = "postprocessing.json"
_WORDS = {"fill_holes": "holes filled", "largest_component": "largest component", "smallest_ml": "no part below {:.3g} ml"}
_SHARES = (0.5, 0.1)  # of the smallest volume among the references: what is tried as the smallest part
_ROWS = 2**20  # voxels of a box that are looked at together
Steps: TypeAlias = "dict[str, dict[str, float]]"  # {structure: {step: True, or its millilitres}}, in the order of the steps
Structures: TypeAlias = "Mapping[str, tuple[Sequence[int], int]]"  # {name: (its values in a label map, the one that a filled hole gets)}
Chosen: TypeAlias = "tuple[Steps, Mapping[str, Sequence[float]]]"  # steps, and {structure: [its Dice on the held-out cases before them, after them]}
Windows: TypeAlias = "Callable[[int], np.ndarray]"  # rows of an array by the number of a window; each begins with the last row of the one before


def process(labels: Store, steps: Steps, structures: Structures, voxel_ml: float) -> None:
    """Change a label map (x, y, z) by the steps of each structure, one structure after the other, some rows at a time."""
    for name, how in steps.items():
        values, written = structures[name]
        box = _box(labels, values) if how else None
        if box:
            _change(labels, box, values, written, how, voxel_ml)


def _box(labels: Store, values: Sequence[int]) -> tuple[slice, ...] | None:
    """The smallest box that holds all voxels of some values; None where there are none."""
    boxes = []
    for rows in labels.slabs():
        for first, *others in ndimage.find_objects(_mask(labels[rows].numpy(), values).view(np.uint8)):
            boxes.append((slice(first.start + rows.start, first.stop + rows.start), *others))
    return _around(boxes) if boxes else None


def _around(boxes: Sequence[tuple[slice, ...]]) -> tuple[slice, ...]:
    return tuple(slice(min(part.start for part in axis), max(part.stop for part in axis)) for axis in zip(*boxes, strict=True))


def _change(labels: Store, box: tuple[slice, ...], values: Sequence[int], written: int, how: Mapping[str, float], voxel_ml: float) -> None:
    """A structure's steps in the box that holds all of it."""
    first, *others = box
    flat = tuple(axis for axis, part in enumerate(box) if part.stop - part.start == 1)[-2:]  # in a plane a hole is one in two dimensions
    own = list(slabs(first.stop - first.start, math.prod(part.stop - part.start for part in others), _ROWS))

    def window(i: int) -> np.ndarray:
        """Rows of the box, beginning with the last one of the window before."""
        return labels[(slice(first.start + max(0, own[i].start - 1), first.start + own[i].stop), *others)].numpy()

    kept = _cleaned(lambda i: np.squeeze(_mask(window(i), values), flat), len(own), how, voxel_ml)
    for i in reversed(range(len(own))):  # the last one first: no window is read after a row of it is changed
        old = window(i)
        mask, keep = _mask(old, values), kept(i).reshape(old.shape)
        new = np.where(mask & ~keep, 0, np.where(keep & ~mask & (old == 0), written, old)).astype(old.dtype)
        labels[(slice(first.start + own[i].start, first.start + own[i].stop), *others)] = torch.from_numpy(new[min(i, 1) :])


def _mask(labels: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Where a label map has one of the values: as np.isin, in a tenth of the memory."""
    mask: np.ndarray = labels == values[0]
    for value in values[1:]:
        mask |= labels == value
    return mask


def _cleaned(mask: Windows, number: int, how: Mapping[str, float], voxel_ml: float) -> Windows:
    """A mask after a structure's steps, both in windows."""
    filled = _filled(mask, number) if how.get("fill_holes") else mask
    if not how.get("largest_component") and not how.get("smallest_ml"):
        return filled
    parts = _Parts(filled, number)
    keep = parts.sizes * voxel_ml >= how.get("smallest_ml", 0)
    if how.get("largest_component"):
        keep &= np.arange(len(keep)) == parts.sizes.argmax()
    keep[0] = False
    return lambda i: keep[parts(i)]


def _filled(mask: Windows, number: int) -> Windows:
    around = _Parts(lambda i: ~mask(i), number, faces=True)
    return lambda i: mask(i) | around.inside[around(i)]


class _Parts:
    """The connected parts of a mask. Called with the number of a window it gives each voxel's part there, 0 outside of the mask.

    sizes    voxels of each part, 0 for the part 0
    inside   whether a part has no voxel at the border of the whole; False for the part 0

    Args:
        mask: gives each window
        number: of windows
        faces: connected across faces alone, not across edges and corners
    """

    def __init__(self, mask: Windows, number: int, faces: bool = False):
        self.mask, self.faces, self.seen = mask, faces, (-1, np.zeros(0, np.int32))
        self.first = [0]  # parts of the windows before, for each window
        sizes, border, same, last = [np.zeros(1, int)], [], [np.zeros((0, 2), int)], np.zeros(0, int)
        for i in range(number):
            found, begin = self._found(i), self.first[-1]
            count = int(found.max(initial=0))
            self.first.append(begin + count)
            sizes.append(np.bincount(found[min(i, 1) :].reshape(-1), minlength=count + 1)[1:])
            if i:  # one row in both windows: its voxels say which parts are the same
                both = last > 0
                same.append(np.unique(np.stack([last[both], found[0][both] + begin], 1), axis=0))
            ends = [found[:1] if i == 0 else found[:0], found[-1:] if i == number - 1 else found[:0]]
            ends += [found.take(end, axis) for axis in range(1, found.ndim) for end in (0, -1)]
            touched = np.unique(np.concatenate([end.reshape(-1) for end in ends]))
            border.append(touched[touched > 0] + begin)
            last = np.where(found[-1] > 0, found[-1] + begin, 0)
        pairs, count = np.concatenate(same), self.first[-1] + 1
        links = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), (count, count))
        parts, self.part = connected_components(links, directed=False)
        self.sizes = np.bincount(self.part, np.concatenate(sizes), parts)
        self.inside = np.ones(parts, bool)
        self.inside[self.part[[0, *np.concatenate(border)]]] = False

    def __call__(self, i: int) -> np.ndarray:
        """The parts in the window i, 1 and more."""
        numbers = np.concatenate([self.part[:1], self.part[self.first[i] + 1 : self.first[i + 1] + 1]])
        return numbers[self._found(i)]

    def _found(self, i: int) -> np.ndarray:
        """The parts of the window i by itself; those of the last one are kept."""
        if self.seen[0] != i:
            mask = self.mask(i)
            found, _ = ndimage.label(mask, None if self.faces else np.ones((3,) * mask.ndim))
            self.seen = i, found
        return self.seen[1]


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
        where = _around(boxes)
        old, truth = self.found[where], self.truth[where]
        new = old.copy()
        _change(Store.of(torch.from_numpy(new)), tuple(slice(0, size) for size in new.shape), values, written, how, self.voxel_ml)
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


def choose(cases: Sequence[Held], structures: Structures, reduced: Callable[[np.ndarray, str], np.ndarray] = lambda values, how: values) -> Chosen:
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


def save(path: Path, steps: Steps, dice: Mapping[str, Sequence[float]], best: Chosen | None = None) -> None:
    """Write what `choose` gave with the weights of the end, and with the best ones, where these are others.

    Raises UserError where the file cannot be written.
    """
    write_json(path, {**_table(steps, dice), "best": _table(*(best or (steps, dice)))})


def _table(steps: Steps, dice: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    return {"steps": steps, "validation_dice": {name: {"before": one, "after": other} for name, (one, other) in dice.items()}}


def load(folders: Sequence[Path], names: Sequence[str], weights: str = "last") -> Steps:
    """The steps that all of these trainings chose for these weights, of different sizes the smallest one; of one without the file none.

    Raises UserError where a file does not hold what `save` writes.
    """
    chosen = [_read(folder / POSTPROCESSING, names, weights) for folder in folders]
    return {
        name: {step: min(steps[name][step] for steps in chosen) for step in _WORDS if all(step in steps.get(name, {}) for steps in chosen)}
        for name in names
    }


def _read(path: Path, names: Sequence[str], weights: str) -> Steps:
    if not path.is_file():
        return {}
    table: Any = read_json(path)
    part: Any = table.get("best", {"steps": {}}) if isinstance(table, dict) and weights == "best" else table
    steps: Any = part.get("steps") if isinstance(part, dict) else None
    known = isinstance(steps, dict) and steps.keys() <= set(names) and all(isinstance(how, dict) for how in steps.values())
    if not known or any(how.keys() - _WORDS.keys() for how in steps.values()):
        raise UserError(f"{path}: expected steps {', '.join(_WORDS)} for some of {', '.join(names)}, got {steps!r}")
    return steps


def described(steps: Steps) -> str:
    """The steps in words; "none" without any."""
    lines = [f"{name} {' and '.join(_WORDS[step].format(value) for step, value in how.items())}" for name, how in steps.items() if how]
    return ", ".join(lines) or "none"
