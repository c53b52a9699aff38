"""Wrong voxels among the most uncertain ones: the voxels of an image in the order of their uncertainty, and what of its errors that order finds.

Voxels of equal uncertainty count as in any order among them. Uncertainties are compared by the first 20 bits of the float32 number, so to 1 part in
2,000, and a ranking is two tables of counts, whatever the size of the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

_KEPT = 12  # bits of a float32 that are left out; the others, of a number that is not negative, are in its order


@dataclass(frozen=True)
class Ranking:
    """Voxels by their uncertainty, the most uncertain first.

    Args:
        voxels: their number in each group of equal uncertainty
        wrong: the number of the wrong ones among them
    """

    voxels: np.ndarray
    wrong: np.ndarray

    @classmethod
    def of(cls, uncertainty: np.ndarray, wrong: np.ndarray) -> Ranking:
        """The ranking of voxels with an uncertainty of 0 or more, (n,), of which some are wrong, (n,) bool."""
        values = np.maximum(uncertainty.astype(np.float32), 0)
        groups = values.view(np.int32) >> _KEPT
        size = 1 << (31 - _KEPT)
        voxels, errors = np.bincount(groups, minlength=size), np.bincount(groups[wrong], minlength=size)
        return cls(voxels[::-1], errors[::-1])

    def __add__(self, other: Ranking) -> Ranking:
        """The voxels of both."""
        return Ranking(self.voxels + other.voxels, self.wrong + other.wrong)

    @property
    def total(self) -> int:
        return int(self.voxels.sum())

    @property
    def errors(self) -> int:
        return int(self.wrong.sum())

    def found(self, share: float) -> float | None:
        """The share of the wrong voxels that are among so large a share of all voxels, the most uncertain ones; None where none is wrong."""
        if not self.errors:
            return None
        checked, right = self._sums
        return float(np.interp(share * self.total, checked, right) / self.errors)

    def to_find(self, share: float) -> float | None:
        """The number of the most uncertain voxels that hold a share of the wrong ones; None where none is wrong."""
        if not self.errors:
            return None
        checked, right = self._sums
        i = int(np.searchsorted(right, share * self.errors))
        if i == 0:
            return 0.0
        part = (share * self.errors - right[i - 1]) / (right[i] - right[i - 1])
        return float(checked[i - 1] + part * (checked[i] - checked[i - 1]))

    def curve(self, coverages: np.ndarray) -> np.ndarray:
        """The share of wrong voxels among the least uncertain ones, for each share of all voxels that these are."""
        checked, right = self._sums
        kept = np.asarray(coverages) * self.total
        return (self.errors - np.interp(self.total - kept, checked, right)) / np.maximum(kept, 1e-12)

    def area(self) -> float:
        """The area under that curve, for shares from 0 to 1: the share of wrong voxels itself for an order by chance, less where it finds them."""
        kept = self.voxels > 0
        t, w = self.voxels[kept].astype(float), self.wrong[kept].astype(float)
        after, left = t[::-1].cumsum()[::-1] - t, w[::-1].cumsum()[::-1] - w  # voxels and wrong ones that are less uncertain than a group
        before, rate = after + t, w / t
        # from `before` to `after` voxels kept, left + (m - after) rate of m are wrong: the integral of that share over m
        logs = np.log(np.divide(before, after, out=np.ones_like(after), where=after > 0))
        return float(((left - after * rate) * logs + rate * t).sum() / t.sum())

    def least_area(self) -> float:
        """The area of the order that has all wrong voxels first."""
        share = self.errors / self.total
        return share + (1 - share) * float(np.log1p(-share)) if share < 1 else 1.0

    @cached_property
    def _sums(self) -> tuple[np.ndarray, np.ndarray]:
        kept = self.voxels > 0
        return np.concatenate([[0], self.voxels[kept].cumsum()]), np.concatenate([[0], self.wrong[kept].cumsum()])
