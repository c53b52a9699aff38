"""The score of a class that is explained, and the windows through which the network sees that class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from medssm.errors import UserError
from medssm.segment.inference import Windows, importance
from medssm.segment.losses import finest_first
from medssm.segment.networks import memory_format
from medssm.segment.preprocess import Fitted
from medssm.segment.regions import structures


class Structure(NamedTuple):
    """A class or a region: its name, its values in the label map, and the network's output for it."""

    name: str
    values: tuple[int, ...]
    output: int


def structure(wanted: str | int, fitted: Fitted) -> Structure:
    """The class or region of this name, or of this value in the label map. Raises UserError that lists them."""
    values = structures(fitted.classes, fitted.regions)
    written = fitted.regions.written or [value for (value,) in values.values()]
    by_value = {str(value): name for name, value in zip(values, written, strict=True)}
    name = str(wanted) if str(wanted) in values else by_value.get(str(wanted))
    if name is None:
        known = ", ".join(f"{name} ({value})" for name, value in zip(values, written, strict=True))
        raise UserError(f"explain: expected one of {known}, got {wanted}")
    return Structure(name, tuple(values[name]), fitted.outputs.index(name))


class Seen(NamedTuple):
    """A window that holds a class: its place in the padded image, and the voxels (*patch) of the class that are explained in it."""

    place: tuple[slice, ...]
    mask: Tensor


def windows_of(windows: Windows, found: Tensor, fitted: Fitted) -> list[Seen]:
    """The windows that hold a class, the one with most of it first; each voxel is explained in the window in which it lies deepest.

    Args:
        windows: of the image
        found: (x, y, z) bool, the voxels of the class
        fitted: what was fitted to the training cases
    """
    weights = importance(fitted, torch.device("cpu"))
    weights = weights if fitted.slice_axis is None else weights.unsqueeze(fitted.slice_axis)
    parts = [tuple(map(tuple, windows.over(place))) for place in windows.places]
    holding = [i for i, (_, at) in enumerate(parts) if found[at].any()]
    best, owner = torch.zeros(found.shape), torch.full(found.shape, -1, dtype=torch.int32)
    for i in holding:
        kept, at = parts[i]
        deeper = found[at] & (weights[kept] > best[at])
        best[at] = torch.where(deeper, weights[kept], best[at])
        owner[at] = torch.where(deeper, i, owner[at])
    seen = []
    for i in holding:
        kept, at = parts[i]
        mask = torch.zeros(fitted.volume_patch, dtype=torch.bool)
        mask[kept] = owner[at] == i
        if mask.any():
            seen.append(Seen(tuple(windows.places[i]), flat(mask, fitted)))
    return sorted(seen, key=lambda one: -int(one.mask.sum()))


class ClassScore:
    """The score of a class in a window: its log-probability, summed over the voxels of the window that were found to be of it, divided by the
    `voxels` of all windows. Over all windows that adds up to the mean log-probability of the class over its voxels.

    A logit would do for a sigmoid alone: a softmax gives the same probabilities where one number is added to all logits.

    Args:
        network: gives logits (b, outputs, *patch), or a list of them with the finest first
        output: that of the class
        regions: whether each output has a sigmoid of its own
        mask: (*patch), the voxels
        voxels: how many the class has in all windows
    """

    def __init__(self, network: nn.Module, output: int, regions: bool, mask: Tensor, voxels: int) -> None:
        self.network, self.output, self.regions, self.mask, self.voxels = network, output, regions, mask, voxels

    def __call__(self, x: Tensor) -> Tensor:
        """(b, c, *patch) -> (b,)."""
        return self._logarithms(x).sum(1) / self.voxels

    @torch.no_grad()
    def probability(self, x: Tensor) -> Tensor:
        """(b, c, *patch) -> (b,): the mean probability of the class over its voxels in this window."""
        return self._logarithms(x).exp().mean(1)

    def _logarithms(self, x: Tensor) -> Tensor:
        """(b, voxels in the mask)."""
        x = x.contiguous(memory_format=memory_format(x.ndim - 2))
        logits = finest_first(self.network(x), x.ndim)[0].float()
        logarithms = functional.logsigmoid(logits) if self.regions else functional.log_softmax(logits, 1)
        return logarithms[:, self.output][:, self.mask]


def means(windows: Windows) -> Tensor:
    """(c,): the mean of each channel over the image, as it is scaled for the network."""
    x, _, y, z = windows.image.shape
    sums = [windows.scale(windows.image[rows].movedim(1, 0)).double().sum((1, 2, 3)) for rows in windows.image.slabs()]
    return (torch.stack(sums).sum(0) / (x * y * z)).float()


def without_information(windows: Windows, place: Sequence[slice], fitted: Fitted, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the network sees at a place, (c, *patch); the same with `levels` (c,) in each voxel of the image; where in it the image is, (*patch) bool.

    Around the image both are alike, so that nothing is attributed to what is not there.
    """
    x = windows.cut(place)
    inside = torch.zeros(fitted.volume_patch, dtype=torch.bool)
    inside[tuple(windows.over(place)[0])] = True
    inside = flat(inside, fitted)
    return x, torch.where(inside, levels.reshape(-1, *[1] * (x.dim() - 1)), x), inside


def flat(volume: Tensor, fitted: Fitted) -> Tensor:
    """(..., x, y, z) without the axis across a 2D network's slices."""
    return volume if fitted.slice_axis is None else volume.squeeze(fitted.slice_axis - 3)


def thick(values: Tensor, fitted: Fitted) -> Tensor:
    """(..., *patch) as (..., x, y, z)."""
    return values if fitted.slice_axis is None else values.unsqueeze(fitted.slice_axis - 3)
