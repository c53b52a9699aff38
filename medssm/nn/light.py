"""The U-Net of six levels that UltraLight-VM-UNet, MALUNet, EGE-UNet and H-vmunet share, and the attention on its skips."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from medssm.nn.attention import SpatialAttention
from medssm.nn.blocks import CONV, LINEAR, MAX_POOL, check_dims
from medssm.nn.unet import NARROW, AnySize, Encoder

GROUPS = 4  # of the group norms, of which every number of channels is a multiple
Mix = Callable[[int, int, int], nn.Module]


def layers(features: Sequence[int], spatial_dims: int, mix: Mix, mixed: int = 2) -> Mix:
    """(level, channels_in, channels) -> the layer between that level and the one below it, either way: a convolution, or from the level `mixed` on,
    where there are few voxels, what `mix` makes of the three. ValueError for features that are not six multiples of 4."""
    check_dims(spatial_dims)
    if len(features) != 6 or any(c % GROUPS for c in features):
        raise ValueError(f"features: expected six multiples of {GROUPS}, got {list(features)}")
    return lambda level, a, b: mix(level, a, b) if level >= mixed else CONV[spatial_dims](a, b, 3, padding=1)


def halving_stages(in_channels: int, features: Sequence[int], spatial_dims: int, mix: Mix, mixed: int = 2) -> list[nn.Module]:
    """The five stages of the encoder, each gelu(max_pool(norm(layer(x))))."""
    layer, widths = layers(features, spatial_dims, mix, mixed), [in_channels, *features]
    return [
        nn.Sequential(layer(s - 1, widths[s], widths[s + 1]), nn.GroupNorm(GROUPS, widths[s + 1]), MAX_POOL[spatial_dims](2), nn.GELU())
        for s in range(5)
    ]


def rising_stages(features: Sequence[int], spatial_dims: int, mix: Mix, mixed: int = 2) -> list[nn.Module]:
    """The five stages of the decoder, norm(layer(x)), from coarse to fine."""
    layer = layers(features, spatial_dims, mix, mixed)
    return [nn.Sequential(layer(s, features[s + 1], features[s]), nn.GroupNorm(GROUPS, features[s])) for s in range(4, -1, -1)]


def doubling(spatial_dims: int) -> nn.Module:
    """(b, c, *spatial) to twice the resolution, interpolated linearly with the corners in place."""
    return nn.Upsample(scale_factor=2, mode=LINEAR[spatial_dims], align_corners=True)


class LightUNet(AnySize):
    """Five stages that halve the resolution, one at the bottom, five on the way up that add the skips, and a head; (b, out_channels, *spatial).

    Args:
        features: six multiples of 4. down, up: (level, channels_in, channels) -> the layer that mixes, from the level `mixed` on; 0 is the image's.
        bridge: takes and gives the list of skips; None leaves them as they are.
        activation: None, or "sigmoid" on the output. input_size: "any" pads and crops inside, "strict" raises.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        features: Sequence[int],
        down: Mix,
        up: Mix,
        bridge: nn.Module | None = None,
        activation: str | None = None,
        input_size: str = "any",
        mixed: int = 2,
    ) -> None:
        if activation not in (None, "sigmoid"):
            raise ValueError(f"activation: expected None or 'sigmoid', got {activation!r}")
        super().__init__([32] * spatial_dims, input_size)
        self.activation, self.narrow = activation, max(features) <= NARROW
        stages = halving_stages(in_channels, features, spatial_dims, down, mixed)
        self.encoder = Encoder(nn.Identity(), stages, features[:5], [(2,) * spatial_dims] * 5)
        self.bottom, self.bridge = down(4, features[4], features[5]), bridge
        self.ups = nn.ModuleList(rising_stages(features, spatial_dims, up, mixed))
        self.final, self.upsample = CONV[spatial_dims](features[0], out_channels, 1), doubling(spatial_dims)

    def whole(self, x: Tensor) -> Tensor:
        """(b, in_channels, *spatial) -> (b, out_channels, *spatial)."""
        skips = self.encoder(x)
        x = gelu(self.bottom(skips[-1]))
        if self.bridge is not None:
            skips = self.bridge(skips)
        for level, (up, skip) in enumerate(zip(self.ups, reversed(skips), strict=True)):
            x = up(x)
            x = gelu(self.upsample(x) if level else x) + skip
        x = self.upsample(self.final(x))
        return torch.sigmoid(x) if self.activation else x


class SkipAttention(nn.Module):
    """Spatial and channel attention on all skips t (Ruan et al., arXiv 2211.01784): s = spatial(t) t; channel(s + t) (s + t) + s.

    The spatial kernel is shared by the levels; the channel weights of each level see the means of all. kind: "linear" or "convolution", the same
    arithmetic with weights of other shapes.
    """

    def __init__(self, features: Sequence[int], spatial_dims: int, kind: str = "linear") -> None:
        super().__init__()
        if kind not in ("linear", "convolution"):
            raise ValueError(f"attention: expected 'linear' or 'convolution', got {kind!r}")
        self.kind, self.spatial_dims, total = kind, spatial_dims, sum(features)
        self.spatial = SpatialAttention(spatial_dims, dilation=3, bias=True)
        self.means = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.channels = nn.ModuleList([nn.Linear(total, c) if kind == "linear" else nn.Conv1d(total, c, 1) for c in features])

    def forward(self, skips: list[Tensor]) -> list[Tensor]:
        """Maps (b, features[i], *spatial) -> the same shapes."""
        seen = [self.spatial(t) for t in skips]
        both = [s + t for s, t in zip(seen, skips, strict=True)]
        means = self.means(torch.cat([t.flatten(2).mean(-1) for t in both], 1)[:, None])[:, 0]
        out = []
        for layer, s, t in zip(self.channels, seen, both, strict=True):
            scale = torch.sigmoid(layer(means) if self.kind == "linear" else layer(means.unsqueeze(-1)).squeeze(-1))
            out.append(scale[(..., *[None] * self.spatial_dims)] * t + s)
        return out
