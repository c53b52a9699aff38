"""An image as a trained network sees it: its grid, its windows, and the voxels of the class that is explained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from medssm.scratch import Scratch, Store
from medssm.segment.explain.score import Seen, windows_of
from medssm.segment.inference import Windows, importance
from medssm.segment.preprocess import Fitted
from medssm.segment.resample import Grid, on_spacing, resampled


class Run(NamedTuple):
    """A trained network, and what was fitted for it."""

    network: nn.Module
    fitted: Fitted


class Sight(NamedTuple):
    """output: the network's for the class. grid: of the image at the network's spacing. found: the class's voxels on it, (x, y, z) bool. seen: the
    windows that hold them."""

    run: Run
    output: int
    grid: Grid
    windows: Windows
    found: Tensor
    seen: list[Seen]

    @property
    def spacing(self) -> list[float]:
        """Millimetres between voxels along the axes of the network's windows."""
        edges = np.linalg.norm(self.grid.affine[:3, :3], axis=0).tolist()
        return [edge for axis, edge in enumerate(edges) if axis != self.run.fitted.slice_axis]


def sight(run: Run, output: int, image: Store, onto: Grid, label: np.ndarray, overlap: float, stores: Scratch) -> Sight:
    """What `run` sees of an image.

    Args:
        output: the network's for the class
        image, onto: the image (x, c, y, z) along RAS axes, and its grid
        label: the voxels of the class on that grid, (x, y, z) bool, some of them True
        overlap: of neighbouring windows
        stores: room for the image at the network's spacing
    """
    grid, image = on_spacing(image, onto, run.fitted.spacing, stores)
    mask = torch.from_numpy(label)
    part = resampled(lambda rows: mask[None, rows].float(), onto, grid, slice(0, grid.shape[0]))[0]
    found = part >= 0.5 if (part >= 0.5).any() else part == part.max()  # of less than a voxel at this spacing, what there is most of
    windows = Windows(image, run.fitted, overlap)
    return Sight(run, output, grid, windows, found, windows_of(windows, found, run.fitted))


def middle(found: Tensor) -> tuple[int, ...]:
    """The voxel of a class that lies nearest to the middle of all of them."""
    places = found.nonzero().double()
    x, y, z = places[(places - places.mean(0)).square().sum(1).argmin()].int().tolist()
    return x, y, z


def deepest(sight: Sight, voxel: Sequence[int]) -> tuple[tuple[slice, ...], tuple[int, ...]]:
    """The window in which a voxel of the grid lies deepest, and where in it the voxel is, along the axes of the patch."""
    fitted, windows = sight.run.fitted, sight.windows
    weights = importance(fitted, torch.device("cpu"))
    weights = weights if fitted.slice_axis is None else weights.unsqueeze(fitted.slice_axis)
    padded = [at + inside.start for at, inside in zip(voxel, windows.inside, strict=True)]
    places = [tuple(place) for place in windows.places if all(cut.start <= at < cut.stop for at, cut in zip(padded, place, strict=True))]

    def inside_of(place: tuple[slice, ...]) -> tuple[int, ...]:
        return tuple(at - cut.start for at, cut in zip(padded, place, strict=True))

    best = max(places, key=lambda place: float(weights[inside_of(place)]))
    return best, tuple(at for axis, at in enumerate(inside_of(best)) if axis != fitted.slice_axis)
