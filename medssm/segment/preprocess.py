"""What a network sees of a file, and what of that was fitted to the data.

Every image is turned to RAS, resampled to one spacing and scaled by its modality:
  CT      clipped to the 0.5 and 99.5 percentile of the training cases' foreground, less its mean, over its deviation;
  noNorm  as it is;
  else    less the image's own mean, over its own deviation, both over its nonzero voxels (padding and stripped skulls are zero).
`fit` finds the numbers, `Fitted` keeps them beside the weights, and `predict` reads them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Orientation, Spacing

from medssm.errors import UserError
from medssm.files import read_json, write_json
from medssm.segment.data import Case, Dataset, check_values
from medssm.segment.nifti import different_grid, open_nifti, read_image, read_label

IGNORE = -1  # in a label map the network is trained on: no class, no loss


@dataclass(frozen=True)
class Fitted:
    """What was fitted to the training cases, or chosen from them; all axes are RAS.

    spacing      millimetres (0 keeps an axis as it is: the one across a 2D network's slices)
    intensity    for each channel {"scheme": "ct", "low", "high", "mean", "deviation"}, {"scheme": "zscore"} or {"scheme": "none"}
    classes      {name: value in the label files}, background first; a network's output channel is the position in this table
    patch        voxels, an entry for each of the network's axes
    slice_axis   the axis across a 2D network's slices, None in 3D
    mirror       the axes that training mirrored, and that mirroring in `predict` averages over
    """

    channels: tuple[str, ...]
    spacing: tuple[float, ...]
    intensity: tuple[dict, ...]
    classes: dict[str, int]
    ignore: int | None
    patch: tuple[int, ...]
    slice_axis: int | None = None
    mirror: tuple[int, ...] = ()

    def save(self, path: Path) -> None:
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> Fitted:
        table = read_json(path)
        try:
            return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in table.items()})
        except TypeError as error:
            raise UserError(f"{path}: not written by this version of medssm train ({error})") from error

    @property
    def volume_patch(self) -> tuple[int, ...]:
        """The patch in the volume: (x, y, z), one slice thick for a 2D network."""
        return self.patch if self.slice_axis is None else (*self.patch[: self.slice_axis], 1, *self.patch[self.slice_axis :])


def geometry(spacing: Sequence[float], mode: str = "bilinear") -> Compose:
    """MONAI's Orientation and Spacing: a MetaTensor (c, x, y, z) to RAS and `spacing`; its `inverse` goes back, exactly in the axes."""
    return Compose(
        [Orientation("RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))), Spacing(tuple(spacing), mode=mode, padding_mode="border", dtype=np.float32)]
    )


def load_image(case: Case, channels: int, spacing: Sequence[float]) -> MetaTensor:
    """A case's channels (c, x, y, z) in RAS at `spacing`, not yet scaled."""
    data, file = read_image(case.images, channels)
    return geometry(spacing)(MetaTensor(torch.from_numpy(data), affine=torch.from_numpy(file.affine)))


def load_label(case: Case, dataset: Dataset, spacing: Sequence[float]) -> torch.Tensor:
    """A case's label map (x, y, z) in RAS at `spacing`, as int16 positions in `dataset.classes`, IGNORE where it is ignored."""
    values, file = read_label(case.label)
    difference = different_grid(file, open_nifti(case.images[0]))
    if difference:
        raise UserError(f"{case.label}: not on the grid of {case.images[0]}: {difference}")
    found, inverse = np.unique(values, return_inverse=True)
    check_values(case, found, dataset.classes, dataset.ignore)
    position = {value: i for i, value in enumerate(dataset.classes.values())} | ({} if dataset.ignore is None else {dataset.ignore: IGNORE})
    positions = np.array([position[value] for value in found.tolist()], np.float32)[inverse].reshape(1, *values.shape)
    moved = geometry(spacing, mode="nearest")(MetaTensor(torch.from_numpy(positions), affine=torch.from_numpy(file.affine)))
    return moved.as_tensor()[0].round().to(torch.int16)


@dataclass(frozen=True)
class Scaling:
    """x -> (clip(x, low, high) - mean) / deviation, each (channels,); computed for an image, applied to it or to any part of it."""

    low: torch.Tensor
    high: torch.Tensor
    mean: torch.Tensor
    deviation: torch.Tensor

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        low, high, mean, deviation = (value.reshape(-1, *[1] * (image.ndim - 1)) for value in dataclasses.astuple(self))
        return image.clamp(low, high).sub_(mean).div_(deviation)


def scaling(image: torch.Tensor, intensity: Sequence[dict]) -> Scaling:
    """How the channels of one image (c, x, y, z) are scaled."""
    rows = []
    for channel, how in zip(image, intensity, strict=True):
        if how["scheme"] == "ct":
            rows.append((how["low"], how["high"], how["mean"], how["deviation"]))
        elif how["scheme"] == "none":
            rows.append((-math.inf, math.inf, 0.0, 1.0))
        else:
            inside = channel[channel != 0].double()
            mean, deviation = (inside.mean().item(), inside.std(correction=0).item()) if len(inside) else (0.0, 1.0)
            rows.append((-math.inf, math.inf, mean, deviation or 1.0))
    return Scaling(*torch.tensor(rows, dtype=torch.float32).T)


def pad(volume: torch.Tensor, shape: Sequence[int], value: int | None = None) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """(c, *spatial) grown at both sides to at least `shape`, and where the old volume lies in it.

    The margin gets `value`, or each channel's own minimum (in an image the air); a volume that is large enough comes back itself.
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
