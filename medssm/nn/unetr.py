"""Convolutional blocks of UNETR's decoder (Hatamizadeh et al., arXiv 2103.10504), which SegMamba and Swin-UMamba took over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from medssm.nn.blocks import BATCH_NORM, CONV, INSTANCE_NORM, TRANSPOSED_CONV

NORMS = {"instance": INSTANCE_NORM, "batch": BATCH_NORM}


class ResidualBlock(nn.Module):
    """act(norm(conv2(act(norm(conv1(x))))) + skip(x)): 3 x 3 (x 3) convolutions without bias, leaky ReLU, and a norm: "instance", without weights, or
    "batch".

    skip is the identity, or norm(conv3(x)) with a 1 x 1 convolution where the channels change. residual=False leaves skip(x) out.
    """

    def __init__(self, channels_in: int, channels: int, spatial_dims: int, residual: bool = True, norm: str = "instance") -> None:
        super().__init__()
        conv, make, self.residual = CONV[spatial_dims], NORMS[norm][spatial_dims], residual
        self.conv1 = conv(channels_in, channels, 3, padding=1, bias=False)
        self.conv2 = conv(channels, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2 = make(channels), make(channels)
        self.conv3 = conv(channels_in, channels, 1, bias=False) if residual and channels_in != channels else None
        self.norm3 = make(channels) if self.conv3 else None

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels_in, *spatial) -> (b, channels, *spatial)."""
        # In place where autograd allows it: at full resolution the pages of a fresh map cost as much as the arithmetic on it.
        y = self.norm2(self.conv2(leaky_relu(self.norm1(self.conv1(x)), 0.01, inplace=True)))
        if self.residual:
            y += x if self.conv3 is None or self.norm3 is None else self.norm3(self.conv3(x))
        return leaky_relu(y, 0.01, inplace=True)


def residual_decoder(features: Sequence[int], out_channels: int, spatial_dims: int, heads: int, residual: bool = True) -> dict[str, list[Any]]:
    """Decoder's arguments for features from fine to coarse, every step twofold: transposed convolutions without bias, a residual block per
    level and a second one at the finest, heads (1 x 1 convolutions) on the finest `heads` levels."""
    ups, stages, seg_layers = [], [], []
    for s in range(len(features) - 2, -1, -1):
        ups.append(TRANSPOSED_CONV[spatial_dims](features[s + 1], features[s], 2, 2, bias=False))
        blocks = [ResidualBlock(2 * features[s], features[s], spatial_dims, residual)]
        if s == 0:
            blocks.append(ResidualBlock(features[s], features[s], spatial_dims, residual))
        stages.append(nn.Sequential(*blocks))
        seg_layers.append(CONV[spatial_dims](features[s], out_channels, 1) if s < heads else None)
    return {"upsample_layers": ups, "stages": stages, "seg_layers": seg_layers}
