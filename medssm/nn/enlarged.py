"""A decoder whose finest map is coarser than the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import interpolate

from medssm.nn.blocks import LINEAR
from medssm.nn.unet import Decoder


class EnlargedDecoder(Decoder):
    """A Decoder that interpolates its logits linearly. steps: by how much along each axis, from its finest map to the image."""

    def __init__(self, *args: Any, steps: Sequence[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.finer, self.steps, self.mode = steps[0], [float(step) for step in steps], LINEAR[len(steps)]

    def logits(self, skips: Sequence[Tensor], all_heads: bool) -> list[Tensor]:
        """The logits of the finest level, or with all_heads of every level that has a head, the finest first."""
        outputs = self.coarse(skips, all_heads)
        return outputs if all(step == 1 for step in self.steps) else [interpolate(y, scale_factor=self.steps, mode=self.mode) for y in outputs]

    def coarse(self, skips: Sequence[Tensor], all_heads: bool) -> list[Tensor]:
        """The same at the resolutions of the maps."""
        return super().logits(skips, all_heads)
