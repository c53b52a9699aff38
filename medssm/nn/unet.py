"""The U-Net assembler: an encoder and a decoder given as lists per stage, with strides per axis."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from medssm.kernels.autocast import without_autocast
from medssm.nn import sizes
from medssm.nn.inner import weight_dtype

Strides = Sequence[Sequence[int]]


class Encoder(nn.Module):
    """A stem, then stages from fine to coarse; stage s starts with a step of strides[s] voxels along each axis.

    stages, output_channels and strides have one entry per stage. forward returns every stage's output, the finest first. With `outs`, one
    module per stage, it returns what they make of the outputs; the next stage still takes the output itself. An axis with less than `least`
    voxels is padded with zeros.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        output_channels: Sequence[int],
        strides: Strides,
        outs: Sequence[nn.Module] | None = None,
        *,
        least: int = 1,
    ) -> None:
        super().__init__()
        self.stem, self.stages = stem, nn.ModuleList(stages)
        self.outs = None if outs is None else nn.ModuleList(outs)
        self.output_channels, self.strides = list(output_channels), [tuple(s) for s in strides]
        self.least = least

    def forward(self, x: Tensor) -> list[Tensor]:
        """(b, c, *spatial) -> one map (b, output_channels[s], *(spatial / the strides so far)) per stage."""
        x, skips = self.stem(sizes.pad_up(x, self.least)), []
        for s in range(len(self.stages)):
            x = self.stage(s, x)
            skips.append(x if self.outs is None else self.outs[s](x))
        return skips

    def trunk(self) -> Encoder:
        """This encoder without `outs`, with the same layers, not copies: for a classifier, in which those of the finer maps would learn nothing
        (distributed training stops at a weight without a gradient)."""
        if self.outs is None:
            return self
        trunk = copy.copy(self)
        trunk._modules = {**self._modules, "outs": None}
        return trunk

    def stage(self, s: int, x: Tensor) -> Tensor:
        """One stage; an encoder with more than `stages` per level overrides it."""
        y: Tensor = self.stages[s](x)
        return y


