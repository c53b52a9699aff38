"""MedNeXt's block (Roy et al., arXiv 2303.09975): ConvNeXt's, at the same, half or twice the resolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medssm.nn.blocks import CONV, TRANSPOSED_CONV, ChannelNorm, depthwise, image, tokens


class NeXtBlock(nn.Module):
    """conv3(gelu(conv2(norm(conv1(x))))) + shortcut(x): a depthwise convolution, then 1 x 1 ones to `expand` times the channels and on.

    Args:
        step: "down" or "up": conv1 halves the resolution, or doubles it by a transposed convolution with zeros in front of its 2 n - 1 voxels.
        residual: whether there is a shortcut: the input itself, or a 1 x 1 convolution with the step. norm: "group" (one channel a group) or "layer".
        responses: global response normalisation (arXiv 2301.00808) of the hidden channels.
    """

    def __init__(
        self,
        channels_in: int,
        channels: int,
        *,
        spatial_dims: int,
        kernel: int,
        expand: int,
        residual: bool,
        step: str | None = None,
        norm: str = "group",
        responses: bool = False,
    ) -> None:
        super().__init__()
        conv, hidden = CONV[spatial_dims], expand * channels_in
        first: Any = TRANSPOSED_CONV[spatial_dims] if step == "up" else conv
        self.spatial_dims, self.step, self.residual = spatial_dims, step, residual
        self.conv1 = first(channels_in, channels_in, kernel, 2 if step else 1, kernel // 2, groups=channels_in)
        self.norm = ChannelNorm(channels_in) if norm == "layer" else nn.GroupNorm(channels_in, channels_in)
        self.conv2, self.conv3 = conv(channels_in, hidden, 1), conv(hidden, channels, 1)
        self.res_conv: nn.Module | None = None
        if step and residual:
            # The way down takes every other voxel first: a strided 1 x 1 convolution crashes torch 2.13's backward on channels-last maps on a CPU.
            self.res_conv = first(channels_in, channels, 1, 2) if step == "up" else conv(channels_in, channels, 1)
        self.grn_beta = nn.Parameter(torch.zeros(1, hidden, *[1] * spatial_dims)) if responses else None
        self.grn_gamma = nn.Parameter(torch.zeros(1, hidden, *[1] * spatial_dims)) if responses else None

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels_in, *spatial) -> (b, channels, *spatial), of half or twice the size with a step."""
        y = self.conv1(x) if self.step else image(depthwise(self.conv1, tokens(x)))
        y = nn.functional.gelu(self.conv2(self.norm(y)))
        if self.grn_gamma is not None and self.grn_beta is not None:
            size = y.norm(dim=list(range(2, 2 + self.spatial_dims)), keepdim=True)
            y = self.grn_gamma * (y * (size / (size.mean(1, keepdim=True) + 1e-6))) + self.grn_beta + y
        y = self.conv3(y)
        if self.step == "up":
            y = nn.functional.pad(y, [1, 0] * self.spatial_dims)
        return y + self._shortcut(x) if self.residual else y

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.res_conv is None:
            return x
        if self.step == "up":
            return nn.functional.pad(self.res_conv(x), [1, 0] * self.spatial_dims)
        every: tuple[Any, ...] = (..., *[slice(None, None, 2)] * self.spatial_dims)
        y: Tensor = self.res_conv(x[every])
        return y
