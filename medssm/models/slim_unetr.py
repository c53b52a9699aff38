"""Slim UNETR (Pang et al., IEEE TMI 2023), here in 2D too and for any size: depthwise convolutions, and attention among every r-th voxel.

What upstream's code does beside the paper, kept for its weights:
- The attention has no scale, and the logits go through a group norm, whose statistics are those of the whole volume.
- After the coarsest stage come positions of the training's grid, and other sizes are refused. Here they are interpolated.
- The decoder reads the coarsest map in a wrong order, which mixes its voxels and channels: `create_model` leaves this out.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import nn

from medssm.models.facts import Facts
from medssm.models.options import per_stage, within
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn import Decoder, Encoder, UNet
from medssm.nn.blocks import CONV, TRANSPOSED_CONV, ChannelsLast, check_dims
from medssm.nn.slim import Middle, SlimBlock


@register_model(
    "slim_unetr",
    facts=Facts(
        "10.1109/TMI.2023.3326188",
        "aigzhusmart/Slim-UNETR",
        "MIT",
        small={"features": (8, 16), "depths": (1, 1), "heads": (1, 2), "sparsity": (2, 1), "grid": 2},
        input=(4, 128, 128, 128),
        classes=3,
    ),
)
def slim_unetr(
    *,
    spatial_dims: int = 3,
    in_channels: int = 4,
    out_channels: int = 3,
    features: Sequence[int] = (24, 48, 60, 96),
    depths: Sequence[int] = (1, 2, 3, 2),
    heads: Sequence[int] = (1, 2, 4, 4),
    sparsity: Sequence[int] = (4, 2, 2, 1),
    grid: int | Sequence[int] = 4,
    dropout: float = 0.3,
    scrambled: bool = False,
    input_size: str = "any",
) -> UNet:
    """Slim UNETR for any input size; logits (b, out_channels, *spatial).

    Args:
        features, depths, heads: channels, blocks and attention heads per stage, at 1/4, 1/8, … of the resolution; the decoder mirrors them.
        sparsity: of every so many voxels along an axis one takes part in the attention.
        grid: the coarsest map of the training, an edge or one per axis, for which positions are learned; of 128 voxels it has 4. For another they are
            interpolated. A list of one number is the number of its voxels: the positions then fit every grid of so many.
        dropout: behind them. scrambled: read the coarsest map in upstream's wrong order. input_size: "any" pads and crops inside, "strict" raises.
    """
    check_dims(spatial_dims)
    n, strides = len(features), [4, *[2] * (len(features) - 1)]
    depths, heads, sparsity = (per_stage(name, value, n) for name, value in (("depths", depths), ("heads", heads), ("sparsity", sparsity)))
    within("sparsity", sparsity, strides)

    def blocks(s: int) -> nn.Sequential:
        return nn.Sequential(*(SlimBlock(features[s], heads[s], sparsity[s], spatial_dims) for _ in range(depths[s])))

    def step(kind: Callable[..., nn.Module], a: int, b: int, stride: int) -> nn.Sequential:
        return nn.Sequential(kind(a, b, stride, stride), nn.GroupNorm(1, b))

    down, up = CONV[spatial_dims], TRANSPOSED_CONV[spatial_dims]
    stages = [
        nn.Sequential(OrderedDict(down=step(down, a, b, strides[s]), blocks=blocks(s)))
        for s, (a, b) in enumerate(itertools.pairwise([in_channels, *features]))
    ]
    encoder = Encoder(ChannelsLast(spatial_dims), stages, features, [(s,) * spatial_dims for s in strides])
    middle = Middle(features[-1], [grid] * spatial_dims if isinstance(grid, int) else grid, dropout, blocks(n - 1), scrambled)
    levels = range(n - 2, -1, -1)
    ups = [step(up, features[s + 1], features[s], 2).append(ChannelsLast(spatial_dims)) for s in levels]
    head = step(up, features[0], out_channels, strides[0])
    decoder = Decoder(ups, [blocks(s) for s in levels], [*[None] * (n - 2), head], ["sum"] * (n - 1))
    return UNet(encoder, decoder, middle, input_size)


_BLOCKS = (
    (r"\.patch(\d)\.positional_encoding\.", r".place\1."),
    (r"\.LineConv(\d)\.line_conv_([01])\.", lambda m: f".mlp{m[1]}.{2 * int(m[2])}."),
    (r"\.LocalRC\.bn1\.", ".before.0."),
    (r"\.LocalRC\.pointwise_conv_0\.", ".before.1."),
    (r"\.LocalRC\.depthwise_conv\.", ".around."),
    (r"\.LocalRC\.bn2\.", ".behind.0."),
    (r"\.LocalRC\.pointwise_conv_1\.", ".behind.1."),
    (r"\.GlobalST\.", ".attention."),
    (r"\.LocalRD\.conv_trans\.", ".spread."),
    (r"\.LocalRD\.norm\.", ".mix.0."),
    (r"\.LocalRD\.pointwise_conv\.", ".mix.1."),
)
MAP = Map(
    rename=(
        *_BLOCKS,
        (r"\.(depth_wise|transposed)\.", ".0."),
        (r"\.norm\.", ".1."),
        (r"^Encoder\.position_embeddings$", "bottleneck.pos_embed"),
        (r"^Encoder\.DWconv(\d)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.down."),
        (r"^Encoder\.block(\d)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.blocks."),
        (r"^Decoder\.block4\.", "bottleneck.blocks."),
        (r"^Decoder\.block(\d)\.", lambda m: f"decoder.stages.{3 - int(m[1])}."),
        (r"^Decoder\.TSconv(\d)\.", lambda m: f"decoder.upsample_layers.{int(m[1]) - 1}."),
        (r"^Decoder\.SegHead\.", "decoder.seg_layers.2."),
    )
)


@register_upstream("slim_unetr", map=MAP)
def upstream(
    *,
    in_channels: int = 4,
    out_channels: int = 3,
    embed_dim: int = 96,
    embedding_dim: int = 64,
    channels: Sequence[int] = (24, 48, 60),
    blocks: Sequence[int] = (1, 2, 3, 2),
    heads: Sequence[int] = (1, 2, 4, 4),
    r: Sequence[int] = (4, 2, 2, 1),
    dropout: float = 0.3,
) -> UNet:
    """Slim UNETR from upstream's keywords; positions whose number embedding_dim is a cube are taken for those of one."""
    edge = round(embedding_dim ** (1 / 3))
    return slim_unetr(
        in_channels=in_channels,
        out_channels=out_channels,
        features=(*channels, embed_dim),
        depths=blocks,
        heads=heads,
        sparsity=r,
        grid=edge if edge**3 == embedding_dim else (embedding_dim,),
        dropout=dropout,
        scrambled=True,
    )