class Decoder(nn.Module):
    """From the coarsest stage up: upsample, join the encoder's skip, a stage; a segmentation head per level.

    upsample_layers, stages and seg_layers go from coarse to fine, one per map but the coarsest; of the heads all but the last may be None:
    a level without logits (a head that never sees a gradient would stop distributed training). One head more is the coarsest map's, the first.
    joins[s] says how level s, the coarsest first, takes its skip: True concatenates it behind, "before" in front, "sum" adds it, False leaves it out.
    `finer` is the resolution of the logits over that of their level.
    With `deep_supervision`, which may be switched at any time where there are several heads, forward returns a list of logits, the highest
    resolution first (nnU-Net's contract), else the finest logits.
    """

    finer = 1

    def __init__(
        self,
        upsample_layers: Sequence[nn.Module],
        stages: Sequence[nn.Module],
        seg_layers: Sequence[nn.Module | None],
        joins: Sequence[bool | str] | None = None,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        self.upsample_layers, self.stages = nn.ModuleList(upsample_layers), nn.ModuleList(stages)
        self.seg_layers = nn.ModuleList(cast(Sequence[nn.Module], seg_layers))  # which takes None too
        self.joins = [True] * len(self.stages) if joins is None else list(joins)
        self.deep_supervision = deep_supervision

    @property
    def deep_supervision(self) -> bool:
        """Whether forward returns the logits of every level that has a head."""
        return self._deep_supervision

    @deep_supervision.setter
    def deep_supervision(self, value: bool) -> None:
        if value and sum(head is not None for head in self.seg_layers) < min(2, len(self.seg_layers)):
            raise ValueError("deep_supervision: this decoder has a head for the finest level alone; build it with deep_supervision=True")
        self._deep_supervision = bool(value)

    def supervise(self, levels: int) -> None:
        """Give the logits of the `levels` finest levels alone under deep supervision: the heads of the others, which would learn nothing, go."""
        for s in range(len(self.seg_layers) - levels):
            self.seg_layers[s] = cast(nn.Module, None)  # which ModuleList takes too

    def forward(self, skips: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """The encoder's maps (b, c, *spatial), the finest first -> logits (b, classes, *spatial), or their list."""
        outputs = self.logits(skips, self.deep_supervision)
        return outputs if self.deep_supervision else outputs[0]

    def logits(self, skips: Sequence[Tensor], all_heads: bool) -> list[Tensor]:
        """The logits of the finest level, or with all_heads of every level that has a head, the finest first."""
        x, outputs, finest = skips[-1], [], len(self.stages) - 1
        heads = list(self.seg_layers)
        if len(heads) > len(self.stages):
            coarsest = heads.pop(0)
            if coarsest is not None and all_heads:
                outputs.append(coarsest(x))
        for s, (upsample, stage, head, join) in enumerate(zip(self.upsample_layers, self.stages, heads, self.joins, strict=True)):
            x = upsample(x)
            if join:
                skip = skips[-(s + 2)]
                x = x + skip if join == "sum" else torch.cat((skip, x) if join == "before" else (x, skip), 1)
            x = stage(x)
            if head is not None and (all_heads or s == finest):
                outputs.append(head(x))
        outputs.reverse()
        return outputs


NARROW = 128  # the most channels of a network whose layers are too narrow for bf16 on a CPU


class AnySize(nn.Module):
    """A network for inputs (b, c, *spatial) of any size, though its strides divide few: `whole` sees multiples of `size_divisor` alone.

    `size="any"` pads the input with zeros behind it and crops the outputs, of any resolution; `size="strict"` raises ValueError and names
    the axis. Instance norms have no statistics of the single voxel that an input of one `size_divisor` becomes: such a network sees two.
    A subclass has `whole(x)`, which returns a tensor or a list of them, and sets `instance_norms` once it has its layers.

    narrow: under bf16 autocast on a CPU the network computes in its weights' type all the same, and gives that. Of few channels bf16 is slower there:
    oneDNN's kernels for it take 32 channels at a time, and each layer casts its input, its weights and its output.
    """

    instance_norms: bool = False
    narrow: bool = False

    def whole(self, x: Tensor) -> Tensor | list[Tensor]:
        """The network on (b, c, *spatial) whose sizes `size_divisor` divides."""
        raise NotImplementedError

    def __init__(self, size_divisor: Sequence[int], size: str = "any") -> None:
        super().__init__()
        if size not in ("any", "strict"):
            raise ValueError(f"size: expected 'any' or 'strict', got {size!r}")
        self.size_divisor, self.size = tuple(size_divisor), size

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(b, c, *spatial) -> `whole`'s output for it, (b, classes, *spatial) or a list of coarser ones too."""
        if self.narrow and torch.is_autocast_enabled("cpu") and x.device.type == "cpu":
            with without_autocast(x.device):
                return self._cropped(x.to(weight_dtype(self, x)))
        return self._cropped(x)

    def _cropped(self, x: Tensor) -> Tensor | list[Tensor]:
        padded = sizes.pad_to(x, self.size_divisor, self.size, self.instance_norms)
        y = self.whole(padded)
        if padded is x:
            return y
        return [sizes.crop(o, padded, x) for o in y] if isinstance(y, list) else sizes.crop(y, padded, x)


class OneChannelToo(AnySize):
    """A network, the class behind this one, for inputs of `in_channels`; one channel alone is repeated to that many."""

    in_channels: int

    def whole(self, x: Tensor) -> Tensor | list[Tensor]:
        """(b, 1 or in_channels, *spatial) -> the network's output."""
        return super().whole(x.expand(-1, self.in_channels, *x.shape[2:]) if x.shape[1] == 1 else x)


def has_instance_norms(network: nn.Module) -> bool:
    """Whether a layer of the network is an instance norm."""
    return any(isinstance(m, (nn.InstanceNorm2d, nn.InstanceNorm3d)) for m in network.modules())


class UNet(AnySize):
    """An encoder, modules on its maps if any, and a decoder.

    Input (b, c, *spatial), output logits (b, classes, *spatial), or their list. bottleneck: on the coarsest map alone. skips: one module
    per map that the decoder takes; with one more than the encoder has stages, the first works on the image itself.
    """

    def __init__(
        self, encoder: Encoder, decoder: Decoder, bottleneck: nn.Module | None = None, size: str = "any", skips: Sequence[nn.Module] | None = None
    ) -> None:
        super().__init__([math.prod(axis) for axis in zip(*encoder.strides, strict=True)], size)
        self.encoder, self.bottleneck, self.decoder = encoder, bottleneck, decoder
        self.skips = None if skips is None else nn.ModuleList(skips)
        self.instance_norms = has_instance_norms(self)

    def whole(self, x: Tensor) -> Tensor | list[Tensor]:
        maps = self.encoder(x)
        if self.skips is not None:
            maps = [x, *maps] if len(self.skips) > len(maps) else maps
            maps = [skip(m) for skip, m in zip(self.skips, maps, strict=True)]
        if self.bottleneck is not None:
            maps[-1] = self.bottleneck(maps[-1])
        logits: Tensor | list[Tensor] = self.decoder(maps)
        return logits
