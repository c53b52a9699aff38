"""The held-out cases of a training: segmented and scored while it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import nn

from medssm.scratch import slabs
from medssm.segment import pages, postprocess
from medssm.segment.cases import Case
from medssm.segment.images import open_image
from medssm.segment.inference import probabilities
from medssm.segment.preprocess import IGNORE, Fitted
from medssm.segment.regions import decided
from medssm.segment.resample import at_spacing, ras, resampled
from medssm.segment.uncertainty import conformal
from medssm.segment.volumes import Arrays


class Validation:
    """Call it with a network, and with what shows a line of text, for the mean Dice of each class or region, and of all of them as "mean".

    Dice is taken at the network's spacing; a class that is in neither label nor prediction of a case is left out there. `found` keeps the last label
    maps, as positions in the classes, and `dice` each case's Dice. The call that is the `last` one also keeps the label maps on the grids of the
    images, as predict writes them, for `volumes`.

    Args:
        cases: those that this process segments
        arrays: their images and labels
        fitted: what was fitted to the training cases
        fabric: Lightning's, for the device and the processes
    """

    def __init__(self, cases: Sequence[Case], arrays: Sequence[Arrays], fitted: Fitted, fabric: Fabric):
        self.cases, self.arrays, self.fitted, self.fabric = cases, arrays, fitted, fabric
        self.found: list[np.ndarray] = []
        self.dice: list[dict[str, float]] = []
        self.on_own_grid: list[torch.Tensor] = []

    def __call__(self, network: nn.Module, show: Callable[[str], None] = lambda text: None, last: bool = False) -> dict[str, float]:
        fitted, device = self.fitted, self.fabric.device
        half = torch.float16 if device.type == "cuda" else None
        sums, self.found, self.dice, self.on_own_grid = torch.zeros(2, len(fitted.structures), dtype=torch.float64), [], [], []
        for number, (image, label) in enumerate(self.arrays, 1):
            show(f"validating, case {number} of {len(self.arrays)}")
            p = probabilities(network, image, fitted, device=device, half=half)
            predicted = decided(p, list(fitted.classes.values()), fitted.regions)
            self.found.append(predicted.to(torch.int16).numpy())
            if last:
                self.on_own_grid.append(_on_own_grid(self.cases[number - 1], p, fitted))
            self.dice.append({})
            for i, (name, values) in enumerate(fitted.structures.items()):
                positions = torch.tensor(values)
                truth, found = torch.isin(label, positions), torch.isin(predicted, positions) & (label != IGNORE)
                size = int(truth.sum() + found.sum())
                if size:
                    self.dice[-1][name] = 2 * int((truth & found).sum()) / size
                    sums[:, i] += torch.tensor([self.dice[-1][name], 1.0], dtype=torch.float64)
        sums = self._reduced(sums, "sum")
        dice = {name: (sums[0, i] / sums[1, i]).item() for i, name in enumerate(fitted.structures) if sums[1, i] > 0}
        return {**dice, "mean": sum(dice.values()) / len(dice) if dice else 0.0}

    def postprocessing(self) -> postprocess.Chosen:
        """What post-processing would have raised the last result, and by how much; see `postprocess.choose`."""
        held = []
        for case, (_, label), found in zip(self.cases, self.arrays, self.found, strict=True):
            own = case.ras[0]
            voxel = float(np.prod(np.where(np.array(self.fitted.spacing) > 0, self.fitted.spacing, own))) / 1000
            held.append(postprocess.Held(found, label.numpy(), voxel, len(self.fitted.classes)))
        return postprocess.choose(held, self.fitted.to_process, lambda values, how: self._reduced(torch.from_numpy(values), how).numpy())

    def volumes(self, steps: postprocess.Steps) -> conformal.Measured:
        """The volumes in the held-out cases of all processes, as predict would measure them with this post-processing; see `conformal.measured`."""
        return dict(self._gathered(list(conformal.measured(self.cases, self.on_own_grid, self.fitted, steps).items())))

    def rows(self) -> list[dict[str, Any]]:
        """The cases of all processes as the last call found them, the best first: name, file, Dice of each class, their mean, and a picture.

        A case without any class, in the label and as found, has no mean and comes last.
        """
        rows = [
            {
                "name": case.name,
                "file": str(case.images[0]),
                "dice": dice,
                "mean": sum(dice.values()) / len(dice) if dice else None,
                "picture": self._picture(case, image, label.numpy().clip(0), found),
            }
            for case, (image, label), found, dice in zip(self.cases, self.arrays, self.found, self.dice, strict=True)
        ]
        return sorted(self._gathered(rows), key=lambda row: -1.0 if row["mean"] is None else row["mean"], reverse=True)

    def _picture(self, case: Case, image: torch.Tensor, label: np.ndarray, found: np.ndarray) -> str:
        """Slices where the label has most: what was found in colour, the label's outlines in white."""
        own, wanted = case.ras[0], np.array(self.fitted.spacing)
        grey = image[0].numpy()
        ct = self.fitted.intensity[0]["scheme"] == "ct"
        low, high = pages.CT_WINDOWS["soft tissue"] if ct else np.percentile(grey.reshape(-1)[:: max(1, grey.size // 2**20)], (0.5, 99.5)).tolist()
        return pages.slices(grey, [found, label], np.where(wanted > 0, wanted, own), (low, high), 150, at=pages.richest(label))

    def _gathered(self, rows: list[Any]) -> list[Any]:
        """The rows of all processes."""
        if self.fabric.world_size == 1:
            return rows
        parts: list[Any] = [None] * self.fabric.world_size
        torch.distributed.all_gather_object(parts, rows)
        return [row for part in parts for row in part]

    def _reduced(self, values: torch.Tensor, how: Any) -> torch.Tensor:
        return values if self.fabric.world_size == 1 else cast(torch.Tensor, self.fabric.all_reduce(values, reduce_op=how))


def _on_own_grid(case: Case, p: torch.Tensor, fitted: Fitted) -> torch.Tensor:
    """The label map of probabilities (outputs, x, y, z) on the grid of the case's image along RAS axes, decided as predict does."""
    image = open_image(case.images[0])
    grid, onto = at_spacing(image.affine, image.shape, fitted.spacing), ras(image.affine, image.shape)
    values = list(fitted.classes.values())
    labels = torch.empty(onto.shape, dtype=fitted.position_type)
    for rows in slabs(onto.shape[0], 4 * len(p) * math.prod(onto.shape[1:])):
        labels[rows] = decided(resampled(lambda part: p[:, part], grid, onto, rows), values, fitted.regions)
    return labels
