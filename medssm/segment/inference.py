"""Class probabilities of a whole volume: MONAI's windows with gaussian weights, in 3D or slice by slice, summed in memory or in a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
    batch: int = 1,
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
        batch: windows at a time
        show: is called with the part of the windows that is done, 0 to 1
    """
    scale, patch, outputs = stored_scaling(image, fitted), fitted.volume_patch, len(fitted.outputs)
    x, _, y, z = image.shape
    padded = [max(size, wanted) for size, wanted in zip((x, y, z), patch, strict=True)]
    inside = [slice((n - size) // 2, (n - size) // 2 + size) for n, size in zip(padded, (x, y, z), strict=True)]
    margin = None if padded == [x, y, z] else torch.stack([image[rows].amin((0, 2, 3)) for rows in image.slabs()]).amin(0)
    small = 4 * (outputs + 1) * x * y * z <= _ON_DEVICE
    sums = scratch.store(x, outputs + 1, y, z, device=device if small else None)
    predict = _predictor(network, fitted, mirror)
    weights = compute_importance_map(fitted.patch, "gaussian", device=device)[None, None]
    windows = dense_patch_slices(padded, patch, [max(1, int(wanted * (1 - overlap))) for wanted in patch])
    calls = math.ceil(len(windows) / batch)
    for call in range(calls):
        chosen = windows[call * batch : (call + 1) * batch]
        parts = torch.stack([_without(scale(_cut(image, window, inside, margin)), fitted.slice_axis) for window in chosen]).to(device)
        with torch.autocast(device.type, dtype=half, enabled=half is not None):
            found = predict(parts)
        found *= weights
        for window, part in zip(chosen, found, strict=True):
            kept, (first, *others) = _over(window, inside)
            for values, channels in ((part, slice(outputs)), (weights[0], slice(outputs, outputs + 1))):
                values = values if fitted.slice_axis is None else values.unsqueeze(1 + fitted.slice_axis)
                sums.add((first, channels, *others), values[(slice(None), *kept)].movedim(0, 1))
        show((call + 1) / calls)
    for rows in sums.slabs():
        part = sums[rows]
        part[:, :-1] /= part[:, -1:]
        sums[rows] = part
    return sums


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


def _over(window: Sequence[slice], inside: Sequence[slice]) -> tuple[list[slice], list[slice]]:
    """The part of a window that lies over `inside`: as slices of the window, and of what lies inside."""
    both = [(max(w.start, i.start), min(w.stop, i.stop)) for w, i in zip(window, inside, strict=True)]
    return [slice(a - w.start, b - w.start) for (a, b), w in zip(both, window, strict=True)], [
        slice(a - i.start, b - i.start) for (a, b), i in zip(both, inside, strict=True)
    ]


def _cut(image: Store, window: Sequence[slice], inside: Sequence[slice], margin: Tensor | None) -> Tensor:
    """The window (c, x, y, z) of an image that lies at `inside`, with the margin's values (c,) around it."""
    kept, (first, *others) = _over(window, inside)
    part = image[(first, slice(None), *others)].movedim(1, 0)
    if margin is None:
        return part
    grown = margin.reshape(-1, 1, 1, 1).repeat(1, *(w.stop - w.start for w in window))
    grown[(slice(None), *kept)] = part
    return grown


def stored_scaling(image: Store, fitted: Fitted) -> Scaling:
    """How an image (x, c, y, z) is scaled."""
    x, _, y, z = image.shape
    return scaling_of_parts(lambda c: (image[rows, c : c + 1].flatten() for rows in image.slabs()), x * y * z, fitted.intensity)


def _without(part: Tensor, axis: int | None) -> Tensor:
    """(c, x, y, z) without the axis across a 2D network's slices."""
    return part if axis is None else part.squeeze(1 + axis)
