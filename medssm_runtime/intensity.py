"""How the intensities of a scan are scaled, by the scheme of each channel; medssm.segment.intensity fitted the numbers.

ct, picture  clipped, minus the mean, divided by the deviation of the training cases;
none         unchanged;
zscore       minus the scan's own mean, divided by its own standard deviation, both without padding and zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_LOOKED_AT = 2**20  # voxels that quantiles are taken from


class Scaling(NamedTuple):
    """x -> (clip(x, low, high) - mean) / deviation, each (channels, 1, 1, 1) in float32: of a whole scan, for any part of it."""

    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray

    def __call__(self, part: np.ndarray) -> np.ndarray:
        found = part.clip(self.low, self.high)
        found -= self.mean
        found /= self.deviation
        return found


def scaling(image: np.ndarray, channels: Sequence[Mapping[str, Any]]) -> Scaling:
    """How the channels of a scan (c, x, y, z) are scaled."""
    rows = [_row(values, how) for values, how in zip(image, channels, strict=True)]
    return Scaling(*(column.reshape(-1, 1, 1, 1) for column in np.array(rows, np.float32).T))


def _row(values: np.ndarray, how: Mapping[str, Any]) -> tuple[float, float, float, float]:
    if how["scheme"] in ("ct", "picture"):
        return how["low"], how["high"], how["mean"], how["deviation"]
    if how["scheme"] == "none":
        return -np.inf, np.inf, 0.0, 1.0
    bound = _padding_below(values)
    inside = values[values != 0 if bound is None else (values != 0) & (values >= np.float32(bound))]
    if not inside.size:
        return -np.inf if bound is None else bound, np.inf, 0.0, 1.0
    mean, deviation = inside.mean(dtype=np.float64), inside.std(dtype=np.float64)
    return -np.inf if bound is None else inside.min(), np.inf, mean, deviation or 1.0


def _padding_below(values: np.ndarray) -> float | None:
    """Below which value voxels are padding, as -3024 beside a scan of -1000 and more; None where there is none.

    Padding is one value, the smallest, in one voxel of 200 at least, far from all others: below their first percentile by more than half of the
    distance to their last.
    """
    some = values.reshape(-1)[:: max(1, -(-values.size // _LOOKED_AT))]
    smallest = some.min()
    if smallest >= 0 or (some == smallest).mean() < 0.005:
        return None
    rest = some[(some != smallest) & (some != 0)]
    if len(rest) < 2:
        return None
    first, last = (float(value) for value in np.quantile(rest, (0.01, 0.99)))
    bound = first - 0.5 * (last - first)
    return bound if smallest < bound else None
