"""UltraLight-VM-UNet (Wu et al., arXiv 2403.20035): fifty thousand parameters, one small Mamba shared by four groups of channels; 2D, here 3D too.

What upstream's code does beside the paper: its sigmoid is inside the network, whatever the number of classes, and inputs must be multiples
of 32. `create_model` gives logits for any size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate

from medssm.models.facts import Facts
from medssm.models.options import only
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn import AnySize, Encoder
from medssm.nn.blocks import CONV, LINEAR, MAX_POOL, check_dims
from medssm.nn.scaled import ScaledMamba

_GROUPS = 4


@register_model(
    "ultralight_vmunet", facts=Facts("2403.20035", "wurenkai/UltraLight-VM-UNet", "MIT", small={"features": (4, 4, 8, 8, 8, 8)}, input=(3, 256, 256))
)
class UltraLightVMUNet(AnySize):
    """UltraLight-VM-UNet for any input size; logits (b, out_channels, *spatial).

    Args:
        features: six channel counts, multiples of 4: three convolutional levels and three of Mamba, each at half the resolution of the one
            before but the last.
        bridge: channel and spatial attention on the skips. attention: "linear" or "convolution", the same arithmetic with weights of other shapes.
        activation: None, or "sigmoid" on the output. input_size: "any" pads and crops inside, "strict" raises.
    """

    def __init__(
        self,
        *,
        spatial_dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 1,
        features: Sequence[int] = (8, 16, 24, 32, 48, 64),
        bridge: bool = True,
        attention: str = "linear",
        activation: str | None = None,
        input_size: str = "any",
    ) -> None:
        check_dims(spatial_dims)
        if len(features) != 6 or any(c % _GROUPS for c in features):
            raise ValueError(f"features: expected six multiples of {_GROUPS}, got {list(features)}")
        only("activation", activation, None, "sigmoid")
        super().__init__([32] * spatial_dims, input_size)
        self.activation, self.mode = activation, LINEAR[spatial_dims]

        def mix(a: int, b: int, scans: bool) -> nn.Module:
            return ScaledMamba(a, b, _GROUPS, skip_norm=True) if scans else CONV[spatial_dims](a, b, 3, padding=1)

        widths = [in_channels, *features]
        stages = [
            nn.Sequential(mix(widths[s], widths[s + 1], s >= 3), nn.GroupNorm(_GROUPS, widths[s + 1]), MAX_POOL[spatial_dims](2), nn.GELU())
            for s in range(5)
        ]
        self.encoder = Encoder(nn.Identity(), stages, features[:5], [(2,) * spatial_dims] * 5)
        self.bottom = mix(features[4], features[5], True)
        self.bridge = _Bridge(features[:5], spatial_dims, attention) if bridge else None
        self.ups = nn.ModuleList(
            [nn.Sequential(mix(features[s + 1], features[s], s >= 2), nn.GroupNorm(_GROUPS, features[s])) for s in range(4, -1, -1)]
        )
        self.final = CONV[spatial_dims](features[0], out_channels, 1)

    def whole(self, x: Tensor) -> Tensor:
        """(b, in_channels, *spatial) -> (b, out_channels, *spatial)."""
        skips = self.encoder(x)
        x = gelu(self.bottom(skips[-1]))
        if self.bridge is not None:
            skips = self.bridge(skips)
        for level, (up, skip) in enumerate(zip(self.ups, reversed(skips), strict=True)):
            x = up(x)
            x = gelu(self._double(x) if level else x) + skip
        x = self._double(self.final(x))
        return torch.sigmoid(x) if self.activation else x

    def _double(self, x: Tensor) -> Tensor:
        return interpolate(x, scale_factor=2, mode=self.mode, align_corners=True)


class _Bridge(nn.Module):
    """Attention on all skips t: s = spatial(t) t; channel(s + t) (s + t) + s. The spatial kernel is shared by the levels, the channel weights
    of each level see the means of all."""

    def __init__(self, features: Sequence[int], spatial_dims: int, attention: str) -> None:
        super().__init__()
        only("attention", attention, "linear", "convolution")
        self.attention, self.spatial_dims, total = attention, spatial_dims, sum(features)
        self.spatial = CONV[spatial_dims](2, 1, 7, padding=9, dilation=3)
        self.means = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        layers = [nn.Linear(total, c) if attention == "linear" else nn.Conv1d(total, c, 1) for c in features]
        self.channels = nn.ModuleList(layers)

    def forward(self, skips: list[Tensor]) -> list[Tensor]:
        seen = [torch.sigmoid(self.spatial(torch.cat((t.mean(1, keepdim=True), t.amax(1, keepdim=True)), 1))) * t for t in skips]
        both = [s + t for s, t in zip(seen, skips, strict=True)]
        means = self.means(torch.cat([t.flatten(2).mean(-1) for t in both], 1)[:, None])[:, 0]
        out = []
        for layer, s, t in zip(self.channels, seen, both, strict=True):
            scale = torch.sigmoid(layer(means) if self.attention == "linear" else layer(means.unsqueeze(-1)).squeeze(-1))
            out.append(scale[(..., *[None] * self.spatial_dims)] * t + s)
        return out


MAP = Map(
    rename=(
        (r"^encoder6\.0\.", "bottom."),
        (r"^encoder(\d)\.0\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.0."),
        (r"^ebn(\d)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.1."),
        (r"^decoder(\d)\.0\.", lambda m: f"ups.{int(m[1]) - 1}.0."),
        (r"^dbn(\d)\.", lambda m: f"ups.{int(m[1]) - 1}.1."),
        (r"^scab\.satt\.shared_conv2d\.0\.", "bridge.spatial."),
        (r"^scab\.catt\.get_all_att\.", "bridge.means."),
        (r"^scab\.catt\.att(\d)\.", lambda m: f"bridge.channels.{int(m[1]) - 1}."),
    )
)


@register_upstream("ultralight_vmunet", map=MAP)
def upstream(
    *, num_classes: int = 1, input_channels: int = 3, c_list: Sequence[int] = (8, 16, 24, 32, 48, 64), split_att: str = "fc", bridge: bool = True
) -> UltraLightVMUNet:
    """UltraLight-VM-UNet from upstream's keywords, with its sigmoid."""
    return UltraLightVMUNet(
        in_channels=input_channels,
        out_channels=num_classes,
        features=c_list,
        bridge=bridge,
        attention="linear" if split_att == "fc" else "convolution",
        activation="sigmoid",
    )
