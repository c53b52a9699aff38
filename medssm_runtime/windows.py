"""Probabilities of a whole volume: overlapping windows with gaussian weights, in 3D or slice by slice."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from medssm_runtime.intensity import scaling
from medssm_runtime.settings import Settings


def probabilities(image: np.ndarray, settings: Settings, run: Callable[[np.ndarray], np.ndarray], *, overlap: float, mirror: bool) -> np.ndarray:
    """Probabilities (outputs, x, y, z): the softmax, of regions the sigmoid, is taken in every window.

    Args:
        image: (c, x, y, z) in RAS at the network's spacing, not yet scaled
        settings: of the network
        run: the network
        overlap: of neighbouring windows, 0 to less than 1
        mirror: average over all mirrorings of the axes that training mirrored
    """
    size, patch = image.shape[1:], settings.volume_patch
    scale, margin = scaling(image, settings.channels), image.min((1, 2, 3)).reshape(-1, 1, 1, 1)
    before = [max(0, wanted - n) // 2 for wanted, n in zip(patch, size, strict=True)]  # a volume smaller than a window is padded on both sides
    weights = importance(settings.patch).reshape(patch)
    mirrorings = list(_mirrorings(settings, mirror))
    sums, total = np.zeros((settings.outputs, *size), np.float32), np.zeros(size, np.float32)
    for starts in places(size, patch, overlap):
        part = tuple(slice(max(0, start), min(start + wanted, n)) for start, wanted, n in zip(starts, patch, size, strict=True))
        window = image[(slice(None), *part)]
        kept = tuple(slice(b, b + n) for b, n in zip(before, window.shape[1:], strict=True))
        if window.shape[1:] != patch:
            window = np.broadcast_to(margin, (len(image), *patch)).copy()
            window[(slice(None), *kept)] = image[(slice(None), *part)]
        window = scale(window)
        found = sum(_seen(window, settings, run, axes, order) for axes, order in mirrorings) / np.float32(len(mirrorings))
        sums[(slice(None), *part)] += (found * weights)[(slice(None), *kept)]
        total[part] += weights[kept]
    sums /= total
    return sums


def places(size: Sequence[int], patch: Sequence[int], overlap: float) -> Iterator[tuple[int, ...]]:
    """Where the windows start, (x, y, z). The last one along an axis ends with the volume; a volume smaller than a window has one, at 0."""
    along = []
    for n, wanted in zip(size, patch, strict=True):
        step, last = max(1, int(wanted * (1 - overlap))), max(0, n - wanted)
        along.append([*range(0, last, step), last])
    return itertools.product(*along)


def importance(patch: Sequence[int]) -> np.ndarray:
    """The weight (*patch) of each voxel of a window where windows overlap: a gaussian around its middle, an eighth of the patch wide."""
    found = np.ones((), np.float32)
    for n in patch:
        x = np.arange(n, dtype=np.float32) - np.float32((n - 1) / 2)
        found = found[..., None] * np.exp(x**2 / np.float32(-2 * (n / 8) ** 2))
    return found.clip(max(found.min(), 1e-3)).astype(np.float32)


def _mirrorings(settings: Settings, mirror: bool) -> Iterator[tuple[tuple[int, ...], list[int] | slice]]:
    """The axes (0 to 2) of each mirroring, the first of none, and what it makes of the outputs: sides change places."""
    axes = [axis for axis in settings.axes if axis != settings.slice_axis] if mirror else []
    for count in range(len(axes) + 1):
        for some in itertools.combinations(axes, count):
            yield some, settings.mirrored_outputs if 0 in some and settings.sides else slice(None)


def _seen(
    window: np.ndarray, settings: Settings, run: Callable[[np.ndarray], np.ndarray], axes: tuple[int, ...], order: list[int] | slice
) -> np.ndarray:
    """Probabilities (outputs, *volume_patch) of a window that the network sees mirrored."""
    flipped = tuple(axis + 1 for axis in axes)
    seen = np.flip(window, flipped).reshape(1, len(window), *settings.patch)
    logits = run(np.ascontiguousarray(seen))[0].reshape(-1, *window.shape[1:])
    return np.flip(_activated(logits, bool(settings.regions)), flipped)[order]


def _activated(logits: np.ndarray, regions: bool) -> np.ndarray:
    if regions:
        return np.float32(1) / (1 + np.exp(-logits.clip(-80)))
    found = np.exp(logits - logits.max(0))
    found /= found.sum(0)
    return found
