"""UNETR++ (Shaker et al., arXiv 2212.04497), here in 2D too and for any size: blocks of efficient paired attention and convolutions, in a U.

What upstream's code does beside the paper, kept for its weights:
- Positions and the projections along the voxels have the size of the training patch, and other sizes are refused. Here they are interpolated.
- The output of the attention over space is read in a wrong order, which mixes its voxels and channels: `create_model` leaves this out.
- Each data set has a network of its own. Synapse's is the paper's; ACDC's and Lung's project keys and values apart and have twice the convolutions;
  Tumor's adds both attentions instead of mixing half the channels from each, and projects without a bias.
- The encoder's input channels are those of the data set, and `num_heads` and `depths` do not reach the decoder, which has 4 and 3.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from medssm.models.facts import Facts, groups_of, widths
from medssm.models.options import only, per_stage, sides
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn import Decoder, Encoder, UNet
from medssm.nn.blocks import CONV, TRANSPOSED_CONV, check_dims
from medssm.nn.epa import PairedBlock
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
    conv, up, n = CONV[spatial_dims], TRANSPOSED_CONV[spatial_dims], len(features)
    up_depths, tokens = per_stage("decoder_depths", decoder_depths, n - 1), per_stage("projected", projected, n)
    heads_down, heads_up = [heads] * 2 if isinstance(heads, int) else heads
    strides = [tuple(sides("patch", patch, spatial_dims)), *[(2,) * spatial_dims] * (n - 1)]
    whole = [math.prod(axis) for axis in zip(*strides, strict=True)]
    image = [math.ceil(a / b) * b for a, b in zip(sides("image_size", image_size, spatial_dims), whole, strict=True)]

    def stage(s: int, depth: int, heads: int) -> nn.Sequential:
        grid = [a // b // 2**s for a, b in zip(image, strides[0], strict=True)]
        options = {"spatial_dims": spatial_dims, "dropout": dropout, "blocks": blocks, **(attention or {})}
        return nn.Sequential(*(PairedBlock(features[s], grid, heads, tokens[s], **options) for _ in range(depth)))

    stages = []
    for s, (a, b) in enumerate(itertools.pairwise([in_channels, *features])):
        down = nn.Sequential(conv(a, b, strides[s], strides[s], bias=False), nn.GroupNorm(groups_of(b, a), b))
        stages.append(nn.Sequential(OrderedDict(down=down, blocks=stage(s, depths[s], heads_down))))
    encoder = Encoder(nn.Identity(), stages, features, strides)
    outs, levels = [features[0] // 2, *features], range(n - 1, -1, -1)
    ups = [up(outs[s + 1], outs[s], strides[s], strides[s], bias=False) for s in levels]
    up_stages: list[nn.Module] = [stage(s - 1, depth, heads_up) for s, depth in zip(levels, up_depths, strict=False)]
    up_stages.append(ResidualBlock(outs[0], outs[0], spatial_dims, norm=norm))
    seg_layers = [conv(outs[s], out_channels, 1) if s < (3 if deep_supervision else 1) else None for s in levels]
    skips = [ResidualBlock(in_channels, outs[0], spatial_dims, norm=norm), *(nn.Identity() for _ in range(n))]
    return UNet(encoder, Decoder(ups, up_stages, seg_layers, ["sum"] * n, deep_supervision), size=input_size, skips=skips)


_APART, _SUM = {"shared": False}, {"bias": False, "fusion": "sum"}
DATA: dict[str, tuple[int, Sequence[int], Sequence[int], dict[str, Any], int]] = {  # in_channels, patch, image_size, attention, blocks
    "synapse": (1, (2, 4, 4), (64, 128, 128), {}, 1),
    "acdc": (1, (1, 4, 4), (16, 160, 160), _APART, 2),
    "lung": (1, (1, 4, 4), (32, 192, 192), _APART, 2),
    "tumor": (4, (4, 4, 4), (128, 128, 128), _SUM, 1),
}
_TRANSPOSE = (r"\bepa_block\.[EF]\.weight$",)
_BLOCK = (
    (r"\bepa_block\.EF$", "epa.projections.E"),
    (r"\bepa_block\.([EF])\.weight$", r"epa.projections.\1"),
    (r"\bepa_block\.([EF])\.bias$", r"epa.biases.\1"),
    (r"\bepa_block\.", "epa."),
    (r"\bconv5(\d)\.", lambda m: f"local.{int(m[1]) - 1}."),
    (r"\bconv8\.", "out."),
    (r"\b(conv\d|transp_conv|conv)\.conv\.", r"\1."),
)
_NETWORK = (
    *_BLOCK,
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
    channels, patch, size, attention, blocks = DATA[data]
    features = [feature_size * 2**s for s in range(1, 5)]
    only("in_channels", in_channels, channels)
    only("dims", None if dims is None else list(dims), features)
    only("hidden_size", hidden_size, features[-1])
    only("img_size: voxels", math.prod(img_size or size), math.prod(size))
    return unetr_pp(
        in_channels=in_channels,
        out_channels=out_channels,
        features=features,
        depths=depths or (3, 3, 3, 3),
        heads=(num_heads, 4),
        blocks=blocks,
        patch=patch,
        image_size=img_size or size,
        norm=norm_name,
        attention={**attention, "scrambled": True},
        deep_supervision=do_ds,
    )


_TWICE = (r"\bepa_block\.F\.",)  # E again, where keys and values are projected alike
for _data in DATA:
    register_upstream(f"unetr_pp_{_data}", builder=partial(upstream, _data), map=Map(_TWICE if _data == "synapse" else (), _NETWORK, _TRANSPOSE))


@register_upstream("unetr_pp_block", map=Map(_TWICE, _BLOCK, _TRANSPOSE))
def upstream_block(input_size: int, hidden_size: int, proj_size: int, num_heads: int, dropout_rate: float = 0, pos_embed: bool = True) -> PairedBlock:
    """Upstream's TransformerBlock for Synapse: (b, hidden_size, *spatial) of input_size voxels."""
    only("pos_embed", pos_embed, True)
    return PairedBlock(hidden_size, (input_size,), num_heads, proj_size, dropout=dropout_rate, scrambled=True)
