"""The U-Net assembler: an encoder and a decoder given as lists per stage, with strides per axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

Strides = Sequence[Sequence[int]]


class Encoder(nn.Module):
    """A stem, then stages from fine to coarse; stage s starts with a step of strides[s] voxels along each axis.

    stages, output_channels and strides have one entry per stage. forward returns every stage's output, the finest first.
    """

    def __init__(self, stem: nn.Module, stages: Sequence[nn.Module], output_channels: Sequence[int], strides: Strides):
        super().__init__()
        self.stem, self.stages = stem, nn.ModuleList(stages)
        self.output_channels, self.strides = list(output_channels), [tuple(s) for s in strides]

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x, skips = self.stem(x), []
        for s in range(len(self.stages)):
            x = self.stage(s, x)
            skips.append(x)
        return skips

    def stage(self, s: int, x: torch.Tensor) -> torch.Tensor:
        """One stage; an encoder with more than `stages` per level overrides it."""
        return self.stages[s](x)


class Decoder(nn.Module):
    """From the coarsest stage up: upsample, join the encoder's skip, a stage; a segmentation head per level.

    upsample_layers, stages and seg_layers go from coarse to fine, one per stage of the encoder but the coarsest; of the heads all but
    the last may be None (a head that never sees a gradient would stop distributed training).
    joins[s] says whether level s concatenates its skip (the coarsest level first).
    With `deep_supervision`, which may be switched at any time where all heads are there, forward returns a list of logits, the highest
    resolution first (nnU-Net's contract), else the finest logits.
    """

    def __init__(self, upsample_layers: Sequence[nn.Module], stages: Sequence[nn.Module], seg_layers: Sequence[nn.Module | None],
                 joins: Sequence[bool] | None = None, deep_supervision: bool = False):
        super().__init__()
        self.upsample_layers, self.stages, self.seg_layers = nn.ModuleList(upsample_layers), nn.ModuleList(stages), nn.ModuleList(seg_layers)
        self.joins = [True] * len(self.stages) if joins is None else list(joins)
        self.deep_supervision = deep_supervision

    @property
    def deep_supervision(self) -> bool:
        return self._deep_supervision

    @deep_supervision.setter
    def deep_supervision(self, value: bool) -> None:
        if value and any(head is None for head in self.seg_layers):
            raise ValueError("deep_supervision: this decoder has a head for the finest level alone; build it with deep_supervision=True")
        self._deep_supervision = bool(value)

    def forward(self, skips: Sequence[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        x, outputs, finest = skips[-1], [], len(self.stages) - 1
        for s, (upsample, stage, head, join) in enumerate(zip(self.upsample_layers, self.stages, self.seg_layers, self.joins, strict=True)):
            x = upsample(x)
            x = stage(torch.cat((x, skips[-(s + 2)]), 1) if join else x)
            if self.deep_supervision or s == finest:
                outputs.append(head(x))
        outputs.reverse()
        return outputs if self.deep_supervision else outputs[0]


class UNet(nn.Module):
    """An encoder, an optional bottleneck module on its coarsest output, and a decoder.

    Input (b, c, *spatial), output logits (b, classes, *spatial), or their list. `size="any"` pads the input with zeros to a multiple of
    the product of all strides and crops the output; `size="strict"` raises ValueError and names the axis.
    """

    def __init__(self, encoder: Encoder, decoder: Decoder, bottleneck: nn.Module | None = None, size: str = "any"):
        super().__init__()
        if size not in ("any", "strict"):
            raise ValueError(f"size: expected 'any' or 'strict', got {size!r}")
        self.encoder, self.bottleneck, self.decoder, self.size = encoder, bottleneck, decoder, size
        self.size_divisor = tuple(math.prod(axis) for axis in zip(*encoder.strides, strict=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        spatial = x.shape[2:]
        padded = self.pad(x)
        skips = self.encoder(padded)
        if self.bottleneck is not None:
            skips[-1] = self.bottleneck(skips[-1])
        y = self.decoder(skips)
        if padded is x:
            return y
        return [self._crop(o, padded.shape[2:], spatial) for o in y] if isinstance(y, list) else self._crop(y, padded.shape[2:], spatial)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """x with zeros behind it, up to a multiple of `size_divisor` along each axis."""
        if x.dim() != 2 + len(self.size_divisor):
            raise ValueError(f"x: expected (b, c, *spatial) with {len(self.size_divisor)} spatial axes, got {tuple(x.shape)}")
        missing = [-n % d for n, d in zip(x.shape[2:], self.size_divisor, strict=True)]
        if not any(missing):
            return x
        if self.size == "strict":
            axis = next(i for i, m in enumerate(missing) if m)
            raise ValueError(f"x: expected spatial axis {axis} to be a multiple of {self.size_divisor[axis]}, got {tuple(x.shape[2:])}")
        return nn.functional.pad(x, [p for m in reversed(missing) for p in (0, m)])

    @staticmethod
    def _crop(y, padded, wanted):
        """The part of an output (of any resolution) that lies over the unpadded input."""
        kept = [-(-w * n // p) for n, p, w in zip(y.shape[2:], padded, wanted, strict=True)]
        for axis, n in enumerate(kept):
            y = y.narrow(2 + axis, 0, n)
        return y

