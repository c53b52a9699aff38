"""nnMamba (Gong et al., arXiv 2402.03526): a residual network whose blocks add what one Mamba makes of their input in four directions, and a
convolutional decoder with gated skips; 3D, here 2D too. `nnmamba_cls` classifies.

What upstream's code does beside the paper, kept for its weights:
- The directions are the tokens forward and backward and the channels forward and backward; the blocks of a stage share one layer of Mamba.
- The logits are those of a last norm and ReLU, at least 0. `create_model` has a 1 x 1 convolution there, and deep supervision.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from medssm.models.facts import Facts, widths
from medssm.models.options import doubled
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn import Decoder, Encoder, FlipMamba, UNet
from medssm.nn.attention import ChannelAttention
from medssm.nn.blocks import CONV, LINEAR, ChannelLinear, ChannelsLast, ConvNorm, check_dims, image, tokens
from medssm.nn.resnet import RELU, BasicBlock, double_conv

SOURCE = ("2402.03526", "lhaof/nnMamba", "none given")


@register_model(
    "nnmamba", facts=Facts(*SOURCE, small={"features": (4, 8), "blocks": 2}, of_width=lambda width, _: {"features": widths(width, (1, 2, 4, 8))})
)
def nnmamba(
    *,
    spatial_dims: int = 3,
    in_channels: int = 1,
    out_channels: int = 2,
    features: Sequence[int] = (32, 64, 128, 256),
    blocks: int = 3,
    deep_supervision: bool = False,
    input_size: str = "any",
) -> UNet:
    """nnMamba for segmentation, for any input size; logits (b, out_channels, *spatial).

    Args:
        features: channels per stage, at 1/2, 1/4, … of the resolution. blocks: residual blocks of each stage but the first.
        deep_supervision: a list of logits at 1, 1/2, 1/4 and 1/8. input_size: "any" pads and crops inside, "strict" raises.
    """
    first = double_conv(in_channels, features[0], spatial_dims, 2)
    encoder = halving_encoder(
        [first, *(Stage(a, b, blocks, spatial_dims, scans=True) for a, b in itertools.pairwise(features))], features, spatial_dims
    )
    gates = [ChannelAttention(c, max(1, c // 16), ChannelLinear) for c in features[:-1]]
    coarse = [*features[:0:-1], features[0]]
    levels = [double_conv(a + b, b, spatial_dims) for a, b in itertools.pairwise(coarse)] + [double_conv(features[0], features[0], spatial_dims)]
    n, ups = len(levels), [nn.Upsample(scale_factor=2, mode=LINEAR[spatial_dims]) for _ in levels]
    heads = [CONV[spatial_dims](c, out_channels, 1) if deep_supervision or s == n - 1 else None for s, c in enumerate([*coarse[1:], features[0]])]
    joins = [True] * (n - 1) + [False]  # the last level is the image's, which has no skip
    return UNet(encoder, Decoder(ups, levels, heads, joins, deep_supervision), size=input_size, skips=[*gates, nn.Identity()])


class MambaLayer(nn.Module):
    """relu(norm2(nin2(t + mamba(t)))), t = relu(norm(nin(x))), on (b, channels, *spatial); nin, nin2: 1 x 1 convolutions, with batch norms."""

    def __init__(self, channels: int, mamba: nn.Module, spatial_dims: int) -> None:
        super().__init__()
        self.nin, self.nin2 = (ConvNorm(channels, channels, 1, spatial_dims=spatial_dims, act=RELU) for _ in range(2))
        self.mamba = mamba

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, *spatial) -> the same shape."""
        t = tokens(self.nin(x))
        y: Tensor = self.nin2(image(t + self.mamba(t)))
        return y


class Stage(nn.Module):
    """A block that halves the resolution, then blocks to which, with scans, one layer of Mamba adds what it makes of their input."""

    def __init__(self, channels_in: int, channels: int, blocks: int, spatial_dims: int, scans: bool) -> None:
        super().__init__()
        more = [BasicBlock(None, channels, spatial_dims) for _ in range(blocks - 1)]
        self.blocks = nn.ModuleList([BasicBlock(channels_in, channels, spatial_dims, 2), *more])
        self.mamba = MambaLayer(channels, FlipMamba(channels), spatial_dims) if scans and more else None

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels_in, *spatial) -> (b, channels, *(spatial / 2))."""
        for i, block in enumerate(self.blocks):
            x = block(x, self.mamba(x) if i and self.mamba is not None else None)
        return x


def halving_encoder(stages: Sequence[nn.Module], features: Sequence[int], spatial_dims: int) -> Encoder:
    """An encoder of stages that halve the resolution, each with `features` channels."""
    check_dims(spatial_dims)
    return Encoder(ChannelsLast(spatial_dims), stages, features, [(2,) * spatial_dims] * len(features))


DOUBLE_CONV = {"0": "0.conv", "1": "0.norm", "3": "1.conv", "4": "1.norm"}
STAGES = (
    (r"(mamba_layer\w*)\.nin(2?)\.", r"\1.nin\2.conv."),
    (r"(mamba_layer\w*)\.norm(2?)\.", r"\1.nin\2.norm."),
    (r"\.downsample\.0\.", ".down.conv."),
    (r"\.downsample\.1\.", ".down.norm."),
    (r"^(layer.*)\.conv([12])\.", r"\1.conv\2.conv."),
    (r"^(layer.*)\.bn([12])\.", r"\1.conv\2.norm."),
    (r"^layer(\d)\.1\.mamba_layer\.", r"encoder.stages.\1.mamba."),
    (r"^layer(\d)\.", r"encoder.stages.\1.blocks."),
)
MAP = Map(
    drop=(r"^layer\d\.([2-9]|\d\d+)\.mamba_layer\.",),  # the blocks of a stage share it
    rename=(
        *STAGES,
        (r"^in_conv\.conv\.(\d)\.", lambda m: f"encoder.stages.0.{DOUBLE_CONV[m[1]]}."),
        (r"^conv(\d)\.conv\.(\d)\.", lambda m: f"decoder.stages.{int(m[1]) - 5}.{DOUBLE_CONV[m[2]]}."),
        (r"^att(\d)\.layer", lambda m: f"skips.{int(m[1]) - 1}.fc"),
    ),
)


@register_upstream("nnmamba", map=MAP)
def upstream(in_ch: int = 1, channels: int = 32, blocks: int = 3, number_classes: int = 6) -> UNet:
    """nnMamba from the keywords of upstream's nnMambaSeg."""
    model = nnmamba(in_channels=in_ch, out_channels=number_classes, features=doubled(channels, 4), blocks=blocks)
    model.decoder.stages[-1], model.decoder.seg_layers[-1] = double_conv(channels, number_classes, 3), nn.Identity()
    return model
