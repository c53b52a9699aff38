"""LightM-UNet (Liao et al., arXiv 2403.05246): SegResNet's shape with Mamba for its convolutions; 2D and 3D.

Parity is with upstream's code, whose blocks are Mamba (the paper says vision state space modules) and whose trainer's network has 5.0 million
parameters (the paper says one).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from medssm.models.facts import Facts, groups_of, widths
from medssm.models.options import only, per_stage
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn import Decoder, Encoder, UNet
from medssm.nn.blocks import CONV, LINEAR, MAX_POOL, check_dims
from medssm.nn.scaled import ScaledMamba

_DROPOUT: dict[int, Callable[[float], nn.Module]] = {2: nn.Dropout2d, 3: nn.Dropout3d}


@register_model(
    "lightm_unet",
    facts=Facts(
        "2403.05246",
        "MrBlankness/LightM-UNet",
        "Apache-2.0",
        small={"features": 8, "depths": (1, 1, 1), "decoder_depths": (1, 1)},
        of_width=lambda width, patch: {"features": widths(width, [1])[0], "groups": groups_of(widths(width, [1])[0])},
        parity="weight names; outputs to 0.1 of their deviation, see its tests",
    ),
)
def lightm_unet(
    *,
    spatial_dims: int = 3,
    in_channels: int = 1,
    out_channels: int = 2,
    features: int = 32,
    depths: Sequence[int] = (1, 2, 2, 4),
    decoder_depths: Sequence[int] = (1, 1, 1),
    groups: int = 8,
    dropout: float = 0.0,
    deep_supervision: bool = False,
    input_size: str = "any",
) -> UNet:
    """LightM-UNet for any input size; logits (b, out_channels, *spatial).

    Args:
        features: channels at full resolution, twice as many at each level below. depths: blocks per stage; decoder_depths: from coarse to fine.
        groups: of the group norms. dropout: of whole channels after the first convolution. deep_supervision: a list of logits, the highest
            resolution first. input_size: "any" pads and crops inside, "strict" raises.
    """
    check_dims(spatial_dims)
    n = len(depths)
    per_stage("decoder_depths", decoder_depths, n - 1)
    widths = [features * 2**s for s in range(n)]
    stem = nn.Sequential(_separable(in_channels, features, spatial_dims), _DROPOUT[spatial_dims](dropout))
    stages = []
    for s, (channels, depth) in enumerate(zip(widths, depths, strict=True)):
        down: list[nn.Module] = [nn.Sequential(ScaledMamba(widths[s - 1], channels), MAX_POOL[spatial_dims](2))] if s else [nn.Identity()]
        stages.append(nn.Sequential(*down, *(MambaBlock(channels, groups) for _ in range(depth))))
    encoder = Encoder(stem, stages, widths, [(1,) * spatial_dims] + [(2,) * spatial_dims] * (n - 1))
    ups, ups_stages, heads = [], [], []
    for s, depth in zip(range(n - 2, -1, -1), decoder_depths, strict=True):
        ups.append(
            nn.Sequential(
                CONV[spatial_dims](widths[s + 1], widths[s], 1, bias=False),
                nn.Upsample(scale_factor=2, mode=LINEAR[spatial_dims], align_corners=False),
            )
        )
        ups_stages.append(nn.Sequential(*(UpBlock(widths[s], spatial_dims, groups) for _ in range(depth))))
        head = nn.Sequential(nn.GroupNorm(groups, widths[s]), nn.ReLU(), _separable(widths[s], out_channels, spatial_dims, 1, bias=True))
        heads.append(head if deep_supervision or s == 0 else None)
    return UNet(encoder, Decoder(ups, ups_stages, heads, ["sum"] * (n - 1), deep_supervision), size=input_size)


def weight_map(blocks_up: Sequence[int] = (1, 1, 1), **_: object) -> Map:
    """Upstream's names, for upstream's keywords: the last convolutions are the head of the finest decoder level."""
    head = f"decoder.seg_layers.{len(blocks_up) - 1}"
    return Map(
        rename=(
            (r"^convInit\.(\d)\.conv\.", r"encoder.stem.0.\1."),
            (r"^down_layers\.", "encoder.stages."),
            (r"^up_samples\.(\d)\.0\.conv\.", r"decoder.upsample_layers.\1.0."),
            (r"^up_layers\.(\d)\.(.*)\.conv\.(\d)\.conv\.", r"decoder.stages.\1.\2.conv.\3."),
            (r"^up_layers\.", "decoder.stages."),
            (r"^conv_final\.2\.(\d)\.conv\.", rf"{head}.2.\1."),
            (r"^conv_final\.0\.", f"{head}.0."),
        )
    )


@register_upstream("lightm_unet", map=weight_map)
def upstream(
    *,
    spatial_dims: int = 3,
    init_filters: int = 8,
    in_channels: int = 1,
    out_channels: int = 2,
    dropout_prob: float | None = None,
    act: str | tuple[str, Mapping[str, Any]] = ("RELU", {"inplace": True}),
    norm: str | tuple[str, Mapping[str, Any]] = ("GROUP", {"num_groups": 8}),
    norm_name: str = "",
    num_groups: int = 8,
    use_conv_final: bool = True,
    blocks_down: Sequence[int] = (1, 2, 2, 4),
    blocks_up: Sequence[int] = (1, 1, 1),
    upsample_mode: Any = "nontrainable",
) -> UNet:
    """LightM-UNet from upstream's keywords, for ReLU, group norm, linear upsampling and a final convolution."""
    kind, options = (norm, {}) if isinstance(norm, str) else norm
    only("act", (act if isinstance(act, str) else act[0]).lower(), "relu")
    only("norm", (norm_name or kind).lower(), "group")
    only("use_conv_final", use_conv_final, True)
    only("upsample_mode", getattr(upsample_mode, "value", upsample_mode).lower(), "nontrainable")
    return lightm_unet(
        spatial_dims=spatial_dims,
        in_channels=in_channels,
        out_channels=out_channels,
        features=init_filters,
        depths=blocks_down,
        decoder_depths=blocks_up,
        groups=num_groups if norm_name else options.get("num_groups", 8),
        dropout=dropout_prob or 0.0,
    )


class MambaBlock(nn.Module):
    """x + mamba(act(norm(mamba(act(norm(x))))))."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, channels), nn.GroupNorm(groups, channels)
        self.conv1, self.conv2 = ScaledMamba(channels, channels), ScaledMamba(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        y: Tensor = self.conv2(relu(self.norm2(self.conv1(relu(self.norm1(x))))))
        return x + y


class UpBlock(nn.Module):
    """act(norm(conv(act(norm(x))) + scale x)) with a depthwise-separable convolution."""

    def __init__(self, channels: int, spatial_dims: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, channels), nn.GroupNorm(groups, channels)
        self.conv = _separable(channels, channels, spatial_dims)
        self.skip_scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        return relu(self.norm2(self.conv(relu(self.norm1(x))) + self.skip_scale * x))


def _separable(channels_in: int, channels: int, spatial_dims: int, kernel: int = 3, bias: bool = False) -> nn.Sequential:
    conv = CONV[spatial_dims]
    depthwise = conv(channels_in, channels_in, kernel, padding=kernel // 2, groups=channels_in, bias=bias)
    return nn.Sequential(depthwise, conv(channels_in, channels, 1, bias=bias))
