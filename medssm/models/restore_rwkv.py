"""Restore-RWKV (Yang et al., arXiv 2407.11087): a U-Net of Re-WKV blocks that restores images; 2D, here 3D too, and for segmentation.

What upstream's code does beside the paper, kept for its weights:
- The sum of the kernels of a shift has a weight of its own, which the first inference fills: `from_upstream` takes it and does not use it.
- Its kernels compute another formula than the paper's (ops.bi_wkv): `mode="upstream"`.
"""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from medssm.models.facts import Facts
from medssm.models.options import doubled, several
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn import Decoder, Encoder, UNet
from medssm.nn.blocks import CONV, ChannelsLast, check_dims
from medssm.nn.pixels import PixelDown, PixelUp
from medssm.nn.rerwkv import OmniShift, ReWKVBlock


@register_model(
    "restore_rwkv",
    facts=Facts(
        "2407.11087",
        "Yaziwel/Restore-RWKV",
        "Apache-2.0",
        small={"features": 4, "depths": (1, 1, 1), "refinement": 0},
        input=(1, 128, 128),
        classes=1,
    ),
)
class RestoreRWKV(UNet):
    """Restore-RWKV for any input size; (b, out_channels, *spatial) from (b, in_channels, *spatial).

    Args:
        features: channels at full resolution, doubled from stage to stage, or a list; a multiple of 4 in 3D. depths: blocks per stage, of encoder
            and decoder; the finest stage of the decoder has twice the channels and `refinement` more blocks.
        mode: of ops.bi_wkv; "upstream" for weights that the published kernels trained.
        residual: the input is added to the output, as restoration wants; needs one input channel or as many as output channels.
        input_size: "any" pads and crops inside, "strict" raises where the strides do not divide the input.
    """

    def __init__(
        self,
        *,
        spatial_dims: int = 2,
        in_channels: int = 1,
        out_channels: int = 1,
        features: int | Sequence[int] = 48,
        depths: Sequence[int] = (4, 6, 6, 8),
        refinement: int = 4,
        mode: str = "exact",
        residual: bool = False,
        input_size: str = "any",
    ) -> None:
        check_dims(spatial_dims)
        if residual and in_channels not in (1, out_channels):
            raise ValueError(
                f"residual: expected False, since {in_channels} input channels cannot be added to {out_channels} of the output, got True"
            )
        n, conv = len(depths), CONV[spatial_dims]
        several("depths", depths)
        features = doubled(features, n)

        def blocks(channels: int, depth: int) -> nn.Sequential:
            return nn.Sequential(*(ReWKVBlock(channels, spatial_dims, mode) for _ in range(depth)))

        stages: list[nn.Module] = [blocks(features[0], depths[0])]
        for (a, b), depth in zip(itertools.pairwise(features), depths[1:], strict=True):
            stages.append(nn.Sequential(OrderedDict(down=PixelDown(a, b, spatial_dims), blocks=blocks(b, depth))))
        stem = nn.Sequential(ChannelsLast(spatial_dims), conv(in_channels, features[0], 3, padding=1))
        encoder = Encoder(stem, stages, features, [(1,) * spatial_dims] + [(2,) * spatial_dims] * (n - 1))
        ups = [PixelUp(a, b, spatial_dims) for a, b in zip(features[:0:-1], features[-2::-1], strict=True)]
        joined = [
            nn.Sequential(OrderedDict(reduce=conv(2 * c, c, 1), blocks=blocks(c, depth)))
            for c, depth in zip(features[-2:0:-1], depths[-2:0:-1], strict=True)
        ]
        joined.append(nn.Sequential(OrderedDict(blocks=blocks(2 * features[0], depths[0]), refinement=blocks(2 * features[0], refinement))))
        head = conv(2 * features[0], out_channels, 3, padding=1)
        super().__init__(encoder, Decoder(ups, joined, [*[None] * (n - 2), head]), size=input_size)
        self.residual = residual

    def whole(self, x: Tensor) -> Tensor | list[Tensor]:
        y = super().whole(x)
        return x + y if self.residual and isinstance(y, Tensor) else y


MAP = Map(
    rename=(
        (r"\.omni_shift\.", ".shift."),
        (r"^patch_embed\.", "encoder.stem.1."),
        (r"^encoder_level1\.", "encoder.stages.0."),
        (r"^encoder_level([23])\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.blocks."),
        (r"^latent\.", "encoder.stages.3.blocks."),
        (r"^down\d_(\d)\.body\.0\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.down.conv."),
        (r"^up\d_(\d)\.body\.0\.", lambda m: f"decoder.upsample_layers.{3 - int(m[1])}.conv."),
        (r"^reduce_chan_level(\d)\.", lambda m: f"decoder.stages.{3 - int(m[1])}.reduce."),
        (r"^decoder_level(\d)\.", lambda m: f"decoder.stages.{3 - int(m[1])}.blocks."),
        (r"^refinement\.", "decoder.stages.2.refinement."),
        (r"^output\.", "decoder.seg_layers.2."),
    )
)


@register_upstream("restore_rwkv", map=MAP)
def upstream(
    *,
    inp_channels: int = 1,
    out_channels: int = 1,
    dim: int = 48,
    num_blocks: Sequence[int] = (4, 6, 6, 8),
    num_refinement_blocks: int = 4,
    loss_fun: Any = None,
    wkv_mode: str = "upstream",
) -> RestoreRWKV:
    """Restore-RWKV from upstream's keywords; loss_fun changes no output; wkv_mode, which upstream has not, is bi_wkv's mode."""
    model = RestoreRWKV(
        in_channels=inp_channels,
        out_channels=out_channels,
        features=dim,
        depths=num_blocks,
        refinement=num_refinement_blocks,
        mode=wkv_mode,
        residual=True,
    )
    for shift in [m for m in model.modules() if isinstance(m, OmniShift)]:
        shift.conv5x5_reparam = copy.deepcopy(shift.conv5x5)
    return model
