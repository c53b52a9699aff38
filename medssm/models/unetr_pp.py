"""UNETR++ (Shaker et al., arXiv 2212.04497), here in 2D too and for any size: blocks of efficient paired attention and convolutions, in a U.

What upstream's code does beside the paper, kept for its weights:
- Positions and the projections along the voxels have the size of the training patch, and other sizes are refused. Here they are interpolated.
- The output of the attention over space is read in a wrong order, which mixes its voxels and channels: `create_model` leaves this out.
- Each data set has a network of its own. Synapse's is the paper's; ACDC's and Lung's project keys and values apart and have twice the convolutions;
  Tumor's adds both attentions instead of mixing half the channels from each, and projects without a bias.
- The encoder's input channels are those of the data set, and `num_heads` and `depths` do not reach the decoder, which has 4 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from medssm.models import mixers
from medssm.models.facts import Facts, widths
from medssm.models.options import only, per_stage, sides
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn import Decoder, UNet
from medssm.nn.blocks import check_dims
from medssm.nn.paired_unet import paired_decoder, paired_encoder, paired_stages
from medssm.nn.unetr import ResidualBlock


@register_model(
    "unetr_pp",
    facts=Facts(
        "2212.04497",
        "Amshaker/unetr_plus_plus",
        "Apache-2.0",
        small={"features": (8, 16), "depths": (1, 1), "decoder_depths": (1,), "heads": 2, "projected": (4, 4), "image_size": 32},
        input=(1, 128, 128, 128),
        from_plan=lambda plan, given: {"image_size": plan.patch},
        of_width=lambda width, patch: {"features": [4 * w for w in widths(width / 4, (2, 4, 8, 16))], "image_size": patch},
    ),
)
def unetr_pp(
    *,
    spatial_dims: int = 3,
    in_channels: int = 1,
    out_channels: int = 2,
    features: Sequence[int] = (32, 64, 128, 256),
    depths: Sequence[int] = (3, 3, 3, 3),
    decoder_depths: Sequence[int] = (3, 3, 3),
    heads: int | Sequence[int] = 4,
    projected: Sequence[int] = (64, 64, 64, 32),
    blocks: int = 1,
    patch: int | Sequence[int] = 4,
    image_size: int | Sequence[int] = 128,
    dropout: float = 0.15,
    norm: str = "instance",
    attention: Mapping[str, Any] | None = None,
    deep_supervision: bool = False,
    input_size: str = "any",
) -> UNet:
    """UNETR++ for any input size; logits (b, out_channels, *spatial).

    Args:
        features, depths: channels and paired blocks per stage, the first at 1/patch of the resolution; the image's own has half of its channels.
        decoder_depths: paired blocks per level, from coarse to fine, one entry fewer. heads: of the attentions, or of encoder and decoder.
        projected: tokens per stage that the attention over space makes of the voxels. blocks: of convolutions in every paired block.
        image_size: what positions and projections are learned for, rounded up to what the strides divide; for other sizes they are interpolated.
        dropout: of the attentions. attention: more options of medssm.nn.PairedAttention. norm: at full resolution, "instance" or "batch".
        deep_supervision: a list of the logits of the three finest levels, the finest first.
        input_size: "any" pads and crops inside, "strict" raises where patch * 2^(stages - 1) does not divide the input.
    """
    check_dims(spatial_dims)
    only("norm", norm, "instance", "batch")
    n = len(features)
    heads_down, heads_up = [heads] * 2 if isinstance(heads, int) else heads
    strides = [tuple(sides("patch", patch, spatial_dims)), *[(2,) * spatial_dims] * (n - 1)]
    whole = [math.prod(axis) for axis in zip(*strides, strict=True)]
    image = [math.ceil(a / b) * b for a, b in zip(sides("image_size", image_size, spatial_dims), whole, strict=True)]
    grids = [[a // b // 2**s for a, b in zip(image, strides[0], strict=True)] for s in range(n)]
    options = {"spatial_dims": spatial_dims, "dropout": dropout, "blocks": blocks, **(attention or {})}
    stage = paired_stages(features, grids, per_stage("projected", projected, n), **options)
    encoder = paired_encoder(in_channels, features, depths, heads_down, strides, stage)
    up_depths, levels = per_stage("decoder_depths", decoder_depths, n - 1), 3 if deep_supervision else 1
    decoder = Decoder(**paired_decoder(features, out_channels, up_depths, heads_up, strides, stage, levels, norm), deep_supervision=deep_supervision)
    skips = [ResidualBlock(in_channels, features[0] // 2, spatial_dims, norm=norm), *(nn.Identity() for _ in range(n))]
    return UNet(encoder, decoder, size=input_size, skips=skips)


_PAPER: dict[str, Any] = {"scrambled": True}
_APART, _SUM = {**_PAPER, "shared": False}, {**_PAPER, "bias": False, "fusion": "sum"}
DATA: dict[str, dict[str, Any]] = {
    "synapse": {"in_channels": 1, "patch": (2, 4, 4), "image_size": (64, 128, 128), "attention": _PAPER},
    "acdc": {"in_channels": 1, "patch": (1, 4, 4), "image_size": (16, 160, 160), "attention": _APART, "blocks": 2},
    "lung": {"in_channels": 1, "patch": (1, 4, 4), "image_size": (32, 192, 192), "attention": _APART, "blocks": 2},
    "tumor": {"in_channels": 4, "patch": (4, 4, 4), "image_size": (128, 128, 128), "attention": _SUM},
}
_NETWORK = (
    *mixers.PAIRED,
    (r"^unetr_pp_encoder\.downsample_layers\.(\d)\.(\d)\.(conv\.)?", r"encoder.stages.\1.down.\2."),
    (r"^unetr_pp_encoder\.stages\.(\d)\.", r"encoder.stages.\1.blocks."),
    (r"^encoder1\.", "skips.0."),
    (r"^decoder(\d)\.transp_conv\.", lambda m: f"decoder.upsample_layers.{5 - int(m[1])}."),
    (r"^decoder(\d)\.decoder_block\.0\.", lambda m: f"decoder.stages.{5 - int(m[1])}."),
    (r"^out(\d)\.conv\.", lambda m: f"decoder.seg_layers.{4 - int(m[1])}."),
)


def upstream(
    data: str,
    *,
    in_channels: int,
    out_channels: int,
    img_size: Sequence[int] | None = None,
    feature_size: int = 16,
    hidden_size: int = 256,
    num_heads: int = 4,
    pos_embed: str = "perceptron",
    norm_name: str = "instance",
    dropout_rate: float = 0.0,
    depths: Sequence[int] | None = None,
    dims: Sequence[int] | None = None,
    conv_op: object = None,
    do_ds: bool = True,
) -> UNet:
    """Upstream's UNETR_PP for a data set; img_size may have other edges, not more voxels; pos_embed, dropout_rate, conv_op change nothing."""
    options, features = DATA[data], [feature_size * 2**s for s in range(1, 5)]
    size = img_size or options["image_size"]
    only("in_channels", in_channels, options["in_channels"])
    only("dims", None if dims is None else list(dims), features)
    only("hidden_size", hidden_size, features[-1])
    only("img_size: voxels", math.prod(size), math.prod(options["image_size"]))
    return unetr_pp(
        **{**options, "image_size": size},
        out_channels=out_channels,
        features=features,
        depths=depths or (3, 3, 3, 3),
        heads=(num_heads, 4),
        norm=norm_name,
        deep_supervision=do_ds,
    )


for _data in DATA:
    _repeated = mixers.TWICE if _data == "synapse" else ()
    register_upstream(f"unetr_pp_{_data}", builder=partial(upstream, _data), map=Map(_repeated, _NETWORK, mixers.TRANSPOSED))
