"""Blocks of the pyramid vision transformer (Wang et al., arXiv 2106.13797) as SegFormer has them (arXiv 2105.15203), in 2D and 3D."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from medssm.nn.blocks import BATCH_NORM, CONV, LINEAR, check_dims, depthwise, image, tokens
from medssm.nn.leaf import Leaf
from medssm.nn.vss import DropPath


class ReducedAttention(Leaf):
    """softmax(q k^T / sqrt(d)) v on (b, *spatial, c), with fewer keys and values than queries: those of blocks of reduction^dims voxels.

    q = query(x); k, v = key_value(sr_norm(sr(x))), sr a convolution whose kernel is its stride, or of x itself where the reduction is 1.

    Args:
        channels, heads: heads divides the channels. reduction: voxels along an axis that become one key; it divides every axis.
    """

    def __init__(self, channels: int, heads: int, reduction: int = 1, spatial_dims: int = 2) -> None:
        super().__init__()
        check_dims(spatial_dims)
        if channels % heads:
            raise ValueError(f"heads: expected a number that divides {channels} channels, got {heads}")
        self.heads = heads
        self.query, self.key_value = nn.Linear(channels, channels), nn.Linear(channels, 2 * channels)
        self.sr = CONV[spatial_dims](channels, channels, reduction, reduction) if reduction > 1 else None
        self.sr_norm = nn.LayerNorm(channels) if reduction > 1 else None
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, *spatial, channels) -> the same shape."""
        source = x if self.sr is None or self.sr_norm is None else self.sr_norm(tokens(self.sr(image(x))))
        q = self.query(x).flatten(1, -2).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (b, heads, n, d)
        k, v = self.key_value(source).flatten(1, -2).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y: Tensor = self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return y.view_as(x)


class MixMLP(nn.Module):
    """fc2(gelu(norm(dwconv(fc1(x))))) on (b, *spatial, c), with a depthwise convolution, from which the blocks know the borders, and a batch norm."""

    def __init__(self, channels: int, hidden: int, spatial_dims: int = 2, norm: bool = True) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.dwconv = CONV[spatial_dims](hidden, hidden, 3, padding=1, groups=hidden)
        self.norm = BATCH_NORM[spatial_dims](hidden) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(b, *spatial, channels) -> the same shape."""
        t = tokens(self.norm(image(depthwise(self.dwconv, self.fc1(x)))))
        y: Tensor = self.fc2(functional.gelu(t))
        return y


class ReducedBlock(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)), on (b, c, *spatial). hidden, norm: the MLP's channels, and whether it has its batch norm.
    eps: of the layer norms. drop_path: stochastic depth. The others as ReducedAttention."""

    def __init__(
        self,
        channels: int,
        heads: int,
        reduction: int,
        hidden: int,
        spatial_dims: int = 2,
        *,
        norm: bool = True,
        eps: float = 1e-5,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels, eps), nn.LayerNorm(channels, eps)
        self.attention, self.mlp = ReducedAttention(channels, heads, reduction, spatial_dims), MixMLP(channels, hidden, spatial_dims, norm)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        t = tokens(x)
        t = t + self.drop_path(self.attention(self.norm1(t)))
        return image(t + self.drop_path(self.mlp(self.norm2(t))))


class LinearHead(nn.Module):
    """Logits at the finest map's size: pred(dropout(relu(norm(sum over the maps of enlarge(fuse linear(map)))))). Each map has its own linear layer
    and its own columns of fuse (width, maps * width, 1, ...), the coarsest one the first."""

    def __init__(self, features: Sequence[int], width: int, classes: int, spatial_dims: int, dropout: float) -> None:
        super().__init__()
        self.interpolation, self.width, inputs = LINEAR[spatial_dims], width, len(features) * width
        self.linears = nn.ModuleList(nn.Sequential(OrderedDict(proj=nn.Linear(c, width), norm=nn.LayerNorm(width))) for c in features)
        self.fuse = nn.Parameter(torch.empty(width, inputs, *[1] * spatial_dims).uniform_(-(inputs**-0.5), inputs**-0.5))
        self.norm, self.dropout = BATCH_NORM[spatial_dims](width), nn.Dropout(dropout)
        self.pred = CONV[spatial_dims](width, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (b, c, *spatial), the finest first -> (b, classes, *spatial) at the finest one's size."""
        fuse, w = self.fuse.flatten(1), self.width
        columns = [fuse[:, at : at + w] for at in range((len(self.linears) - 1) * w, -1, -w)]
        finest, *coarser = (image(functional.linear(layer(tokens(x)), own)) for layer, x, own in zip(self.linears, maps, columns, strict=True))
        for x in coarser:
            finest += functional.interpolate(x, maps[0].shape[2:], mode=self.interpolation)
        logits: Tensor = self.pred(self.dropout(functional.relu(self.norm(finest), inplace=True)))
        return logits
