"""The training samples: images drawn in shuffled passes, augmented, and mixed (mixup).

Sample i depends only on the seed and on i. So a training that was stopped and resumed gives the same result as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose, RandAdjustContrast, RandAffine, RandGaussianNoise, RandGaussianSmooth, RandScaleIntensity, RandShiftIntensity
from torch import Tensor
from torch.utils.data import Dataset

from medssm.classify.images import Images

_MOVED, _ZOOM = 0.08, (-0.15, 0.2)  # of the shape


class Samples(Dataset[dict[str, Any]]):
    """samples[i] = {"image": (c, *shape), "label": (classes,) the share of each class, "case": name}.

    Each pass over the images has its own order. With mixup > 0 a sample is m a + (1 - m) b of two images and of their labels, m drawn from
    Beta(mixup, mixup) (Zhang et al., arXiv 1710.09412).

    Args:
        images: the training images
        labels: the class of each, by position
        seed: of all that is drawn
        augment: turn, zoom and move half of the images; noise, blur, brightness and contrast, each on 10 to 20 percent
        rotate: degrees that an image is turned by, at most
        mixup: 0 for none
    """

    def __init__(self, images: Images, labels: Sequence[int], *, seed: int = 0, augment: bool = True, rotate: float = 15.0, mixup: float = 0.0):
        self.images, self.labels, self.seed, self.mixup = images, labels, seed, mixup
        fitted = images.fitted
        self.classes = len(fitted.classes)
        self.flipped = [1 + fitted.axes.index(axis) for axis in fitted.mirror]
        self.augmentation = _augmentation(fitted.shape, rotate) if augment else None

    def __getitem__(self, index: int) -> dict[str, Any]:
        random = np.random.default_rng((self.seed, index))
        turn, place = divmod(index, len(self.labels))
        chosen = int(np.random.default_rng((self.seed, turn, 1)).permutation(len(self.labels))[place])
        image, label = self._one(chosen, random)
        if self.mixup:
            share = float(random.beta(self.mixup, self.mixup))
            other, its_label = self._one(int(random.integers(len(self.labels))), random)
            image, label = share * image + (1 - share) * other, share * label + (1 - share) * its_label
        return {"image": image, "label": label, "case": self.images.samples[chosen].name}

    def _one(self, index: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """An image, augmented, and its label, all in one class."""
        image = self.images[index]
        if self.augmentation:
            image = self.augmentation.set_random_state(int(random.integers(2**31)))(image)
            image = torch.as_tensor(image).as_subclass(Tensor)
        image = image.flip([axis for axis in self.flipped if random.random() < 0.5])
        label = torch.zeros(self.classes)
        label[self.labels[index]] = 1.0
        return image.float(), label


def _augmentation(shape: Sequence[int], rotate: float) -> Compose:
    angle = math.radians(rotate)
    blur: dict[str, Any] = {f"sigma_{axis}": (0.5, 1.0) for axis in "xyz"[: len(shape)]}
    return Compose(
        [
            RandAffine(
                prob=0.5,
                rotate_range=[angle] * (1 if len(shape) == 2 else 3),
                scale_range=[_ZOOM] * len(shape),
                translate_range=[_MOVED * size for size in shape],
                spatial_size=tuple(shape),
                mode="bilinear",
                padding_mode="border",
                cache_grid=True,
            ),
            RandGaussianNoise(prob=0.1, std=0.1),
            RandGaussianSmooth(prob=0.1, **blur),
            RandScaleIntensity(prob=0.2, factors=0.25),
            RandShiftIntensity(prob=0.2, offsets=0.25),
            RandAdjustContrast(prob=0.1, gamma=(0.7, 1.5), retain_stats=True),
        ]
    )
