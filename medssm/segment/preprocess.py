"""What a network sees of a file, and what of that was fitted to the data.

Every image is turned to RAS, resampled to one spacing and scaled (`intensity`). `fit` finds the numbers, `Fitted` keeps them beside the weights, and
`predict` reads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Orientation, Spacing

from medssm import tasks
from medssm.errors import UserError
from medssm.files import read_json, write_json
from medssm.segment.cases import Case
from medssm.segment.data import Dataset, check_values
from medssm.segment.images import open_image, read_image, read_label
from medssm.segment.regions import Regions, structures

IGNORE = -1  # in a label map for training: a voxel without a label, which counts in no loss


@dataclass(frozen=True)
class Fitted:
    """What was fitted to the training cases or chosen for them; all axes are RAS.

    spacing      millimetres (0 keeps an axis as it is: the one across a 2D network's slices)
    intensity    for each channel {"scheme": "ct", "low", "high", "mean", "deviation"}, {"scheme": "zscore"} or {"scheme": "none"}
    classes      {name: value in the label files}, background first; without regions a network's output channel is the position in this table
    patch        voxels, an entry for each of the network's axes
    slice_axis   the axis across a 2D network's slices, None in 3D
    mirror       the axes that training mirrored, and that mirroring in `predict` averages over
    sides        pairs of classes, by position, that change places when left and right are mirrored
    regions      overlapping classes made of these; the network then has an output, with a sigmoid, for each region
    """

    channels: tuple[str, ...]
    spacing: tuple[float, ...]
    intensity: tuple[dict[str, Any], ...]
    classes: dict[str, int]
    ignore: int | None
    patch: tuple[int, ...]
    slice_axis: int | None = None
    mirror: tuple[int, ...] = ()
    sides: tuple[tuple[int, int], ...] = ()
    regions: Regions = field(default_factory=Regions)

    def save(self, path: Path) -> None:
        """Write it as JSON. Raises UserError if the file cannot be written."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> Fitted:
        """Read what `save` wrote. Raises UserError if the file cannot be read or was written by another version."""
        table = read_json(path)
        if tasks.is_fitted(path):
            raise UserError(f"{path}: of a classifier (medssm train --task classify), where a network that segments is expected")
        try:
            regions = Regions(**_tuples(table.pop("regions", {})))
            return cls(**{key: _tuples(value) for key, value in table.items()}, regions=regions)
        except TypeError as error:
            raise UserError(f"{path}: not written by this version of medssm train ({error})") from error

    def mirrored_classes(self) -> list[int]:
        """For each class the one that it becomes when left and right are mirrored."""
        found = list(range(len(self.classes)))
        for left, right in self.sides:
            found[left], found[right] = right, left
        return found

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the network's output channels."""
        return tuple(self.regions.values or self.classes)

    @property
    def structures(self) -> dict[str, tuple[int, ...]]:
        """{name: positions of its classes} of all that is scored: regions, or classes without the background."""
        positions = {value: i for i, value in enumerate(self.classes.values())}
        return {name: tuple(positions[value] for value in values) for name, values in structures(self.classes, self.regions).items()}

    @property
    def to_process(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """For each structure the positions of its classes, and the one that is written for it: what `postprocess` takes."""
        values = list(self.classes.values())
        written = map(values.index, self.regions.written) if self.regions else (positions[0] for positions in self.structures.values())
        return {name: (positions, position) for (name, positions), position in zip(self.structures.items(), written, strict=True)}

    @property
    def position_type(self) -> torch.dtype:
        """The smallest type that holds the position of each class."""
        return torch.uint8 if len(self.classes) <= 256 else torch.int16

    @property
    def patch_spacing(self) -> tuple[float, ...]:
        """Millimetres along the patch's axes."""
        return tuple(edge for axis, edge in enumerate(self.spacing) if axis != self.slice_axis)

    @property
    def volume_patch(self) -> tuple[int, ...]:
        """The patch in the volume: (x, y, z), one slice thick for a 2D network."""
        return self.patch if self.slice_axis is None else (*self.patch[: self.slice_axis], 1, *self.patch[self.slice_axis :])


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def geometry(spacing: Sequence[float], mode: str = "bilinear") -> Compose:
    """MONAI's Orientation and Spacing: a MetaTensor (c, x, y, z) to RAS and `spacing`. Its `inverse` gives back the same axes and shape."""
    return Compose(
        [Orientation("RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))), Spacing(tuple(spacing), mode=mode, padding_mode="border", dtype=np.float32)]
    )


def load_image(case: Case, channels: int, spacing: Sequence[float], nan: float | None = None) -> MetaTensor:
    """A case's channels (c, x, y, z) in RAS at `spacing`, not yet scaled. Raises UserError for what `read_image` refuses."""
    data, file = read_image(case.images, channels, nan)
    return geometry(spacing)(MetaTensor(torch.from_numpy(data), affine=torch.from_numpy(file.affine)))


def load_label(case: Case, dataset: Dataset, spacing: Sequence[float]) -> torch.Tensor:
    """A case's label map (x, y, z) in RAS at `spacing`, as int16 positions in `dataset.classes`, IGNORE where there is no label.

    Raises UserError if it cannot be read, holds a value that is no class, or lies on another grid than the image.
    """
    values, file = read_label(case.label_file, open_image(case.images[0]))
    found, inverse = np.unique(values, return_inverse=True)
    check_values(case, found, dataset.classes, dataset.ignore)
    position = {value: i for i, value in enumerate(dataset.classes.values())} | ({} if dataset.ignore is None else {dataset.ignore: IGNORE})
    positions = np.array([position[value] for value in found.tolist()], np.float32)[inverse].reshape(1, *values.shape)
    moved = geometry(spacing, mode="nearest")(MetaTensor(torch.from_numpy(positions), affine=torch.from_numpy(file.affine)))
    return moved.as_tensor()[0].round().to(torch.int16)


def pad(volume: torch.Tensor, shape: Sequence[int], value: int | None = None) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """A volume (c, *spatial) padded on both sides to at least `shape`, and where the old volume lies in it.

    The margin gets `value`, or by default each channel's own minimum (in an image this is air). A volume that is large enough is returned itself.
    """
    before = [max(0, wanted - size) // 2 for wanted, size in zip(shape, volume.shape[1:], strict=True)]
    inside = tuple(slice(start, start + size) for start, size in zip(before, volume.shape[1:], strict=True))
    full = tuple(max(wanted, size) for wanted, size in zip(shape, volume.shape[1:], strict=True))
    if full == tuple(volume.shape[1:]):
        return volume, inside
    margin = volume.flatten(1).amin(1) if value is None else volume.new_full((len(volume),), value)
    grown = margin.reshape(-1, *[1] * len(full)).repeat(1, *full)
    grown[(slice(None), *inside)] = volume
    return grown, inside
