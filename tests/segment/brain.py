"""A small brain on disk for the demo: an ellipsoid in the LAS orientation, with a bright ball and a dark box on each side."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

from medssm.segment.demo import data

BALL, BOX = ((18.0, 12.0, 0.0), 8.0), ((16.0, -16.0, 4.0), 6.0)  # centre on the right in millimetres, radius or half an edge
_SHAPE, _EDGE = (37, 43, 35), 2.0


def install(monkeypatch, folder: Path, shift: float = 1.5, noise: float = 5.0) -> None:
    """Make the brain the demo's source "synthetic". `shift` moves the left side's structures in millimetres: 0 is symmetric."""
    affine = np.diag([-_EDGE, _EDGE, _EDGE, 1.0])
    affine[:3, 3] = np.array([36.0, -42.0, -34.0])
    _write(folder, "t1.nii.gz", affine, _SHAPE, lambda place: _image(place, shift, noise))
    if shift:  # the labels on a coarser grid in another orientation, as atlases have
        coarse = np.diag([1.5, 1.5, 1.5, 1.0])
        coarse[:3, 3] = -45.0
        _write(folder, "atlas.nii.gz", coarse, (61, 61, 61), lambda place: _labels(place, shift))
    else:
        _write(folder, "atlas.nii.gz", affine, _SHAPE, lambda place: _labels(place, shift))
    source = data.Source(
        "a synthetic brain",
        lambda: folder,
        "t1.nii.gz",
        "atlas.nii.gz",
        "t1.nii.gz",
        {"ball": (11, 12), "box": (21, 22)},
        "Made for the tests.",
        "cannot be missing",
    )
    monkeypatch.setitem(data.SOURCES, "synthetic", source)


def _write(folder: Path, name: str, affine: np.ndarray, shape: tuple[int, ...], values) -> None:
    place = nib.affines.apply_affine(affine, np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1))
    nib.save(nib.Nifti1Image(values(place), affine), folder / name)


def _labels(place: np.ndarray, shift: float) -> np.ndarray:
    """Values 11 and 21 on the right, 12 and 22 on the left."""
    labels = np.zeros(place.shape[:3], np.uint8)
    for side, left in ((1, 0), (-1, 1)):
        moved = place * (side, 1, 1) - (0, shift * left, 0)
        labels[np.linalg.norm(moved - BALL[0], axis=-1) <= BALL[1]] = 11 + left
        labels[np.abs(moved - BOX[0]).max(-1) <= BOX[1]] = 21 + left
    return labels


def _image(place: np.ndarray, shift: float, noise: float) -> np.ndarray:
    brain = np.linalg.norm(place / (32.0, 38.0, 30.0), axis=-1) <= 1
    tissue = np.select([_labels(place, shift) // 10 == 1, _labels(place, shift) // 10 == 2], [160.0, 60.0], 100.0)
    return np.where(brain, tissue + np.random.default_rng(0).normal(0, noise, tissue.shape), 0).astype(np.int16)
