"""How the intensities of an image are scaled: the scheme of each channel, what is fitted to the training cases, and the scaling of one image.

  ct      clipped to the 0.5 and 99.5 percentile of the training cases' foreground; minus its mean, divided by its standard deviation;
  none    unchanged;
  picture minus the mean of all training images' pixels, divided by their standard deviation: colours keep their meaning (classifiers);
  zscore  minus the image's own mean, divided by its own standard deviation, both without padding and zeros (removed skulls are zero).

The scheme follows from the channel's name, or from the modality that the user names.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from medssm.errors import UserError

MODALITIES = {"ct": "ct", "mri": "zscore", "other": "zscore", "none": "none", "picture": "picture"}
SCHEMES = {
    "ct": "as CT, by the foreground of all cases",
    "zscore": "by its own mean and deviation",
    "none": "unchanged",
    "picture": "by the mean and deviation of all training images",
}
_CT = {"ct", "cta", "ctp", "cect", "ncct", "hrct", "ldct", "cbct", "hu", "houndsfield", "hounsfield"}
_OTHER = {"mr", "mri", "t1", "t1w", "t1c", "t1ce", "t1gd", "t2", "t2w", "t2s", "flair", "adc", "dwi", "swi", "pd", "pdw", "cine", "pet", "suv", "us"}
_OTHER |= {"ultrasound", "xray", "oct", "rgb", "red", "green", "blue", "histology", "microscopy", "fluorescence"}
_SAMPLES = 20_000
_PART = 2**22  # voxels that are looked at together
_LOOKED_AT = 2**20  # voxels of an image that quantiles are taken from


def scheme_of(name: str) -> str | None:
    """The scheme that a channel's name tells; None where it tells none.

    >>> scheme_of("CTA"), scheme_of("T1w"), scheme_of("noNorm"), scheme_of("channel_0")
    ('ct', 'zscore', 'none', None)
    """
    words = set(re.findall(r"[a-z]+\d?[a-z]*", name.lower()))
    if name.lower() == "nonorm":
        return "none"
    ct = bool(words & _CT) or {"computed", "tomography"} <= words
    other = bool(words & _OTHER)
    return None if ct == other else "ct" if ct else "zscore"


def schemes(channels: Sequence[str], modality: Sequence[str] | None) -> list[str | None]:
    """Each channel's scheme, by the modalities that the user names (one for all channels, or one for each), else by its name.

    Raises UserError for another number of modalities, or an unknown one.
    """
    if modality is None:
        return [scheme_of(name) for name in channels]
    if len(modality) not in (1, len(channels)) or not set(modality) <= MODALITIES.keys():
        raise UserError(f"modality: expected {', '.join(MODALITIES)}: one, or one for each of {len(channels)} channel(s), got {', '.join(modality)}")
    return [MODALITIES[one] for one in (modality if len(modality) > 1 else [*modality] * len(channels))]


class Intensities:
    """Looks at the training cases one by one; `fit` then says how each channel is scaled.

    Args:
        channels: their names
        modality: see `schemes`
        seed: of the voxels that are drawn
        samples: foreground voxels of each case that the percentiles are taken from
    """

    def __init__(self, channels: Sequence[str], modality: Sequence[str] | None, seed: int, samples: int = _SAMPLES):
        self.count = samples
        self.channels, self.schemes, self.random = channels, schemes(channels, modality), np.random.default_rng(seed)
        self.samples: list[np.ndarray] = []

    def add(self, name: str, image: torch.Tensor, label: torch.Tensor) -> None:
        """Look at an image (c, x, y, z) that is not yet scaled, with its label (x, y, z).

        Raises UserError where a channel without a scheme looks like CT, or where all voxels of the image are equal.
        """
        for fault in faults(name, image, self.channels, self.schemes):
            raise UserError(fault)
        if not {"ct", "picture"} & {*self.schemes}:
            return
        foreground = np.flatnonzero((label > 0).numpy())
        if len(foreground):
            chosen = self.random.choice(foreground, self.count, replace=len(foreground) < self.count)
            self.samples.append(image.flatten(1)[:, chosen].numpy())

    def fit(self) -> tuple[dict[str, Any], ...]:
        """`Fitted.intensity` for the channels. Raises UserError if a CT had no foreground."""
        return tuple(self._fit(i, scheme or "zscore") for i, scheme in enumerate(self.schemes))

    def _fit(self, channel: int, scheme: str) -> dict[str, Any]:
        if scheme not in ("ct", "picture"):
            return {"scheme": scheme}
        if not self.samples:
            raise UserError("labels: a CT is scaled by its foreground, and no training case has any")
        values = np.concatenate([sample[channel] for sample in self.samples]).astype(np.float64)
        low, high = np.percentile(values, (0.5, 99.5) if scheme == "ct" else (0, 100))
        mean, deviation = float(values.mean()), float(values.std()) or 1.0
        return {"scheme": scheme, "low": float(low), "high": float(high), "mean": mean, "deviation": deviation}


def faults(name: str, image: torch.Tensor, channels: Sequence[str], how: Sequence[str | None]) -> list[str]:
    """Why an image (c, x, y, z) cannot be trained on as it is: all voxels are equal, or a channel without a scheme in `how` looks like CT."""
    if all(channel.amin() == channel.amax() for channel in image):
        return [f"{name}: every voxel of the image is {image.flatten()[0].item():g}"]
    return [
        f"{name}: the channel {channel!r} has values as of CT in Hounsfield units, and its name does not say what it is: "
        "pass --modality ct, or --modality other to scale each image by its own values"
        for channel, scheme, values in zip(channels, how, image, strict=True)
        if scheme is None and looks_like_ct(values)
    ]


def looks_like_ct(values: torch.Tensor) -> bool:
    """Whether values are as in Hounsfield units: air near -1000 or much fat and lung below -100, tissue above 100. Padding below -1100 is no air."""
    some, bound = _some(values), padding_below(values)
    some = some if bound is None else some[(some >= bound) | (some >= -1100)]
    air = ((some > -1100) & (some < -900)).float().mean().item()
    low = (some < -100).float().mean().item()
    return (air >= 0.01 or low >= 0.05) and (some > 100).float().mean().item() >= 0.001


def padding_below(values: torch.Tensor) -> float | None:
    """Below which value voxels are padding, as -3024 beside a scan of -1000 and more; None where there is none.

    Padding is one value, the smallest, in one voxel of 200 at least, far from all others: below their first percentile by more than half of the
    distance to their last.
    """
    some = _some(values)
    smallest = some.min()
    rest = some[(some != smallest) & (some != 0)]
    if len(rest) < 2 or (some == smallest).float().mean() < 0.005:
        return None
    first, last = torch.quantile(rest.float(), torch.tensor([0.01, 0.99], device=rest.device)).tolist()
    bound: float = first - 0.5 * (last - first)
    return bound if smallest.item() < min(bound, 0.0) else None


@dataclass(frozen=True)
class Scaling:
    """x -> (clip(x, low, high) - mean) / deviation, each (channels,). Computed for a whole image, applied to it or to any part of it."""

    low: torch.Tensor
    high: torch.Tensor
    mean: torch.Tensor
    deviation: torch.Tensor

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        low, high, mean, deviation = (value.reshape(-1, *[1] * (image.ndim - 1)) for value in dataclasses.astuple(self))
        return image.clamp(low, high).sub_(mean).div_(deviation)


def scaling(image: torch.Tensor, intensity: Sequence[Mapping[str, Any]]) -> Scaling:
    """How the channels of one image (c, x, y, z) are scaled; `intensity` is that of `Fitted`. Padding becomes as dark as the darkest tissue."""
    channels = [channel.as_subclass(torch.Tensor).flatten() for channel in image]
    return scaling_of_parts(lambda c: channels[c].split(_PART), channels[0].numel(), intensity)


def scaling_of_parts(parts: Callable[[int], Iterable[torch.Tensor]], length: int, intensity: Sequence[Mapping[str, Any]]) -> Scaling:
    """`scaling` of an image that is not in memory as a whole: parts(c) gives the values of a channel piece after piece, `length` in all."""
    rows = []
    for c, how in enumerate(intensity):
        if how["scheme"] in ("ct", "picture"):
            rows.append((how["low"], how["high"], how["mean"], how["deviation"]))
        elif how["scheme"] == "none":
            rows.append((-math.inf, math.inf, 0.0, 1.0))
        else:
            bound = padding_below(_some_of_parts(parts(c), length))
            smallest, mean, deviation = _moments(functools.partial(parts, c), -math.inf if bound is None else bound)
            rows.append((-math.inf if bound is None else smallest, math.inf, mean, deviation or 1.0))
    return Scaling(*torch.tensor(rows, dtype=torch.float32).T)


def _moments(parts: Callable[[], Iterable[torch.Tensor]], bound: float) -> tuple[float, float, float]:
    """The smallest value, the mean and the standard deviation of all values that are at least `bound` and not zero; 0 and 1 where there are none."""

    def inside() -> Iterator[torch.Tensor]:
        return (part[(part != 0) & (part >= bound)].double() for part in parts())

    sums = [(len(part), part.sum().item(), part.min().item()) for part in inside() if len(part)]
    if not sums:
        return bound, 0.0, 1.0
    count = sum(number for number, _, _ in sums)
    mean = sum(total for _, total, _ in sums) / count
    squares = sum((part - mean).square_().sum().item() for part in inside())
    return min(low for _, _, low in sums), mean, math.sqrt(squares / count)


def _some_of_parts(parts: Iterable[torch.Tensor], length: int) -> torch.Tensor:
    """`_some` of the values in pieces."""
    step, passed, found = max(1, -(-length // _LOOKED_AT)), 0, []
    for part in parts:
        found.append(part[-passed % step :: step])
        passed += len(part)
    return torch.cat(found)


def _some(values: torch.Tensor) -> torch.Tensor:
    """At most 2^20 values, spread evenly."""
    flat = values.as_subclass(torch.Tensor).flatten()
    return flat[:: max(1, -(-len(flat) // _LOOKED_AT))]
