"""Blocks of VMamba and its kin (VM-UNet, Swin-UMamba, MedMamba), in 2D and 3D: SS-ND blocks, patch merging and expansion, the encoder.

They take and give (b, c, *spatial) in channels-last memory, as `blocks` does. Weight names are VMamba's.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medssm.nn.blocks import CONV, ChannelNorm, check_dims, image, spread, tokens
from medssm.nn.leaf import Leaf
from medssm.nn.ssnd import SSND
from medssm.nn.unet import Encoder


class DropPath(Leaf):
    """Stochastic depth (Huang et al., arXiv 1603.09382): in training a residual branch is left out for a sample with probability p, and
    divided by 1 - p where it is kept."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """(b, ...) -> the same shape."""
        if not self.training or self.p == 0:
            return x
        kept = torch.empty(x.shape[0], *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device).bernoulli_(1 - self.p)
        return x * kept / (1 - self.p)


def drop_paths(depths: Sequence[int], rate: float) -> list[list[float]]:
    """The probabilities of each stage's blocks: from 0 at the first of all to `rate` at the last, evenly."""
    all_of_them, out = torch.linspace(0, rate, sum(depths), device="cpu").tolist(), []
    for depth in depths:
        out.append(all_of_them[:depth])
        all_of_them = all_of_them[depth:]
    return out


class VSSBlock(nn.Module):
    """x + op(norm(x)), then, with mlp_ratio above 0, x + mlp(norm2(x)): the visual state space block. op is an SSND with `ssnd`'s options."""

    def __init__(
        self,
        channels: int,
        spatial_dims: int = 2,
        drop_path: float = 0.0,
        mlp_ratio: float = 0.0,
        mlp_dropout: float = 0.0,
        eps: float = 1e-5,
        act: Callable[[], nn.Module] = nn.GELU,
        **ssnd: Any,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps)
        self.op = SSND(channels, spatial_dims=spatial_dims, **ssnd)
        self.drop_path = DropPath(drop_path)
        self.mlp = None
        if mlp_ratio > 0:
            self.norm2, self.mlp = nn.LayerNorm(channels, eps), MLP(channels, int(mlp_ratio * channels), mlp_dropout, act)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        t = tokens(x)
        t = t + self.drop_path(self.op(self.norm(t)))
        if self.mlp is not None:
            t = t + self.drop_path(self.mlp(self.norm2(t)))
        return image(t)


class MLP(nn.Module):
    """fc2(act(fc1(x))) on (b, *spatial, c)."""

    def __init__(self, channels: int, hidden: int, dropout: float = 0.0, act: Callable[[], nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2, self.dropout = nn.Linear(channels, hidden), act(), nn.Linear(hidden, channels), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(b, *spatial, channels) -> the same shape."""
        y: Tensor = self.dropout(self.fc2(self.dropout(self.act(self.fc1(x)))))
        return y


class PatchMerging(Leaf):
    """Each block of 2 x 2 (x 2) voxels becomes one: its voxels' channels side by side, the first axis fastest, a norm, a linear layer without
    bias to twice the channels. Of an odd axis the last voxel falls away, or, with pad, a voxel of zeros is added."""

    def __init__(self, channels: int, spatial_dims: int = 2, channels_out: int | None = None, pad: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2**spatial_dims * channels)
        self.reduction = nn.Linear(2**spatial_dims * channels, channels_out or 2 * channels, bias=False)
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> (b, channels_out, *(spatial / 2))."""
        dims = x.dim() - 2
        if self.pad:
            x = nn.functional.pad(x, [p for n in reversed(x.shape[2:]) for p in (0, n % 2)])
        t = tokens(x)
        for axis in range(1, 1 + dims):
            t = t.unfold(axis, 2, 2)  # the two voxels of a block last; the last voxel of an odd axis is in none
        t = t.permute(*range(1 + dims), *range(1 + 2 * dims, 1 + dims, -1), 1 + dims).flatten(1 + dims)
        return image(self.reduction(self.norm(t)))


class PatchExpand(Leaf):
    """A linear layer without bias from each voxel to a block of scale^dims voxels with `channels` each, then a norm over channels."""

    def __init__(self, channels_in: int, channels: int, spatial_dims: int = 2, scale: int = 2) -> None:
        super().__init__()
        self.stride = (scale,) * spatial_dims
        self.expand = nn.Linear(channels_in, math.prod(self.stride) * channels, bias=False)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels_in, *spatial) -> (b, channels, *(scale spatial))."""
        return image(self.norm(spread(self.expand(tokens(x)), self.stride)))


def vss_encoder(
    in_channels: int,
    features: Sequence[int],
    depths: Sequence[int],
    spatial_dims: int = 2,
    drop_path: float = 0.0,
    *,
    patch: int = 4,
    stem: str = "patch",
    down: str = "merge",
    block: Callable[[int, float], nn.Module] | None = None,
    **options: Any,
) -> Encoder:
    """VMamba's encoder: stages of `down` and blocks, after a stem that divides the size by `patch`.

    stem: "patch" (one convolution) or "double" (two, with a norm and GELU between). down: "merge", "merge-pad" (of an odd axis), "convolution"
    or "convolution-2" (its kernel). block(channels, drop_path) makes a block, by default a VSSBlock with `options`.
    """
    check_dims(spatial_dims)
    block = block or (lambda channels, rate: VSSBlock(channels, spatial_dims, rate, **options))
    if len(depths) != len(features):
        raise ValueError(f"depths: expected one entry for each of {len(features)} stages, got {list(depths)}")
    stages: list[nn.Module] = []
    for s, (channels, rates) in enumerate(zip(features, drop_paths(depths, drop_path), strict=True)):
        steps = {} if s == 0 else {"down": _down(down, features[s - 1], channels, spatial_dims)}
        blocks = nn.Sequential(*(block(channels, rate) for rate in rates))
        stages.append(nn.Sequential(OrderedDict(**steps, blocks=blocks)))
    strides = [(patch,) * spatial_dims] + [(2,) * spatial_dims] * (len(features) - 1)
    coarse = 2 ** (len(features) - 1) if down in ("merge", "convolution-2") else 1  # voxels that the steps need behind the stem
    least = patch * coarse if stem == "patch" else patch * (coarse - 1) + 1
    return Encoder(_stem(stem, in_channels, features[0], patch, spatial_dims), stages, features, strides, least=least)


def _stem(kind: str, channels_in: int, channels: int, patch: int, dims: int) -> nn.Sequential:
    if kind == "patch":
        return nn.Sequential(CONV[dims](channels_in, channels, patch, patch), ChannelNorm(channels))
    step = patch // 2
    return nn.Sequential(
        CONV[dims](channels_in, channels // 2, step + 1, step, 1),
        ChannelNorm(channels // 2),
        nn.GELU(),
        CONV[dims](channels // 2, channels, step + 1, step, 1),
        ChannelNorm(channels),
    )


def _down(kind: str, channels_in: int, channels: int, dims: int) -> nn.Module:
    if kind.startswith("merge"):
        return PatchMerging(channels_in, dims, channels, pad=kind == "merge-pad")
    kernel, padding = (2, 0) if kind == "convolution-2" else (3, 1)
    return nn.Sequential(CONV[dims](channels_in, channels, kernel, 2, padding), ChannelNorm(channels))


@torch.no_grad()
def start_linears(module: nn.Module) -> None:
    """Linear layers from a normal distribution of deviation 0.02, cut at 2, without bias, as vision transformers start."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
