"""Entropy and mutual information of an ensemble, and their maps beside a label map.

With the probabilities p_m of the members and their mean p, in each voxel and in nats:

    H[p] = - sum over c of p_c log p_c      of regions: the sum over them of - p log p - (1 - p) log(1 - p)
    entropy             H[p]                all that is uncertain
    mutual information  H[p] - mean of H[p_m]   the part on which the members disagree; 0 where all say the same

Source: Depeweg et al., Decomposition of Uncertainty in Bayesian Deep Learning (ICML 2018).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from medssm.scratch import Scratch, Store
from medssm.segment.images import Image, nifti, strip_ending
from medssm.segment.preprocess import Fitted
from medssm.segment.regions import decided
from medssm.segment.resample import Grid
from medssm.segment.stored import OnFile

ENTROPY, MUTUAL_INFORMATION = "entropy", "mutual-information"
MAPS = (ENTROPY, MUTUAL_INFORMATION)
PROBABILITIES = "probabilities"


def map_of(label_map: Path, what: str) -> Path:
    """The file of a map beside a label map."""
    return label_map.with_name(f"{strip_ending(label_map)}_{what}.nii.gz")


def entropy(p: Tensor, regions: bool) -> Tensor:
    """H[p] in nats, (...), of probabilities (c, ...): of one distribution over the classes, or of each region."""
    p = p.clamp(0, 1)  # interpolation rounds
    found: Tensor = torch.special.entr(p).sum(0)
    return found + torch.special.entr(1 - p).sum(0) if regions else found


class Sums:
    """The members' probabilities and entropies, summed on the grid of an image along RAS axes, without keeping any member.

    Args:
        grid: of the image, along RAS axes
        fitted: what was fitted to the data of the runs
        scratch: room for the sums
    """

    def __init__(self, grid: Grid, fitted: Fitted, scratch: Scratch):
        x, y, z = grid.shape
        self.fitted, self.members = fitted, 0
        self._total = scratch.store(x, len(fitted.outputs), y, z)
        self._entropies = scratch.store(x, y, z)

    def add(self, read: Callable[[slice], Tensor], scratch: Scratch) -> Store:
        """Take a member in. Returns its own label map, as positions of classes.

        Args:
            read: gives rows (outputs, rows, y, z) of its probabilities
            scratch: room for the label map
        """
        values = list(self.fitted.classes.values())
        labels = scratch.store(*self._entropies.shape, dtype=self.fitted.position_type)
        for rows in self._total.slabs():
            p = read(rows)
            self._total.add((rows,), p.movedim(1, 0))
            self._entropies.add((rows,), entropy(p, bool(self.fitted.regions)))
            labels[rows] = decided(p, values, self.fitted.regions).to(labels.dtype)
        self.members += 1
        return labels

    def mean(self, rows: slice) -> Tensor:
        """Rows (outputs, rows, y, z) of the members' mean."""
        return self._total[rows].movedim(1, 0) / self.members

    def write(self, label_map: Path, image: Image, scratch: Scratch) -> None:
        """Write the maps beside a label map, in float32, on the grid of its image."""
        total = scratch.store(*self._entropies.shape)
        for rows in total.slabs():
            total[rows] = entropy(self.mean(rows), bool(self.fitted.regions))
            self._entropies[rows] = (total[rows] - self._entropies[rows] / self.members).clamp(min=0)  # rounding alone brings it below 0
        for what, store in ((ENTROPY, total), (MUTUAL_INFORMATION, self._entropies)):
            nifti.write(map_of(label_map, what), OnFile(store, image), image)
