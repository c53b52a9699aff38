"""Small classified images on disk: bright and dark blobs of patients, as pictures or volumes."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

SMALL = {"features": [16, 32], "depths": [1, 1]}


def picture(kind: int, seed: int, size: int = 32, colours: int = 3) -> np.ndarray:
    """(size, size, colours) uint8: a bright disc (0), a dark disc (1), or a bright bar (2) in noise."""
    random = np.random.default_rng((kind, seed))
    y, x = np.mgrid[:size, :size] - size / 2
    shape = np.hypot(x, y) < size * 0.3 if kind < 2 else abs(y) < size * 0.12
    image = 128 + random.normal(0, 12, (size, size, colours)) + (-70 if kind == 1 else 70) * shape[..., None]
    return image.clip(0, 255).astype(np.uint8)


def folder(root: Path, groups: int = 8, classes=("disc", "dark", "bar"), each: int = 2, size: int = 32) -> Path:
    """A folder of classes: `each` pictures of every class for each of the patients p0, p1, ..."""
    for kind, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(groups):
            for j in range(each):
                Image.fromarray(picture(kind, 10 * i + j, size)).save(root / name / f"p{i}_{j}.png")
    return root


def table(root: Path, name: str = "table.csv", headings=("file", "class", "patient")) -> Path:
    """A CSV for the pictures of a folder of classes."""
    with open(root / name, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(headings)
        rows.writerows((f"{p.parent.name}/{p.name}", p.parent.name, p.name.split("_")[0])[: len(headings)] for p in sorted(root.glob("*/*.png")))
    return root / name


def volumes(root: Path, groups: int = 4) -> Path:
    """A folder of classes of volumes of different sizes and orientations: a bright ball, or a dark one."""
    for kind, name in enumerate(("bright", "dark")):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(groups):
            shape = (30 + i, 32, 36 - i)
            random, grid = np.random.default_rng((kind, i)), np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
            ball = np.linalg.norm(grid - np.array(shape) / 2, axis=-1) < 9
            data = 100 + random.normal(0, 5, shape) + (60, -60)[kind] * ball
            nib.save(nib.Nifti1Image(data.astype(np.float32), np.diag([(-1) ** i, 1, 1, 1])), root / name / f"p{i}.nii.gz")
    return root
