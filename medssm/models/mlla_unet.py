"""MLLA-UNet (Jiang et al., arXiv 2410.23738): MLLA's encoder, its mirror as decoder, and light convolutional steps up and down; 2D, here 3D too.

What upstream's code does beside the paper, kept for its weights:
- A skip is the input of an encoder stage, after its downsampling and before its blocks.
- The coarsest decoder level has no blocks; those of the others have the stochastic depths of the encoder's first blocks at the same resolution.
- One input channel is repeated to the three that the network was made for.
Upstream keeps rotations for one square input size in its weights; here they are made for the size at hand, and those in a file are dropped.
`create_model` has deep supervision, which upstream has not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from medssm.models.facts import Facts
from medssm.models.mamba_unet import MIRROR
from medssm.models.mlla import ENCODER, ROTATIONS, OnImages, mlla_encoder
from medssm.models.options import doubled, only, per_stage
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn import Decoder
from medssm.nn.blocks import ChannelNorm
from medssm.nn.mlla_steps import Grow
from medssm.nn.unet import OneChannelToo
from medssm.nn.vss import drop_paths, start_linears
from medssm.nn.vss_decoder import MirrorUNet, vss_decoder


@register_model(
    "mlla_unet",
    facts=Facts(
        "2410.23738",
        "csyfjiang/MLLA-UNet",
        "none given",
        small={"features": (8, 16), "depths": (1, 1), "decoder_depths": (1,), "heads": (2, 2)},
        input=(3, 224, 224),
    ),
)
class MLLAUNet(MirrorUNet):
    """MLLA-UNet for any input size; logits (b, out_channels, *spatial).

    Args:
        features, depths, heads: channels, blocks and attention heads per stage, at 1/4, 1/8, … of the resolution.
        decoder_depths: blocks per level, from coarse to fine, one entry fewer. mlp_ratio: hidden channels of the MLPs over outer.
        drop_path: stochastic depth at the last block of the encoder. dropout: in the MLPs. bias: of queries and keys.
        deep_supervision: a list of logits at 1, 1/4, 1/8 and 1/16. input_size: "any" pads and crops inside, "strict" raises.
    """

    def __init__(
        self,
        *,
        spatial_dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 4,
        features: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 4, 8, 4),
        heads: Sequence[int] = (2, 4, 8, 16),
        decoder_depths: Sequence[int] = (2, 2, 2),
        mlp_ratio: float = 4.0,
        drop_path: float = 0.2,
        dropout: float = 0.0,
        bias: bool = True,
        deep_supervision: bool = False,
        input_size: str = "any",
    ) -> None:
        n, options = len(features), dict[str, Any](mlp_ratio=mlp_ratio, bias=bias, dropout=dropout)
        encoder = mlla_encoder(spatial_dims, in_channels, features, depths, heads, drop_path, **options)
        levels = zip(drop_paths(depths, drop_path)[-2::-1], per_stage("decoder_depths", decoder_depths, n - 1), strict=True)
        rates = [(level + level[-1:] * depth)[:depth] for level, depth in levels]
        parts = vss_decoder(
            features,
            rates,
            out_channels,
            spatial_dims,
            n if deep_supervision else 1,
            norm=True,
            head_bias=False,
            up=partial(Grow, spatial_dims=spatial_dims),
            block=lambda s, rate: OnImages(features[s], heads[s], spatial_dims, drop_path=rate, **options),
        )
        super().__init__(encoder, Decoder(**parts, deep_supervision=deep_supervision), ChannelNorm(features[-1]), input_size)
        self.in_channels = in_channels
        start_linears(self)


class _Upstream(OneChannelToo, MLLAUNet):
    pass


MAP = Map(ROTATIONS, ((r"^mlla_unet\.", ""), *ENCODER, *MIRROR))


@register_upstream("mlla_unet", map=MAP)
def upstream(
    *,
    img_size: int = 224,
    patch_size: int = 4,
    in_chans: int = 3,
    num_classes: int = 1000,
    embed_dim: int = 64,
    depths: Sequence[int] = (2, 4, 8, 4),
    depths_decoder: Sequence[int] = (1, 2, 2, 2),
    num_heads: Sequence[int] = (2, 4, 8, 16),
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.2,
    ape: bool = False,
    use_checkpoint: bool = False,
    final_upsample: str = "expand_first",
) -> MLLAUNet:
    """MLLA-UNet from the keywords of upstream's MLLA_UNet; img_size, use_checkpoint and the first of depths_decoder change no output."""
    only("patch_size", patch_size, 4)
    only("ape", ape, False)
    only("final_upsample", final_upsample, "expand_first")
    only("depths: stages", len(depths), 4)
    return _Upstream(
        in_channels=in_chans,
        out_channels=num_classes,
        features=doubled(embed_dim, 4),
        depths=depths,
        heads=num_heads,
        decoder_depths=depths_decoder[1:],
        mlp_ratio=mlp_ratio,
        drop_path=drop_path_rate,
        dropout=drop_rate,
        bias=qkv_bias,
    )
