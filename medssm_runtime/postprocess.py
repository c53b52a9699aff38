"""Post-processing of label maps by the steps that raised the Dice of the held-out cases in training; see medssm.segment.postprocess.

    fill_holes          holes of the background inside of a structure become part of it
    largest_component   only its largest connected part is kept
    smallest_ml         connected parts below so many millilitres are removed

What is removed becomes background. Parts are connected across faces, edges and corners; a hole is what no path across faces leads out of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Steps = Mapping[str, Mapping[str, float]]  # {structure: {step: True, or its millilitres}}
Structures = Mapping[str, tuple[Sequence[int], int]]  # {structure: (its values, the one that a filled hole gets)}


def processed(labels: np.ndarray, steps: Steps, structures: Structures, voxel_ml: float) -> np.ndarray:
    """A label map (x, y, z) after the steps of each structure, one structure after the other, in their order."""
    for name, (values, written) in structures.items():
        if steps.get(name):
            labels = _changed(labels, values, written, steps[name], voxel_ml)
    return labels


def _changed(labels: np.ndarray, values: Sequence[int], written: int, how: Mapping[str, float], voxel_ml: float) -> np.ndarray:
    from scipy import ndimage  # here: most of the time that a start without post-processing takes

    labels, whole = labels.copy(), np.isin(labels, values)
    for box in ndimage.find_objects(whole.view(np.uint8)):
        mask, part = whole[box], labels[box]
        kept = _cleaned(mask, how, voxel_ml)
        part[mask & ~kept] = 0
        part[kept & ~mask & (part == 0)] = written
    return labels


def _cleaned(mask: np.ndarray, how: Mapping[str, float], voxel_ml: float) -> np.ndarray:
    from scipy import ndimage

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
