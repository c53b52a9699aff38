"""Class probabilities of a whole volume: MONAI's sliding window with gaussian weights, in 3D or slice by slice."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import torch
from monai.inferers import SliceInferer, SlidingWindowInferer
from torch import Tensor, nn

from medssm.segment.intensity import scaling
from medssm.segment.losses import finest_first
from medssm.segment.networks import memory_format
from medssm.segment.preprocess import Fitted, pad

_ON_DEVICE = 2 * 2**30  # up to so many bytes of probabilities are summed on the device, more in main memory


@torch.inference_mode()
def probabilities(
    network: nn.Module,
    image: Tensor,
    fitted: Fitted,
    *,
    device: torch.device,
    half: torch.dtype | None = None,
    overlap: float = 0.5,
    mirror: bool = False,
    batch: int = 1,
    show: Callable[[float], None] = lambda fraction: None,
) -> Tensor:
    """Probabilities (outputs, x, y, z) of an image; the softmax, of regions the sigmoid, is taken in every window.

    Args:
        network: gives logits (b, classes, *patch), or a list of them with the finest first
        image: (c, x, y, z) in RAS at the network's spacing, not yet scaled
        fitted: what was fitted to the training cases
        device: where the network is
        half: the type that the network runs in under autocast; None is float32
        overlap: of neighbouring windows, 0 to less than 1
        mirror: average over all mirrorings of the axes that training mirrored
        batch: windows at a time
        show: is called with the part of the windows that is done, 0 to 1
    """
    scaled, inside = pad(scaling(image, fitted.intensity)(image), fitted.volume_patch)
    small = scaled[0].numel() * 4 * len(fitted.outputs) <= _ON_DEVICE
    options: dict[str, Any] = {
        "roi_size": fitted.patch,
        "sw_batch_size": batch,
        "overlap": overlap,
        "mode": "gaussian",
        "sw_device": device,
        "device": device if small else torch.device("cpu"),
    }
    window = SlidingWindowInferer(**options) if fitted.slice_axis is None else SliceInferer(spatial_dim=fitted.slice_axis, **options)
    calls = math.ceil(_windows(scaled.shape[1:], fitted.volume_patch, overlap) / batch)
    predict, done = _predictor(network, fitted, mirror), 0

    def predict_and_show(windows: Tensor) -> Tensor:
        nonlocal done
        done += 1
        show(done / calls)
        with torch.autocast(device.type, dtype=half, enabled=half is not None):
            return predict(windows)

    return window(scaled[None], predict_and_show)[0][(slice(None), *inside)].cpu()


def _predictor(network: nn.Module, fitted: Fitted, mirror: bool) -> Callable[[Tensor], Tensor]:
    kept = [axis for axis in range(3) if axis != fitted.slice_axis]
    axes = [kept.index(axis) + 2 for axis in fitted.mirror if axis in kept] if mirror else []
    flips = [flip for count in range(len(axes) + 1) for flip in combinations(axes, count)]
    left_right = kept.index(0) + 2 if 0 in kept else None
    exchanged = fitted.mirrored_classes()

    def predict(windows: Tensor) -> Tensor:
        total = torch.zeros(())
        for flip in flips:
            x = windows.as_subclass(Tensor).flip(flip).contiguous(memory_format=memory_format(windows.ndim - 2))
            logits = finest_first(network(x), windows.ndim)[0].float()
            found = (logits.sigmoid() if fitted.regions else logits.softmax(1)).flip(flip)
            total = total + (found[:, exchanged] if left_right in flip and fitted.sides else found)
        return total / len(flips)

    return predict


def _windows(shape: torch.Size, patch: tuple[int, ...], overlap: float) -> int:
    """How many windows MONAI lays over a volume: steps of patch * (1 - overlap) along each axis."""
    steps = (max(1, int(wanted * (1 - overlap))) for wanted in patch)
    return math.prod(1 + math.ceil((size - wanted) / step) for size, wanted, step in zip(shape, patch, steps, strict=True))
