"""The network that nnU-Net builds from the plans that `medssm nnunet plans` wrote."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from medssm.models import create_model
from medssm.nn import UNet

Steps = tuple[int, ...]


def Network(
    input_channels: int,
    num_classes: int,
    *,
    model: str,
    spatial_dims: int,
    strides: Sequence[Sequence[int]],
    options: Mapping[str, Any] | None = None,
    deep_supervision: bool = False,
) -> nn.Module:
    """A medssm network under nnU-Net's contract, in the place of the class that plans name.

    Args:
        input_channels, num_classes, deep_supervision: from nnU-Net.
        model, spatial_dims, options: for `medssm.create_model`.
        strides: steps per axis from each supervised output to the next, the finest first and from the image on, then one entry more: nnU-Net
            takes the resolutions that its loss compares at from here, and leaves out the last.

    Returns a network of (b, input_channels, *spatial). While `network.decoder.deep_supervision` is set it gives a list of logits, the highest
    resolution first, else those of full resolution. Coarser heads than `strides` asks for are left out, unless the network needs them itself; the
    others are there with and without deep supervision, so that training's weights load for prediction. They have create_model's names. Where all
    strides are 1 the list holds the logits of full resolution again and again, so that nnU-Net's loss, a weighted mean over the list, is that of
    the one output; the weights' names then begin with "network.".

    Raises ValueError for a model or options that create_model refuses, and for strides that are not those of the model's outputs.
    """
    outputs = resolutions(strides)[:-1]
    if not outputs or any(len(step) != spatial_dims for step in outputs):
        raise ValueError(f"strides: expected two or more entries of {spatial_dims} steps, got {strides}")
    options = dict(options or {})
    if all(step == 1 for output in outputs for step in output):
        return _Repeated(create_model(model, spatial_dims, input_channels, num_classes, **options), len(outputs), deep_supervision)
    network = create_model(model, spatial_dims, input_channels, num_classes, deep_supervision=True, **options)
    has = output_resolutions(network)
    if has[: len(outputs)] != outputs:
        raise ValueError(f"strides: expected {model}'s outputs, one voxel of which spans {has} of the input's, got {outputs}")
    decoder = cast(UNet, network).decoder
    decoder.supervise(len(outputs))
    decoder.deep_supervision = deep_supervision
    return network


def resolutions(strides: Sequence[Sequence[int]]) -> list[Steps]:
    """Steps from level to level, multiplied up: how many of the input's voxels one voxel of each level spans, per axis."""
    return list(itertools.accumulate((tuple(s) for s in strides), lambda a, b: tuple(x * y for x, y in zip(a, b, strict=True))))


def output_resolutions(network: nn.Module) -> list[Steps]:
    """What one voxel of each output spans under deep supervision, the finest first; empty for a network without heads at several levels."""
    if not isinstance(network, UNet) or sum(head is not None for head in network.decoder.seg_layers) < 2:
        return []
    maps = [tuple(n // network.decoder.finer for n in level) for level in resolutions(network.encoder.strides)]
    if len(network.decoder.stages) == len(maps) and max(maps[0]) > 1:  # the image itself is a level
        maps.insert(0, (1,) * len(maps[0]))
    return [level for level, head in zip(maps, reversed(network.decoder.seg_layers), strict=False) if head is not None]


class _Repeated(nn.Module):
    """A network with logits of full resolution alone, which deep supervision repeats."""

    def __init__(self, network: nn.Module, times: int, deep_supervision: bool) -> None:
        super().__init__()
        self.network, self.times, self.deep_supervision = network, times, deep_supervision

    @property
    def decoder(self) -> nn.Module:
        """Where nnU-Net sets deep_supervision."""
        return self

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(b, c, *spatial) -> logits (b, classes, *spatial), or their list."""
        logits: Tensor = self.network(x)
        return [logits] * self.times if self.deep_supervision else logits
