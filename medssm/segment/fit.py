"""What is fitted to the training cases: spacing, slice axis, intensities, patch."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from lightning.fabric import Fabric

from medssm import machine
from medssm.errors import UserError
from medssm.segment.cases import Case
from medssm.segment.data import Dataset
from medssm.segment.nifti import affine_mm, open_nifti, spacing_mm, volume_shape
from medssm.segment.preprocess import Fitted
from medssm.segment.progress import progress
from medssm.segment.volumes import Volume, load, prepare

_SAMPLES = 20_000  # foreground voxels of each case that the percentiles are taken from
_PATCH_VOXELS = {("cpu", 3): 64**3, ("cpu", 2): 192**2, ("gpu", 3): 112**3, ("gpu", 2): 512**2}
_SIDED = re.compile(r"(?<![a-z])(left|right|l|r|lh|rh)(?![a-z])")


def fit(
    table: Dataset,
    cases: Sequence[Case],
    *,
    spatial_dims: int,
    spacing: Sequence[float] | None,
    patch: Sequence[int] | None,
    mirror: str | Sequence[int],
    cache: Path | str | None,
    seed: int,
    fabric: Fabric,
    quiet: bool,
) -> tuple[Fitted, list[Volume]]:
    """Read the training cases and fit to them what the caller leaves open.

    Args:
        table: the data set
        cases: its training cases
        spatial_dims: 3, or 2 for slices
        spacing: millimetres along the RAS axes; None takes the median of the cases
        patch: voxels; None takes a patch shaped like the median case that suits the device
        mirror: axes to mirror, or "auto": all but left-right if a class's name has a side
        cache: a folder for the resampled cases; None keeps them in memory
        seed: of what is drawn
        fabric: Lightning's, for the device and the processes
        quiet: without a progress bar

    Returns:
        What was fitted, and the cases ready for cropping.

    Raises:
        UserError: a case cannot be read, the cases do not fit into memory, or `mirror` names an axis that is not there.
    """
    slice_axis = fit_slice_axis(cases) if spatial_dims == 2 else None
    spacing = tuple(0.0 if axis == slice_axis else float(edge) for axis, edge in enumerate(spacing or fit_spacing(cases)))
    axes = [axis for axis in range(3) if axis != slice_axis]
    mirror = _mirrored(mirror, table.classes, axes)
    if cache is None:
        _check_memory(cases, len(table.channels), spacing)
    first = fabric.rank_zero_first(local=True) if cache else contextlib.nullcontext()  # the first process fills the cache
    with progress("reading", quiet) as show, first:
        loaded = load(cases, table, spacing, cache, show)
    intensities = Intensities(table.channels, seed)
    for image, label in loaded:
        intensities.add(image, label)
    if patch is None:
        shape = np.median([image.shape[1:] for image, _ in loaded], axis=0)
        voxels = _PATCH_VOXELS["cpu" if fabric.device.type == "cpu" else "gpu", spatial_dims]
        patch = fit_patch([shape[axis] for axis in axes], [spacing[axis] for axis in axes], voxels)
    fitted = Fitted(table.channels, spacing, intensities.fit(), table.classes, table.ignore, tuple(patch), slice_axis, mirror)
    return fitted, [prepare(case.name, *arrays, fitted, seed) for case, arrays in zip(cases, loaded, strict=True)]


def fit_spacing(cases: Sequence[Case]) -> tuple[float, float, float]:
    """The median spacing of the cases along the RAS axes, from their headers."""
    x, y, z = np.median([_ras(case)[0] for case in cases], axis=0)
    return float(x), float(y), float(z)


def fit_slice_axis(cases: Sequence[Case]) -> int:
    """The axis across a 2D network's slices: one voxel long in every case, else the one of the largest spacing; the last one of equals."""
    edges, shapes = (np.array(column) for column in zip(*map(_ras, cases), strict=True))
    single = (shapes == 1).all(0)
    median = np.where(single, np.inf, np.median(edges, axis=0))
    return int(2 - np.argmax(median[::-1] >= median.max() * 0.999))


