"""Integrated gradients and occlusion of a class in an image, window after window."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from medssm.scratch import Scratch
from medssm.segment.explain.attribution import Attribution, integrated_gradients, occlusion
from medssm.segment.explain.score import ClassScore, Seen, means, thick, without_information
from medssm.segment.explain.sight import Sight

METHODS = ("integrated gradients", "occlusion")
_BOXES = 256  # that a window is occluded in, about


class Maps:
    """A method's map of an image, (x, c, y, z) at the network's spacing, to which windows are added.

    total: the sum of all values. difference: the score of the image less that of the baseline. first: the map of the first window.
    """

    def __init__(self, sight: Sight, stores: Scratch) -> None:
        self.sight, self.total, self.difference = sight, 0.0, 0.0
        self.store = stores.store(*sight.windows.image.shape)
        self.first: Tensor | None = None

    def add(self, seen: Seen, found: Attribution) -> None:
        """Add what was attributed in a window."""
        inside, (rows, *others) = self.sight.windows.over(seen.place)
        values = found.values.cpu()
        part = thick(values, self.sight.run.fitted)[(slice(None), *inside)]
        self.store.add((rows, slice(None), *others), part.movedim(0, 1))
        self.total += float(values.double().sum())
        self.difference += found.difference
        self.first = values if self.first is None else self.first


class Scene:
    """A window with its score, its input and its baseline, each (c, *patch)."""

    def __init__(self, sight: Sight, seen: Seen, levels: Tensor, device: torch.device) -> None:
        fitted, voxels = sight.run.fitted, sum(int(one.mask.sum()) for one in sight.seen)
        x, baseline, self.inside = without_information(sight.windows, seen.place, fitted, levels)
        self.x, self.baseline = x.to(device), baseline.to(device)
        self.score = ClassScore(sight.run.network, sight.output, bool(fitted.regions), seen.mask.to(device), voxels)


def scenes(sight: Sight, device: torch.device) -> list[Callable[[], Scene]]:
    """What makes the scene of each window that holds the class, the one with most of it first."""
    levels = means(sight.windows)
    return [lambda seen=seen: Scene(sight, seen, levels, device) for seen in sight.seen]  # type: ignore[misc]


def box_of(patch: Sequence[int], spacing: Sequence[float]) -> list[int]:
    """The voxels of a box along each axis: some 256 boxes fill the patch, their edges as equal in millimetres as voxels allow."""
    edge = (math.prod(patch) * math.prod(spacing) / _BOXES) ** (1 / len(patch))
    return [min(n, max(1, round(edge / mm))) for n, mm in zip(patch, spacing, strict=True)]


def attributed(sight: Sight, stores: Scratch, device: torch.device, batch: int, show: Callable[[float], None]) -> dict[str, Maps]:
    """The maps of METHODS; `batch` inputs are in memory at a time."""
    maps = {name: Maps(sight, stores) for name in METHODS}
    box = box_of(sight.run.fitted.patch, sight.spacing)
    for i, (seen, make) in enumerate(zip(sight.seen, scenes(sight, device), strict=True)):
        scene = make()

        def show_window(part: float, i: int = i) -> None:
            show((i + part) / len(sight.seen))

        maps["integrated gradients"].add(seen, integrated_gradients(scene.score, scene.x, scene.baseline, batch=batch))
        maps["occlusion"].add(seen, occlusion(scene.score, scene.x, scene.baseline, box, batch=batch, show=show_window))
    return maps
