"""Class probabilities of a whole volume: MONAI's windows with gaussian weights, in 3D or slice by slice, summed in memory or in a file."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from torch import Tensor, nn

from medssm.scratch import Scratch, Store
from medssm.segment.intensity import Scaling, scaling_of_parts
from medssm.segment.losses import finest_first
from medssm.segment.networks import memory_format
from medssm.segment.preprocess import Fitted

OVERLAP = 0.5  # of neighbouring windows
_COUNTS, _TRIES, _VOXELS = (1, 2, 4), 2, 2**20  # of windows at a time that are tried, how often, and the most voxels that they may have
_ON_DEVICE = 2 * 2**30  # up to so many bytes of probabilities are summed on the device, more in main memory


@torch.inference_mode()
def probabilities(network: nn.Module, image: Tensor, fitted: Fitted, *, device: torch.device, **options: Any) -> Tensor:
    """Probabilities (outputs, x, y, z) of an image (c, x, y, z) in memory; arguments as `stored_probabilities`."""
    with Scratch(math.inf, Path(), "") as scratch:
        found = stored_probabilities(network, Store.of(image.movedim(1, 0)), fitted, scratch, device=device, **options)
        return found[:, : len(fitted.outputs)].movedim(1, 0).cpu()


@torch.inference_mode()
def stored_probabilities(
    network: nn.Module,
    image: Store,
    fitted: Fitted,
    scratch: Scratch,
    *,
    device: torch.device,
    half: torch.dtype | None = None,
    overlap: float = OVERLAP,
    mirror: bool | tuple[int, ...] = False,
    batch: int | Pace = 1,
    show: Callable[[float], None] = lambda fraction: None,
) -> Store:
    """Probabilities of an image, (x, outputs + 1, y, z) with the sum of the windows' weights last; the softmax, of regions the sigmoid, is taken in
    every window.

    Args:
        network: gives logits (b, classes, *patch), or a list of them with the finest first
        image: (x, c, y, z) in RAS at the network's spacing, not yet scaled
        fitted: what was fitted to the training cases
        scratch: room for the result
        device: where the network is
        half: the type that the network runs in under autocast; None is float32
        overlap: of neighbouring windows, 0 to less than 1
        mirror: average over all mirrorings of the axes that training mirrored; axes are that one mirroring alone
        batch: windows at a time, or what finds out how many
        show: is called with the part of the windows that is done, 0 to 1
    """
    outputs, windows = len(fitted.outputs), Windows(image, fitted, overlap)
    x, _, y, z = image.shape
    small = 4 * (outputs + 1) * x * y * z <= _ON_DEVICE
    sums = scratch.store(x, outputs + 1, y, z, device=device if small else None)
    predict = _predictor(network, fitted, mirror)
    weights = importance(fitted, device)[None, None]
    pace, done = batch if isinstance(batch, Pace) else Pace(batch), 0
    while done < len(windows.places):
        chosen = windows.places[done : done + pace.count(fitted.patch)]
        parts = torch.stack([windows.cut(place) for place in chosen]).to(device)
        with pace.timed(len(chosen), device), torch.autocast(device.type, dtype=half, enabled=half is not None):
            found = predict(parts)
        found *= weights
        for place, part in zip(chosen, found, strict=True):
            kept, (first, *others) = windows.over(place)
            for values, channels in ((part, slice(outputs)), (weights[0], slice(outputs, outputs + 1))):
                values = values if fitted.slice_axis is None else values.unsqueeze(1 + fitted.slice_axis)
                sums.add((first, channels, *others), values[(slice(None), *kept)].movedim(0, 1))
        done += len(chosen)
        show(done / len(windows.places))
    for rows in sums.slabs():
        part = sums[rows]
        part[:, :-1] /= part[:, -1:]
        sums[rows] = part
    return sums


class Pace:
    """How many windows a network takes at a time: `given`, else 1, 2 or 4, whichever takes the least time a window on the first windows that it sees.

    Each is tried twice, since its first call also prepares kernels. Large windows go alone (more than _VOXELS in a call). `say` is told the choice.
    """

    def __init__(self, given: int | None = None, say: Callable[[str], None] = lambda line: None) -> None:
        self.chosen, self.say = given, say
        self.seconds: dict[int, list[float]] = {count: [] for count in _COUNTS}

    def count(self, patch: Sequence[int]) -> int:
        """Windows (*patch) in the next call."""
        if self.chosen is not None:
            return self.chosen
        fit = [count for count in _COUNTS if count * math.prod(patch) <= _VOXELS] or [1]
        untried = [count for count in fit if len(self.seconds[count]) < _TRIES]
        if len(fit) == 1 or torch.are_deterministic_algorithms_enabled():  # rounding may depend on the number
            return 1
        if untried:
            return untried[0]
        each = {count: min(self.seconds[count]) for count in fit}
        self.chosen = min(each, key=each.__getitem__)
        self.say(f"windows at a time: {self.chosen} ({', '.join(f'{count}: {least:.3g}' for count, least in each.items())} s a window)")
        return self.chosen

    @contextmanager
    def timed(self, count: int, device: torch.device) -> Iterator[None]:
        """Around a call of so many windows."""
        begun = time.perf_counter()
        yield
        if self.chosen is None and count in self.seconds:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self.seconds[count].append((time.perf_counter() - begun) / count)


class Windows:
    """The windows through which a network sees an image.

    Args:
        image: (x, c, y, z) in RAS at the network's spacing, not yet scaled
        fitted: what was fitted to the training cases
        overlap: of neighbouring windows, 0 to less than 1

    places: each window's slices (x, y, z) of the image, padded on both sides to at least one window
    """

    def __init__(self, image: Store, fitted: Fitted, overlap: float) -> None:
        self.image, self.scale, self.slice_axis, patch = image, stored_scaling(image, fitted), fitted.slice_axis, fitted.volume_patch
        x, _, y, z = image.shape
        padded = [max(size, wanted) for size, wanted in zip((x, y, z), patch, strict=True)]
        self.inside = [slice((n - size) // 2, (n - size) // 2 + size) for n, size in zip(padded, (x, y, z), strict=True)]
        self.margin = None if padded == [x, y, z] else torch.stack([image[rows].amin((0, 2, 3)) for rows in image.slabs()]).amin(0)
        self.places = dense_patch_slices(padded, patch, [max(1, int(wanted * (1 - overlap))) for wanted in patch])

    def cut(self, place: Sequence[slice]) -> Tensor:
        """What the network sees at a place, (c, *patch), scaled: around the image lies each channel's smallest value."""
        part = self.scale(self._cut(place))
        return part if self.slice_axis is None else part.squeeze(1 + self.slice_axis)

    def over(self, place: Sequence[slice]) -> tuple[list[slice], list[slice]]:
        """The part of a window that lies over the image: as slices of the window, and of the image."""
        both = [(max(w.start, i.start), min(w.stop, i.stop)) for w, i in zip(place, self.inside, strict=True)]
        return [slice(a - w.start, b - w.start) for (a, b), w in zip(both, place, strict=True)], [
            slice(a - i.start, b - i.start) for (a, b), i in zip(both, self.inside, strict=True)
        ]

    def _cut(self, place: Sequence[slice]) -> Tensor:
        kept, (first, *others) = self.over(place)
        part = self.image[(first, slice(None), *others)].movedim(1, 0)
        if self.margin is None:
            return part
        grown = self.margin.reshape(-1, 1, 1, 1).repeat(1, *(w.stop - w.start for w in place))
        grown[(slice(None), *kept)] = part
        return grown


