"""What is fitted to the training cases: spacing, slice axis, intensities, patch."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from lightning.fabric import Fabric

from medssm import machine
from medssm.errors import UserError
from medssm.segment.cases import Case
from medssm.segment.data import Dataset, absent_classes
from medssm.segment.images import PICTURE_ENDINGS, ending_of, far_apart, lengths
from medssm.segment.intensity import Intensities
from medssm.segment.preprocess import IGNORE, Fitted
from medssm.segment.progress import progress
from medssm.segment.sides import pairs, sided, unnamed
from medssm.segment.stages import patch_multiples
from medssm.segment.volumes import Volume, load, prepare

_MULTIPLE = 16  # of a patch's edges, where the strides of the network are its own
_PATCH_VOXELS = {("cpu", 3): 64**3, ("cpu", 2): 192**2, ("gpu", 3): 112**3, ("gpu", 2): 512**2}


def fit(
    table: Dataset,
    cases: Sequence[Case],
    *,
    spatial_dims: int,
    spacing: Sequence[float] | None,
    patch: Sequence[int] | None,
    mirror: str | Sequence[int],
    modality: Sequence[str] | None,
    nan: float | None,
    cache: Path | str | None,
    seed: int,
    fabric: Fabric,
    quiet: bool,
    stages: int | None = None,
) -> tuple[Fitted, list[Volume]]:
    """Read the training cases and fit to them what the caller leaves open.

    Args:
        table: the data set
        cases: its training cases
        spatial_dims: 3, or 2 for slices
        spacing: millimetres along the RAS axes; None takes the median of the cases
        patch: voxels; None takes a patch shaped like the median case that suits the device
        mirror: axes to mirror, "auto" or "swap"; see `fit_mirror`
        modality: of the channels; see `intensity.schemes`
        nan: what takes the place of voxels that are not finite; None refuses them
        cache: a folder for the resampled cases; None keeps them in memory
        seed: of what is drawn
        fabric: Lightning's, for the device and the processes
        quiet: without a progress bar
        stages: of a network whose strides will be chosen for the patch; None where they are not to choose, and the patch has multiples of 16

    Returns:
        What was fitted, and the cases ready for cropping.

    Raises:
        UserError: a case cannot be read or is not what it seems, the cases do not fit into memory, or `mirror` names an axis that is not there.
    """
    check_units(cases)
    _check_axes(cases, spatial_dims)
    slice_axis = fit_slice_axis(cases) if spatial_dims == 2 else None
    spacing = tuple(0.0 if axis == slice_axis else float(edge) for axis, edge in enumerate(spacing or fit_spacing(cases)))
    axes = [axis for axis in range(3) if axis != slice_axis]
    oriented = is_oriented(cases[0].images[0])
    mirror, sides = fit_mirror(mirror, ["background", *table.regions.values] if table.regions else table.classes, axes, oriented)
    if sides and table.regions:
        raise UserError("mirror: swap exchanges classes of one voxel each, and regions overlap: name the axes to mirror")
    if cache is None:
        _check_memory(cases, len(table.channels), spacing)
    first = fabric.rank_zero_first(local=True) if cache else contextlib.nullcontext()  # the first process fills the cache
    with progress("reading", quiet) as show, first:
        loaded = load(cases, table, spacing, cache, nan, show)
    values = list(table.classes.values())
    found = {values[position] for _, label in loaded for position in label.unique().tolist() if position != IGNORE}
    for line in () if quiet else absent_classes(table.classes, found):
        print(line, file=sys.stderr)
    intensities = Intensities(table.channels, modality, seed)
    for case, (image, label) in zip(cases, loaded, strict=True):
        intensities.add(str(case.images[0]), image, label)
    if patch is None:
        shape = np.median([image.shape[1:] for image, _ in loaded], axis=0)
        voxels = _PATCH_VOXELS["cpu" if fabric.device.type == "cpu" else "gpu", spatial_dims]
        size, near = [shape[axis] for axis in axes], [spacing[axis] for axis in axes]
        patch = fit_patch(size, near, voxels, [_MULTIPLE] * len(axes) if stages is None else patch_multiples(size, near, stages))
    fitted = Fitted(table.channels, spacing, intensities.fit(), table.classes, table.ignore, tuple(patch), slice_axis, mirror, sides, table.regions)
    return fitted, [prepare(case.name, *arrays, fitted, seed) for case, arrays in zip(cases, loaded, strict=True)]


def _check_axes(cases: Sequence[Case], spatial_dims: int) -> None:
    if spatial_dims == 3 and all(min(case.ras[1]) == 1 for case in cases):
        raise UserError(f"spatial_dims: {cases[0].images[0]} and all other cases are planes: pass --spatial-dims 2")


def fit_spacing(cases: Sequence[Case]) -> tuple[float, float, float]:
    """The median spacing of the cases along the RAS axes, by their headers."""
    x, y, z = np.median([case.ras[0] for case in cases], axis=0)
    return float(x), float(y), float(z)


def fit_slice_axis(cases: Sequence[Case]) -> int:
    """The axis across a 2D network's slices: one voxel long in every case, else the one of the largest spacing; the last one of equals."""
    edges, shapes = (np.array(column) for column in zip(*(case.ras for case in cases), strict=True))
    single = (shapes == 1).all(0)
    median = np.where(single, np.inf, np.median(edges, axis=0))
    return int(2 - np.argmax(median[::-1] >= median.max() * 0.999))


