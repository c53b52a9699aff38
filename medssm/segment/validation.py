"""The held-out cases of a training: segmented and scored while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import nn

from medssm.segment import postprocess
from medssm.segment.cases import Case
from medssm.segment.images import open_image, ras_grid
from medssm.segment.inference import probabilities
from medssm.segment.preprocess import IGNORE, Fitted
from medssm.segment.regions import decided
from medssm.segment.volumes import Arrays


class Validation:
    """Call it with a network for the mean Dice of each class or region, and of all of them as "mean".

    Dice is taken at the network's spacing; a class that is in neither label nor prediction of a case is left out there. `found` keeps the last label
    maps, as positions in the classes.

    Args:
        cases: those that this process segments
        arrays: their images and labels
        fitted: what was fitted to the training cases
        fabric: Lightning's, for the device and the processes
    """

    def __init__(self, cases: Sequence[Case], arrays: Sequence[Arrays], fitted: Fitted, fabric: Fabric):
        self.cases, self.arrays, self.fitted, self.fabric = cases, arrays, fitted, fabric
        self.found: list[np.ndarray] = []

    def __call__(self, network: nn.Module) -> dict[str, float]:
        fitted, device = self.fitted, self.fabric.device
        half = torch.float16 if device.type == "cuda" else None
        sums, self.found = torch.zeros(2, len(fitted.structures), dtype=torch.float64), []
        for image, label in self.arrays:
            predicted = decided(probabilities(network, image, fitted, device=device, half=half), list(fitted.classes.values()), fitted.regions)
            self.found.append(predicted.to(torch.int16).numpy())
            for i, positions in enumerate(map(torch.tensor, fitted.structures.values())):
                truth, found = torch.isin(label, positions), torch.isin(predicted, positions) & (label != IGNORE)
                size = int(truth.sum() + found.sum())
                if size:
                    sums[:, i] += torch.tensor([2 * int((truth & found).sum()) / size, 1.0], dtype=torch.float64)
        sums = self._reduced(sums, "sum")
        dice = {name: (sums[0, i] / sums[1, i]).item() for i, name in enumerate(fitted.structures) if sums[1, i] > 0}
        return {**dice, "mean": sum(dice.values()) / len(dice) if dice else 0.0}

    def postprocessing(self) -> tuple[postprocess.Steps, dict[str, list[float]]]:
        """What post-processing would have raised the last result, and by how much; see `postprocess.choose`."""
        held = []
        for case, (_, label), found in zip(self.cases, self.arrays, self.found, strict=True):
            own = ras_grid(open_image(case.images[0]))[0]
            voxel = float(np.prod(np.where(np.array(self.fitted.spacing) > 0, self.fitted.spacing, own))) / 1000
            held.append(postprocess.Held(found, label.numpy(), voxel, len(self.fitted.classes)))
        return postprocess.choose(held, self.fitted.to_process, lambda values, how: self._reduced(torch.from_numpy(values), how).numpy())

    def _reduced(self, values: torch.Tensor, how: Any) -> torch.Tensor:
        return values if self.fabric.world_size == 1 else cast(torch.Tensor, self.fabric.all_reduce(values, reduce_op=how))
