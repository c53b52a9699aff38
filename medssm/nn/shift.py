"""UNeXt's tokenised MLP (Valanarasu and Patel, arXiv 2203.04967): linear layers between shifts, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medssm.nn.blocks import CONV, depthwise, image, tokens
from medssm.nn.leaf import Leaf
from medssm.nn.vss import DropPath

_SHIFTS = range(-2, 3)


class ShiftedBlock(nn.Module):
    """x + mlp(norm(x)): a shift, fc1, a depthwise convolution, GELU, a shift along the last axis, fc2 (tokenised MLP)."""

    def __init__(self, channels: int, spatial_dims: int, drop_path: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(channels)
        self.fc1, self.fc2 = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.conv = CONV[spatial_dims](channels, channels, 3, padding=1, groups=channels)
        self.shift1, self.shift2 = Shift(range(1, spatial_dims)), Shift([spatial_dims])
        self.dropout, self.drop_path = nn.Dropout(dropout), DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        t = tokens(x)
        y = depthwise(self.conv, self.fc1(self.shift1(self.norm2(t))))
        y = self.fc2(self.shift2(self.dropout(nn.functional.gelu(y))))
        return image(t + self.drop_path(self.dropout(y)))


class Shift(Leaf):
    """Five groups of the channels of (b, *spatial, c) move by -2 to 2 voxels along each of the axes; zeros move in."""

    def __init__(self, axes: Sequence[int]) -> None:
        super().__init__()
        self.axes = list(axes)

    def forward(self, x: Tensor) -> Tensor:
        """(b, *spatial, c) -> the same shape."""
        reach, last = max(_SHIFTS), x.dim() - 1
        around = [p for axis in range(last, 0, -1) for p in [reach if axis in self.axes else 0] * 2]
        parts = nn.functional.pad(x, around).chunk(len(_SHIFTS), -1)
        for axis in self.axes:
            parts = tuple(part.narrow(axis, reach - by, x.shape[axis]) for part, by in zip(parts, _SHIFTS, strict=False))
        return torch.cat(parts, -1)