def fit_patch(shape: Sequence[float], spacing: Sequence[float], voxels: int, multiples: Sequence[int]) -> tuple[int, ...]:
    """A patch of at most `voxels`: the first of `shrinking_patches` that is small enough, else their last one."""
    *larger, smallest = shrinking_patches(shape, spacing, multiples)
    return next((patch for patch in larger if math.prod(patch) <= voxels), smallest)


def shrinking_patches(shape: Sequence[float], spacing: Sequence[float], multiples: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Patches from the median shape down, each axis rounded up to its multiple.

    The axis longest in millimetres is shortened by its multiple again and again. No axis is shorter than its multiple.
    """
    patch = [max(multiple, math.ceil(size / multiple) * multiple) for size, multiple in zip(shape, multiples, strict=True)]
    yield tuple(patch)
    while any(size > multiple for size, multiple in zip(patch, multiples, strict=True)):
        longest = max((i for i in range(len(patch)) if patch[i] > multiples[i]), key=lambda i: patch[i] * spacing[i])
        patch[longest] -= multiples[longest]
        yield tuple(patch)


def fit_mirror(
    mirror: str | Sequence[int], classes: Collection[str], axes: Sequence[int], oriented: bool
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """(the axes to mirror, the pairs of classes that change places with left and right). Axis 0 is left-right.

    Args:
        mirror: axes; "auto", which is left-right, the one axis along which a body is nearly its own mirror image, or none where a class has a side or
            no name; or "swap", which is left-right all the same and exchanges the two classes of each pair
        classes: names of the classes or regions, background first
        axes: those of a patch
        oriented: whether the images are of a body; of pictures that say nothing of it, the other axes are mirrored too

    Raises:
        UserError: there is no such axis, or "swap" meets a side without a partner.
    """
    names = list(classes)
    if not isinstance(mirror, str) and set(mirror) <= set(axes):
        return tuple(mirror), ()
    if mirror not in ("auto", "swap"):
        raise UserError(f'mirror: expected "auto", "swap" or some of the axes {tuple(axes)}, got {mirror!r}')
    found = tuple(axis for axis in axes if axis == 0 or not oriented)
    if mirror == "auto":
        return tuple(axis for axis in found if axis != 0 or not (sided(names) or unnamed(names[1:]))), ()
    partners = pairs(names)
    alone = [name for name in sided(names) if not any(name in pair for pair in partners)]
    if alone:
        raise UserError(f"mirror: swap exchanges pairs of classes; {', '.join(alone)} has a side and no partner")
    return found, tuple((names.index(left), names.index(right)) for left, right in partners)


def is_oriented(image: Path) -> bool:
    """Whether the file says where left and right, front and back are: all do but pictures."""
    return ending_of(image).lower() not in PICTURE_ENDINGS


def check_units(cases: Sequence[Case]) -> None:
    """UserError that names a case whose spacing is far from the others': its header has a wrong unit of length."""
    edges = {case.images[0]: case.ras[0] for case in cases}
    for line in wrong_units(edges).values():
        raise UserError(line)


def wrong_units(edges: Mapping[Path, np.ndarray]) -> dict[Path, str]:
    """{file: what is wrong} for the files whose spacing is so far from the median of all that one of the two has a wrong unit of length."""
    middle = np.exp(np.median(np.log(list(edges.values())), axis=0))
    return {
        file: f"{file}: voxels of {lengths(edge)} mm, where the median of the cases is {lengths(middle)} mm: "
        "one of the two has a wrong unit of length in its header"
        for file, edge in edges.items()
        if far_apart(edge, middle)
    }


def resampled_shapes(cases: Sequence[Case], spacing: Sequence[float]) -> np.ndarray:
    """(cases, 3): the shapes the cases will have at `spacing`, by their headers."""
    edges, shapes = (np.array(column) for column in zip(*(case.ras for case in cases), strict=True))
    wanted = np.where(np.array(spacing) > 0, np.array(spacing), edges)
    return np.maximum(1, np.rint(shapes * edges / wanted)).astype(int)


def _check_memory(cases: Sequence[Case], channels: int, spacing: Sequence[float]) -> None:
    """UserError if the resampled cases would fill more than three quarters of the free memory."""
    needed = float(resampled_shapes(cases, spacing).prod(1, dtype=float).sum() * (4 * channels + 2))
    free = machine.free_memory()
    if needed > 0.75 * free:
        raise UserError(
            f"cache: the cases take {needed / 2**30:.1f} GiB in memory at this spacing, {free / 2**30:.1f} are free: name a folder to keep them in"
        )