def importance(fitted: Fitted, device: torch.device) -> Tensor:
    """The weight (*patch) of each voxel of a window where windows overlap: a gaussian around its middle."""
    return compute_importance_map(fitted.patch, "gaussian", device=device)


def _predictor(network: nn.Module, fitted: Fitted, mirror: bool | tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    kept = [axis for axis in range(3) if axis != fitted.slice_axis]
    mirrored = mirrorings(fitted, mirror)

    def predict(windows: Tensor) -> Tensor:
        total = torch.zeros(())
        for axes, order in mirrored:
            flip = [kept.index(axis) + 2 for axis in axes]
            x = windows.as_subclass(Tensor).flip(flip).contiguous(memory_format=memory_format(windows.ndim - 2))
            total = total + activated(finest_first(network(x), windows.ndim)[0].float(), fitted, 1).flip(flip)[:, order]
        return total / len(mirrored)

    return predict


def activated(logits: Tensor, fitted: Fitted, axis: int) -> Tensor:
    """Probabilities of logits with the outputs along `axis`."""
    return logits.sigmoid() if fitted.regions else logits.softmax(axis)


def mirrorings(fitted: Fitted, mirror: bool | tuple[int, ...]) -> list[tuple[tuple[int, ...], list[int] | slice]]:
    """The axes (0 to 2) of each mirroring that is averaged over, and what it makes of the outputs: sides change places.

    mirror: True is all mirrorings of the axes that training mirrored, the first of none; False is none; axes are the one of them
    """
    axes = [axis for axis in fitted.mirror if axis != fitted.slice_axis] if mirror else []
    every = [some for count in range(len(axes) + 1) for some in combinations(axes, count)]
    chosen = [mirror] if isinstance(mirror, tuple) else every
    return [(some, fitted.mirrored_classes() if 0 in some and fitted.sides else slice(None)) for some in chosen]


def stored_scaling(image: Store, fitted: Fitted) -> Scaling:
    """How an image (x, c, y, z) is scaled."""
    x, _, y, z = image.shape
    return scaling_of_parts(lambda c: (image[rows, c : c + 1].flatten() for rows in image.slabs()), x * y * z, fitted.intensity)