def fit_patch(shape: Sequence[int], spacing: Sequence[float], voxels: int, multiple: int = 16) -> tuple[int, ...]:
    """A patch of at most `voxels`: the median shape, each axis rounded up to `multiple`; then the axis longest in millimetres is shortened
    again and again until it fits. No axis is shorter than `multiple`.
    """
    patch = [max(multiple, math.ceil(size / multiple) * multiple) for size in shape]
    while math.prod(patch) > voxels and max(patch) > multiple:
        longest = max((i for i in range(len(patch)) if patch[i] > multiple), key=lambda i: patch[i] * spacing[i])
        patch[longest] -= multiple
    return tuple(patch)


class Intensities:
    """Collects foreground intensities case by case; `fit` then says how each channel is scaled."""

    def __init__(self, channels: Sequence[str], seed: int):
        self.channels, self.random = channels, np.random.default_rng(seed)
        self.samples: list[np.ndarray] = []

    def add(self, image: torch.Tensor, label: torch.Tensor) -> None:
        """Draw foreground voxels of an image (c, x, y, z) that is not yet scaled, with its label (x, y, z)."""
        if "ct" not in map(str.lower, self.channels):
            return
        foreground = np.flatnonzero((label > 0).numpy())
        if len(foreground):
            chosen = self.random.choice(foreground, _SAMPLES, replace=len(foreground) < _SAMPLES)
            self.samples.append(image.flatten(1)[:, chosen].numpy())

    def fit(self) -> tuple[dict[str, Any], ...]:
        """`Fitted.intensity` for the channels. Raises UserError if a CT had no foreground."""
        return tuple(self._fit(i, name.lower()) for i, name in enumerate(self.channels))

    def _fit(self, channel: int, name: str) -> dict[str, Any]:
        if name == "nonorm":
            return {"scheme": "none"}
        if name != "ct":
            return {"scheme": "zscore"}
        if not self.samples:
            raise UserError("labels: a CT is scaled by its foreground, and no training case has any")
        values = np.concatenate([sample[channel] for sample in self.samples]).astype(np.float64)
        low, high = np.percentile(values, (0.5, 99.5))
        mean, deviation = float(values.mean()), float(values.std()) or 1.0
        return {"scheme": "ct", "low": float(low), "high": float(high), "mean": mean, "deviation": deviation}


def _ras(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """A case's spacing and shape along the RAS axes, from its header."""
    file = open_nifti(case.images[0])
    orientation = nib.io_orientation(affine_mm(file))  # entry i: which RAS axis the file's axis i runs along
    order = np.argsort(orientation[:, 0])
    return spacing_mm(file)[order], np.array(volume_shape(file))[order]


def _mirrored(mirror: str | Sequence[int], classes: dict[str, int], axes: Sequence[int]) -> tuple[int, ...]:
    if mirror == "auto":
        sided = any(_SIDED.search(name.lower().replace("_", " ")) for name in classes)
        return tuple(axis for axis in axes if axis != 0 or not sided)
    if isinstance(mirror, str) or not set(mirror) <= set(axes):
        raise UserError(f'mirror: expected "auto" or some of the axes {tuple(axes)}, got {mirror!r}')
    return tuple(mirror)


def _resampled_shapes(cases: Sequence[Case], spacing: Sequence[float]) -> np.ndarray:
    """(cases, 3): the shapes the cases will have at `spacing`, from their headers."""
    edges, shapes = (np.array(column) for column in zip(*map(_ras, cases), strict=True))
    wanted = np.where(np.array(spacing) > 0, np.array(spacing), edges)
    return np.maximum(1, np.rint(shapes * edges / wanted)).astype(int)


def _check_memory(cases: Sequence[Case], channels: int, spacing: Sequence[float]) -> None:
    """UserError if the resampled cases would fill more than three quarters of the free memory."""
    needed = float(_resampled_shapes(cases, spacing).prod(1, dtype=float).sum() * (4 * channels + 2))
    free = machine.free_memory()
    if needed > 0.75 * free:
        raise UserError(
            f"cache: the cases take {needed / 2**30:.1f} GiB in memory at this spacing, {free / 2**30:.1f} are free: name a folder to keep them in"
        )
