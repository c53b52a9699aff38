"""RWKV in RWKV (Chen et al., Zig-RiR, IEEE TMI 2025), in 2D and 3D: sentences, one token for each patch of the image, and their words, a grid of
tokens for each sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from medssm.nn import sizes
from medssm.nn.blocks import BATCH_NORM, CONV, TRANSPOSED_CONV, ChannelNorm, ChannelsLast, image, tokens
from medssm.nn.leaf import Leaf
from medssm.nn.rerwkv import QShift, ShiftedChannelMix
from medssm.nn.unet import Encoder
from medssm.nn.vss import DropPath, drop_paths
from medssm.nn.windows import cut, joined

SIDE = 4  # words along each axis of a sentence
Mix = Callable[[int, int, int, str], nn.Module]  # of (channels, number of the block in its stage, dims, mode)


class RiRBlock(nn.Module):
    """On words (b, *spatial, *SIDEs, inner) and sentences (b, *spatial, outer), with layer norms over a sentence's words together:

        words += inner_attn(norm(words));   words += inner_ffn(norm(words));   sentences += norm(proj(norm(words)))
        sentences += outer_attn(norm(sentences));   sentences += outer_ffn(norm(sentences))

    inner None: the block leaves the words alone, and the first line out.
    """

    def __init__(self, outer: int, inner: int | None, number: int, spatial_dims: int, mode: str, mix: Mix, drop_path: float) -> None:
        super().__init__()
        self.has_inner, self.dims = inner is not None, spatial_dims
        if inner is not None:
            total = SIDE**spatial_dims * inner
            self.inner_norm1, self.inner_norm2, self.proj_norm1 = (nn.LayerNorm(total) for _ in range(3))
            self.inner_attn, self.inner_ffn = mix(inner, number, spatial_dims, mode), ShiftedChannelMix(inner, QShift())
            self.proj, self.proj_norm2 = nn.Linear(total, outer, bias=False), nn.LayerNorm(outer)
        self.outer_norm1, self.outer_norm2 = nn.LayerNorm(outer), nn.LayerNorm(outer)
        self.outer_attn, self.outer_ffn = mix(outer, number, spatial_dims, mode), ShiftedChannelMix(outer, QShift())
        self.drop_path = DropPath(drop_path)

    def forward(self, words: Tensor, sentences: Tensor) -> tuple[Tensor, Tensor]:
        """The words and the sentences, of the same shapes."""
        if self.has_inner:
            for norm, part in ((self.inner_norm1, self.inner_attn), (self.inner_norm2, self.inner_ffn)):
                y = norm(words.flatten(1 + self.dims)).view_as(words)
                words = words + self.drop_path(part(y.flatten(0, self.dims)).view_as(words))
            sentences = sentences + self.proj_norm2(self.proj(self.proj_norm1(words.flatten(1 + self.dims))))
        sentences = sentences + self.drop_path(self.outer_attn(self.outer_norm1(sentences)))
        return words, sentences + self.drop_path(self.outer_ffn(self.outer_norm2(sentences)))


class RiRStem(Leaf):
    """(b, c, *spatial) -> words, at half the resolution, and sentences, at an eighth, from the same convolution."""

    def __init__(self, channels_in: int, outer: int, inner: int, spatial_dims: int) -> None:
        super().__init__()
        self.memory = ChannelsLast(spatial_dims)

        def layers(*steps: tuple[int, int, int]) -> nn.Sequential:
            conv, norm = CONV[spatial_dims], BATCH_NORM[spatial_dims]
            return nn.Sequential(*(m for a, b, step in steps for m in (conv(a, b, 3, step, 1), norm(b), nn.ReLU())))

        self.common_conv = layers((channels_in, 2 * inner, 2))
        self.inner_convs = layers((2 * inner, inner, 1))
        self.outer_convs = layers((2 * inner, 4 * inner, 2), (4 * inner, 8 * inner, 2), (8 * inner, outer, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(b, channels_in, *spatial) -> (b, *(spatial / 8), *SIDEs, inner), (b, *(spatial / 8), outer)."""
        x = self.common_conv(self.memory(x))
        return cut(tokens(self.inner_convs(x)), SIDE), tokens(self.outer_convs(x))


class RiRStage(Leaf):
    """Half the resolution, the words of 2 x 2 (x 2) sentences becoming those of one, then the blocks; the first stage has the blocks alone."""

    def __init__(self, before: tuple[int, int] | None, outer: int, inner: int, blocks: Sequence[nn.Module], spatial_dims: int) -> None:
        super().__init__()
        self.blocks, self.first = nn.ModuleList(blocks), before is None
        if before is not None:
            conv = CONV[spatial_dims]
            self.words = nn.Sequential(ChannelNorm(before[1]), conv(before[1], inner, 3, 2, 1))
            self.sentences = nn.Sequential(ChannelNorm(before[0]), conv(before[0], outer, 3, 2, 1))

    def forward(self, tokens_: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Words and sentences -> the same at this stage's resolution."""
        words, sentences = tokens_
        dims = sentences.dim() - 2
        if not self.first:
            windows = cut(joined(words), 2 * SIDE)
            merged = self.words(image(windows.flatten(0, dims)))
            words = tokens(merged).unflatten(0, windows.shape[: 1 + dims])
            sentences = tokens(self.sentences(image(sentences)))
        for block in self.blocks:
            words, sentences = block(words, sentences)
        return words, sentences


class RiREncoder(Encoder):
    """The stem and the stages; forward gives the sentences of each, the first at 1/8 of the resolution."""

    def __init__(
        self, in_channels: int, features: Sequence[int], inner: int, depths: Sequence[int], dims: int, mode: str, mix: Mix, drop_path: float
    ) -> None:
        stages, before = [], None
        for s, (outer, rates) in enumerate(zip(features, drop_paths(depths, drop_path), strict=True)):
            width, deep = inner * 2**s, len(rates) > 6
            blocks = [RiRBlock(outer, width if i == 0 or (i == 1 and deep) else None, i, dims, mode, mix, rate) for i, rate in enumerate(rates)]
            stages.append(RiRStage(before, outer, width, blocks, dims))
            before = (outer, width)
        super().__init__(RiRStem(in_channels, features[0], inner, dims), stages, features, [(8,) * dims] + [(2,) * dims] * (len(features) - 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(b, in_channels, *spatial) -> maps (b, features[s], *(spatial / 8 / 2^s)); zeros are added up to a multiple of 8 2^(stages - 1)."""
        divisor = [math.prod(axis) for axis in zip(*self.strides, strict=True)]
        state, maps = self.stem(sizes.pad_to(x, divisor)), []
        for stage in self.stages:
            state = stage(state)
            maps.append(image(state[1]))
        return maps


class UpConv(nn.Sequential):
    """Twice the resolution: a transposed convolution and a 3 x 3 (x 3) one, each with a batch norm and GELU."""

    def __init__(self, channels: int, spatial_dims: int) -> None:
        conv, norm = CONV[spatial_dims], BATCH_NORM[spatial_dims]
        up = TRANSPOSED_CONV[spatial_dims](channels, channels, 2, 2)
        super().__init__(up, norm(channels), nn.GELU(), conv(channels, channels, 3, padding=1), norm(channels), nn.GELU())
