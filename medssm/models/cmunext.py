"""CMUNeXt (Tang et al., arXiv 2308.01239): large depthwise kernels, and skips mixed by grouped convolutions; 2D, here 3D too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from medssm.models.facts import Facts
from medssm.models.options import per_stage, preset
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn import Decoder, Encoder, UNet
from medssm.nn.blocks import BATCH_NORM, CONV, LINEAR, MAX_POOL, ChannelsLast, check_dims, depthwise, image, tokens


class Size(NamedTuple):
    """features, depths, kernels: channels, blocks and the side of their depthwise kernels, per stage."""

    features: Sequence[int]
    depths: Sequence[int]
    kernels: Sequence[int]


SIZES = {
    "small": Size((8, 16, 32, 64, 128), (1, 1, 1, 1, 1), (3, 3, 7, 7, 9)),
    "base": Size((16, 32, 128, 160, 256), (1, 1, 1, 3, 1), (3, 3, 7, 7, 7)),
    "large": Size((32, 64, 128, 256, 512), (1, 1, 1, 6, 3), (3, 3, 7, 7, 7)),
}


@register_model(
    "cmunext",
    facts=Facts(
        "2308.01239",
        "FengheTan9/CMUNeXt",
        "MIT",
        small={"features": (4, 4, 8, 8), "depths": (1, 1, 1, 1), "kernels": (3, 3, 5, 5)},
        sizes=tuple(SIZES),
        input=(3, 256, 256),
    ),
)
def cmunext(
    *,
    spatial_dims: int = 2,
    in_channels: int = 3,
    out_channels: int = 1,
    size: str = "base",
    features: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    kernels: Sequence[int] | None = None,
    deep_supervision: bool = False,
    input_size: str = "any",
) -> UNet:
    """CMUNeXt for any input size; logits (b, out_channels, *spatial).

    Args:
        size: "small", "base" (3.1 M parameters in 2D) or "large": presets of features (channels per stage, from full resolution down, each stage at
            half the resolution of the one before), depths (blocks) and kernels (odd sides of their depthwise convolutions).
        deep_supervision: a list of logits, the highest resolution first. input_size: "any" pads and crops inside, "strict" raises.
    """
    check_dims(spatial_dims)
    chosen = preset(SIZES, size, features=features, depths=depths, kernels=kernels)
    widths = list(chosen.features)
    depths = per_stage("depths", chosen.depths, len(widths))
    kernels = per_stage("kernels", chosen.kernels, len(widths))
    levels, stages, ups, fusions, heads = len(widths), [], [], [], []
    for s, (depth, kernel) in enumerate(zip(depths, kernels, strict=True)):
        above = widths[max(s - 1, 0)]
        blocks = nn.Sequential(*(LargeKernelBlock(above, kernel, spatial_dims) for _ in range(depth)))
        stages.append(nn.Sequential(MAX_POOL[spatial_dims](2) if s else nn.Identity(), blocks, *_conv(above, widths[s], spatial_dims)))
    for s in range(levels - 2, -1, -1):
        width, conv = widths[s], CONV[spatial_dims]
        ups.append(nn.Sequential(nn.Upsample(scale_factor=2, mode=LINEAR[spatial_dims]), *_conv(widths[s + 1], width, spatial_dims)))
        mix = conv(2 * width, 2 * width, 3, padding=1, groups=2)  # the skip and the level below apart
        fusions.append(nn.Sequential(mix, nn.GELU(), BATCH_NORM[spatial_dims](2 * width), *_pointwise(2 * width, 4 * width, width, spatial_dims)))
        heads.append(conv(width, out_channels, 1) if deep_supervision or s == 0 else None)
    encoder = Encoder(
        nn.Sequential(*_conv(in_channels, widths[0], spatial_dims), ChannelsLast(spatial_dims)),
        stages,
        widths,
        [(1,) * spatial_dims] + [(2,) * spatial_dims] * (levels - 1),
    )
    return UNet(encoder, Decoder(ups, fusions, heads, ["before"] * (levels - 1), deep_supervision), None, input_size)


class LargeKernelBlock(nn.Module):
    """A depthwise convolution, GELU and a batch norm around which x goes, then two 1 x 1 convolutions, to four times the channels and back."""

    def __init__(self, channels: int, kernel: int, spatial_dims: int) -> None:
        super().__init__()
        self.conv = CONV[spatial_dims](channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.norm = BATCH_NORM[spatial_dims](channels)
        self.mix = nn.Sequential(*_pointwise(channels, 4 * channels, channels, spatial_dims))

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        y: Tensor = self.mix(x + self.norm(nn.functional.gelu(image(depthwise(self.conv, tokens(x))))))
        return y


def _conv(channels_in: int, channels: int, dims: int) -> list[nn.Module]:
    return [CONV[dims](channels_in, channels, 3, padding=1), BATCH_NORM[dims](channels), nn.ReLU()]


def _pointwise(channels_in: int, hidden: int, channels: int, dims: int) -> list[nn.Module]:
    steps = ((channels_in, hidden), (hidden, channels))
    return [layer for a, b in steps for layer in (CONV[dims](a, b, 1), nn.GELU(), BATCH_NORM[dims](b))]


MAP = Map(
    rename=(
        (r"^stem\.conv\.", "encoder.stem."),
        (r"^encoder(\d)\.up\.conv\.(\d)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.{int(m[2]) + 2}."),
        (r"^encoder(\d)\.block\.(\d+)\.0\.fn\.([02])\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.1.{m[2]}.{ {'0': 'conv', '2': 'norm'}[m[3]] }."),
        (r"^encoder(\d)\.block\.(\d+)\.(\d)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.1.{m[2]}.mix.{int(m[3]) - 1}."),
        (r"^Up(\d)\.up\.", lambda m: f"decoder.upsample_layers.{5 - int(m[1])}."),
        (r"^Up_conv(\d)\.conv\.", lambda m: f"decoder.stages.{5 - int(m[1])}."),
        (r"^Conv_1x1\.", "decoder.seg_layers.3."),
    )
)


def _register(name: str, chosen: Size) -> None:
    @register_upstream(name, map=MAP)
    def upstream(
        *,
        input_channel: int = 3,
        num_classes: int = 1,
        dims: Sequence[int] = chosen.features,
        depths: Sequence[int] = chosen.depths,
        kernels: Sequence[int] = chosen.kernels,
    ) -> UNet:
        """CMUNeXt from upstream's keywords; a name for each of its sizes."""
        return cmunext(in_channels=input_channel, out_channels=num_classes, features=dims, depths=depths, kernels=kernels)


for _name, _size in {"cmunext": "base", "cmunext_s": "small", "cmunext_l": "large"}.items():
    _register(_name, SIZES[_size])
