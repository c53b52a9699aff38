"""Zig-RiR (Chen et al., IEEE TMI 2025): RWKV on patches of the image, nested with RWKV on their parts; 2D and 3D.

What upstream's code does beside the paper, kept for its weights:
- The outputs of a mix stay in the order of its walk, and its second pass takes the first one's order for voxels: `from_upstream` alone does so.
- Weights that it does not use: depthwise convolutions in the mixes, positions: `from_upstream` has them, `create_model` not.
- Its kernels compute another formula than the paper's (ops.bi_wkv): `mode="upstream"`. Its 3D network mixes slices laid out as one square
  image; `create_model` is three-dimensional throughout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from medssm.models.facts import Facts
from medssm.models.options import doubled, only, per_stage, several
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn import Decoder, UNet
from medssm.nn.blocks import BATCH_NORM, CONV, LINEAR, TRANSPOSED_CONV, check_dims
from medssm.nn.vss import start_linears
from medssm.nn.zigrir import SIDE, Mix, RiREncoder, UpConv
from medssm.nn.zigzag import ScrambledMix, zigzag_mix


@register_model(
    "zigrir",
    facts=Facts(
        "10.1109/TMI.2025.3561797",
        "txchen-USTC/Zig-RiR",
        "Apache-2.0",
        small={"features": (4, 8), "depths": (1, 1), "inner": 2},
        input=(3, 256, 256),
        parity="parameter and key counts; outputs of upstream's class around ops.bi_wkv",
    ),
)
def zigrir(
    *,
    spatial_dims: int = 2,
    in_channels: int = 3,
    out_channels: int = 1,
    features: int | Sequence[int] = (32, 64, 128, 256),
    depths: Sequence[int] = (2, 4, 9, 2),
    inner: int = 4,
    mode: str = "exact",
    drop_path: float = 0.0,
    input_size: str = "any",
) -> UNet:
    """Zig-RiR for any input size; logits (b, out_channels, *spatial).

    Args:
        features: channels of the sentences per stage, the first one's doubled if a number; stage s works at 1/2^(s+3) of the resolution.
        depths: blocks per stage. inner: channels of the words of the first stage, doubled from stage to stage.
        mode: of ops.bi_wkv; "upstream" for weights that the published kernels trained. drop_path: stochastic depth at the encoder's last block.
        input_size: "any" pads and crops inside, "strict" raises where 8 2^(stages - 1) does not divide the input.
    """
    return _build(spatial_dims, in_channels, out_channels, features, depths, inner, mode, zigzag_mix, drop_path, input_size)


def _build(
    dims: int,
    in_channels: int,
    classes: int,
    features: int | Sequence[int],
    depths: Sequence[int],
    inner: int,
    mode: str,
    mix: Mix,
    drop_path: float = 0.0,
    size: str = "any",
) -> UNet:
    check_dims(dims)
    widths = doubled(features, len(depths))
    n = len(widths)
    per_stage("depths", depths, n)
    several("features", widths)
    conv, norm = CONV[dims], BATCH_NORM[dims]
    ups = [TRANSPOSED_CONV[dims](a, b, 2, 2) for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True)]
    stages = [nn.Sequential(conv(2 * c, c, 3, padding=1), norm(c), nn.ReLU()) for c in widths[-2::-1]]
    head = nn.Sequential(conv(widths[0], classes, 1, bias=False), Quadruple(dims))
    encoder = RiREncoder(in_channels, widths, inner, depths, dims, mode, mix, drop_path)
    model = UNet(encoder, Decoder(ups, stages, [*[None] * (n - 2), head]), size=size, skips=[UpConv(c, dims) for c in widths])
    start_linears(model)
    return model


class Quadruple(nn.Module):
    """Four times the resolution by linear interpolation between the corners."""

    def __init__(self, spatial_dims: int) -> None:
        super().__init__()
        self.mode = LINEAR[spatial_dims]

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, *spatial) -> (b, c, *(4 spatial))."""
        return interpolate(x, scale_factor=4.0, mode=self.mode, align_corners=True)


MAP = Map(
    rename=(
        (r"^RiR_backbone\.patch_embed\.", "encoder.stem."),
        (r"^RiR_backbone\.(word|sentence)_merges\.(\d)\.norm\.", lambda m: f"encoder.stages.{int(m[2]) + 1}.{m[1]}s.0."),
        (r"^RiR_backbone\.(word|sentence)_merges\.(\d)\.conv\.0\.", lambda m: f"encoder.stages.{int(m[2]) + 1}.{m[1]}s.1."),
        (r"^RiR_backbone\.up_blocks\.(\d)\.transposed_conv\.", r"skips.\1.0."),
        (r"^RiR_backbone\.up_blocks\.(\d)\.batch_norm1\.", r"skips.\1.1."),
        (r"^RiR_backbone\.up_blocks\.(\d)\.conv\.", r"skips.\1.3."),
        (r"^RiR_backbone\.up_blocks\.(\d)\.batch_norm2\.", r"skips.\1.4."),
        (r"^RiR_backbone\.", "encoder."),
        (r"^decode([2-4])\.up\.", lambda m: f"decoder.upsample_layers.{4 - int(m[1])}."),
        (r"^decode([2-4])\.conv_bn_relu\.", lambda m: f"decoder.stages.{4 - int(m[1])}."),
        (r"^decode0\.1\.", "decoder.seg_layers.2.0."),
    )
)


@register_upstream("zigrir", map=MAP)
def upstream(channels: Sequence[int], num_classes: int, img_size: int = 512, in_chans: int = 3, wkv_mode: str = "upstream") -> UNet:
    """Zig-RiR from the keywords of upstream's 2D class ZRiR; img_size is of positions that it does not add. wkv_mode, which upstream has not, is
    bi_wkv's mode."""
    only("the number of channels", len(channels), 4)
    model = _build(2, in_chans, num_classes, channels, (2, 4, 9, 2), 4, wkv_mode, ScrambledMix)
    model.encoder.pos_embed_sentence = nn.Parameter(torch.zeros(1, (img_size // 8) ** 2, channels[0]))
    model.encoder.pos_embed_word = nn.Parameter(torch.zeros(1, SIDE**2, 4))
    return model
