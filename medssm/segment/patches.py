"""Random patches of the training volumes.

Patch i depends only on the seed and on i. So a training that was stopped and resumed gives the same result as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandAffined,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandSimulateLowResolutiond,
)
from torch.utils.data import Dataset

from medssm.segment.preprocess import Fitted
from medssm.segment.volumes import Volume

_TURNED = 0.15  # the share of patches that are rotated and zoomed
_DEGREES = 15
_ZOOM = (-0.15, 0.2)
# How many times wider than a patch is the part of the volume that a rotated and zoomed patch needs.
_REACH = (1 + _ZOOM[1]) * (math.cos(math.radians(_DEGREES)) + math.sin(math.radians(_DEGREES)))


class Patches(Dataset[dict[str, Any]]):
    """patches[i] = {"image": (c, *patch) float32, "label": (1, *patch) int64, "case": name}.

    Each axis of `fitted.mirror` is mirrored on half of the patches; with left and right the classes of `fitted.sides` change places.

    Args:
        volumes: the training cases
        fitted: patch, spacing and mirrored axes
        seed: of all that is drawn
        foreground: the share of patches centred on a voxel of a class, which is drawn evenly among the classes of the case
        augment: rotation, zoom, noise, blur, brightness, contrast and low resolution, each on 10 to 15 percent of the patches
    """

    def __init__(self, volumes: Sequence[Volume], fitted: Fitted, *, seed: int = 0, foreground: float = 1 / 3, augment: bool = True):
        self.volumes, self.fitted, self.seed = volumes, fitted, seed
        self.foreground, self.augment = foreground, augment
        self.intensity = _intensity_augmentation(len(fitted.patch))
        self.turn = RandAffined(
            ("image", "label"),
            prob=1.0,
            spatial_size=fitted.patch,
            rotate_range=_rotations(fitted),
            scale_range=[_ZOOM] * len(fitted.patch),
            mode=("bilinear", "nearest"),
            padding_mode="border",
            cache_grid=True,
        )

    def __getitem__(self, index: int) -> dict[str, Any]:
        random = np.random.default_rng((self.seed, index))
        volume = self.volumes[int(random.integers(len(self.volumes)))]
        turned = self.augment and random.random() < _TURNED
        sample: Any = self._crop(volume, self._centre(volume, random), _REACH if turned else 1.0)
        if turned:
            sample = self.turn.set_random_state(int(random.integers(2**31)))(sample)
        if self.augment:
            sample = self.intensity.set_random_state(int(random.integers(2**31)))(sample)
        flipped = [axis for axis in self._mirrored_axes() if random.random() < 0.5]
        image, label = (torch.as_tensor(sample[key]).as_subclass(torch.Tensor).flip([a + 1 for a, _ in flipped]) for key in ("image", "label"))
        label = label.round().long()
        if self.fitted.sides and any(axis == 0 for _, axis in flipped):
            label = torch.where(label < 0, label, torch.tensor(self.fitted.mirrored_classes())[label.clamp(min=0)])
        return {"image": image.float(), "label": label, "case": volume.name}

    def _centre(self, volume: Volume, random: np.random.Generator) -> np.ndarray:
        """The voxel in the middle of a patch, before the patch is moved inside the volume."""
        shape = volume.label.shape
        if volume.classes and random.random() < self.foreground:
            voxels = volume.classes[int(random.integers(len(volume.classes)))]
        elif volume.labelled is not None and len(volume.labelled):
            voxels = volume.labelled
        else:  # even over all positions of the patch: even over voxels would draw the border more often
            patch = self.fitted.volume_patch
            return np.array([random.integers(size - wanted + 1) + wanted // 2 for size, wanted in zip(shape, patch, strict=True)])
        return np.array(np.unravel_index(voxels[random.integers(len(voxels))], shape))

    def _crop(self, volume: Volume, centre: np.ndarray, reach: float) -> dict[str, torch.Tensor]:
        """The patch around `centre`, moved inside the volume; a patch that will be rotated is `reach` times as wide."""
        where = []
        for axis, (size, wanted) in enumerate(zip(volume.label.shape, self.fitted.volume_patch, strict=True)):
            wide = 1 if axis == self.fitted.slice_axis else min(size, math.ceil(wanted * reach))
            start = min(max(int(centre[axis]) - wide // 2, 0), size - wide)
            where.append(slice(start, start + wide))
        image, label = volume.scaling(volume.image[(slice(None), *where)]), volume.label[tuple(where)][None]
        if self.fitted.slice_axis is not None:
            image, label = (part.squeeze(self.fitted.slice_axis + 1) for part in (image, label))
        return {"image": image, "label": label.float()}  # float: it is resampled together with the image

    def _mirrored_axes(self) -> list[tuple[int, int]]:
        """(axis of the patch, axis of the volume) of each to mirror. A 2D patch has no slice axis, so the axes after it count one less."""
        kept = [axis for axis in range(3) if axis != self.fitted.slice_axis]
        return [(kept.index(axis), axis) for axis in self.fitted.mirror if axis in kept]


def _rotations(fitted: Fitted) -> list[float]:
    """Radians around each axis (one number in 2D); 0 around an axis in whose plane voxels are far from square."""
    angle = math.radians(_DEGREES)
    if fitted.slice_axis is not None:
        return [angle]
    planes = (fitted.spacing[1:], fitted.spacing[::2], fitted.spacing[:2])
    return [angle if max(plane) <= 1.5 * min(plane) else 0.0 for plane in planes]


def _intensity_augmentation(spatial_dims: int) -> Compose:
    blur: dict[str, Any] = {f"sigma_{axis}": (0.5, 1.0) for axis in "xyz"[:spatial_dims]}
    linear = "bilinear" if spatial_dims == 2 else "trilinear"
    return Compose(
        [
            RandGaussianNoised("image", prob=0.1, std=0.1),
            RandGaussianSmoothd("image", prob=0.1, **blur),
            RandScaleIntensityd("image", prob=0.15, factors=0.25),
            RandSimulateLowResolutiond("image", prob=0.1, zoom_range=(0.5, 1.0), upsample_mode=linear),
            RandAdjustContrastd("image", prob=0.15, gamma=(0.7, 1.5), retain_stats=True),
        ]
    )
