"""Mamba between a norm used twice and a linear layer, with a learned scale on the way around it (LightM-UNet, UltraLight-VM-UNet)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medssm.nn.blocks import image, tokens
from medssm.nn.mamba import Mamba


class ScaledMamba(nn.Module):
    """proj(norm(mamba(norm(x)) + scale y)) on (b, c, *spatial), the two norms one module; y is x, or norm(x) with skip_norm.

    groups: the channels fall into groups that one small Mamba scans each alone (UltraLight-VM-UNet's parallel vision Mamba).
    """

    def __init__(self, channels_in: int, channels: int, groups: int = 1, skip_norm: bool = False) -> None:
        super().__init__()
        if channels_in % groups:
            raise ValueError(f"features: expected multiples of {groups}, got {channels_in}")
        self.groups, self.skip_norm = groups, skip_norm
        self.norm, self.mamba = nn.LayerNorm(channels_in), Mamba(channels_in // groups)
        self.proj = nn.Linear(channels_in, channels)
        self.skip_scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels_in, *spatial) -> (b, channels, *spatial)."""
        t = tokens(x)
        normed = self.norm(t)
        grouped = normed.unflatten(-1, (self.groups, -1)).movedim(-2, 1)  # (b, groups, *spatial, c): a group is a batch element of its own
        scanned = self.mamba(grouped.flatten(0, 1)).unflatten(0, (-1, self.groups)).movedim(1, -2).flatten(-2)
        return image(self.proj(self.norm(scanned + self.skip_scale * (normed if self.skip_norm else t))))
