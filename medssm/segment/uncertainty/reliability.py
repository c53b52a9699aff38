"""Reliability of probabilities: how often voxels that are given a probability p of a class are of that class."""

from __future__ import annotations

from typing import Any

import numpy as np

BINS = 20


class Reliability:
    """Counts over the voxels of any number of images, in bins of equal width.

        ECE = sum over bins of |mean probability - share that is of the class| x (voxels in the bin) / (voxels)

    Most voxels of a scan are far from any structure and have a probability near 0, which makes that mean small. `unsure` is the same over voxels
    with a probability from 0.05 to 0.95.
    """

    def __init__(self) -> None:
        self.voxels, self.probability, self.positive = (np.zeros(BINS) for _ in range(3))

    def add(self, probability: np.ndarray, truth: np.ndarray) -> None:
        """Take voxels in: their probabilities of a class (n,), and whether they are of it (n,)."""
        bins = np.minimum((probability * BINS).astype(int), BINS - 1)
        self.voxels += np.bincount(bins, minlength=BINS)
        self.probability += np.bincount(bins, probability, BINS)
        self.positive += np.bincount(bins, truth, BINS)

    def result(self) -> dict[str, Any]:
        """{"ece", "ece_unsure", "bins": [{"voxels", "probability", "share"}]}, of the bins that have voxels."""
        gaps = np.abs(self.probability - self.positive)
        unsure = slice(1, BINS - 1)
        rows = [
            {"voxels": int(n), "probability": p / n, "share": y / n}
            for n, p, y in zip(self.voxels, self.probability.tolist(), self.positive.tolist(), strict=True)
            if n
        ]
        return {
            "ece": float(gaps.sum() / self.voxels.sum()) if self.voxels.any() else None,
            "ece_unsure": float(gaps[unsure].sum() / self.voxels[unsure].sum()) if self.voxels[unsure].any() else None,
            "bins": rows,
        }
