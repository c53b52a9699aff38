"""Mamba-UNet (Wang et al., arXiv 2402.05079): Swin-UNet with VMamba's blocks, encoder and decoder joined by linear layers; 2D, here 3D too.

What upstream's code does beside the paper, kept for its weights:
- A skip is the input of an encoder stage, after its downsampling and before its blocks.
- The coarsest decoder level has no blocks; those of the others are as many as the encoder's of the same resolution, with its stochastic depth.
- One input channel is repeated to the three that the network was made for.
`create_model` takes any number of channels, pads inputs that 32 does not divide, and has deep supervision, which upstream has not.
"""

from __future__ import annotations

from collections.abc import Sequence

from medssm.models.facts import Facts
from medssm.models.options import doubled, only, per_stage
from medssm.models.registry import register_model, register_upstream
from medssm.models.vmamba import EARLY, ENCODER
from medssm.models.weights import Map
from medssm.nn import Decoder
from medssm.nn.blocks import ChannelNorm
from medssm.nn.unet import OneChannelToo
from medssm.nn.vss import drop_paths, start_linears, vss_encoder
from medssm.nn.vss_decoder import MirrorUNet, vss_decoder


@register_model(
    "mamba_unet",
    facts=Facts("2402.05079", "ziyangwang007/Mamba-UNet", "Apache-2.0", small={"features": (8, 16), "depths": (1, 1)}, input=(3, 224, 224)),
)
class MambaUNet(MirrorUNet):
    """Mamba-UNet for any input size; logits (b, out_channels, *spatial).

    Args:
        features, depths: channels and blocks per stage, at 1/4, 1/8, … of the resolution; the decoder has them too, but no blocks at the coarsest.
        drop_path: stochastic depth at the last block of the encoder. d_state: of the scans.
        deep_supervision: a list of logits at 1, 1/4, 1/8 and 1/16. input_size: "any" pads and crops inside, "strict" raises.
    """

    def __init__(
        self,
        *,
        spatial_dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 4,
        features: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 2, 2),
        drop_path: float = 0.2,
        d_state: int = 16,
        deep_supervision: bool = False,
        input_size: str = "any",
    ) -> None:
        n = len(features)
        encoder = vss_encoder(in_channels, features, per_stage("depths", depths, n), spatial_dims, drop_path, d_state=d_state)
        rates = drop_paths(depths, drop_path)[-2::-1]
        parts = vss_decoder(features, rates, out_channels, spatial_dims, n if deep_supervision else 1, norm=True, head_bias=False, d_state=d_state)
        super().__init__(encoder, Decoder(**parts, deep_supervision=deep_supervision), ChannelNorm(features[-1]), input_size)
        self.in_channels = in_channels
        start_linears(self)


class _Upstream(OneChannelToo, MambaUNet):
    pass


# The decoder of Swin-UNet, whose names Mamba-UNet and MLLA-UNet keep.
MIRROR = (
    (r"^norm\.", "bottleneck."),
    (r"^layers_up\.0\.", "decoder.upsample_layers.0."),
    (r"^layers_up\.(\d)\.upsample\.", r"decoder.upsample_layers.\1."),
    (r"^layers_up\.(\d)\.blocks\.(\d+)\.", lambda m: f"decoder.stages.{int(m[1]) - 1}.{int(m[2]) + 1}."),
    (r"^concat_back_dim\.(\d)\.", lambda m: f"decoder.stages.{int(m[1]) - 1}.0."),
    (r"^norm_up\.", "decoder.upsample_layers.3.0."),
    (r"^up\.", "decoder.upsample_layers.3.1."),
    (r"^output\.", "decoder.seg_layers.3."),
)
MAP = Map(rename=((r"^mamba_unet\.", ""), *EARLY, *ENCODER, *MIRROR))


@register_upstream("mamba_unet", map=MAP)
def upstream(
    *,
    patch_size: int = 4,
    in_chans: int = 1,
    num_classes: int = 4,
    depths: Sequence[int] = (2, 2, 9, 2),
    dims: int | Sequence[int] = (96, 192, 384, 768),
    d_state: int = 16,
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.1,
    patch_norm: bool = True,
    use_checkpoint: bool = False,
    final_upsample: str = "expand_first",
    **_ignored: object,
) -> MambaUNet:
    """Mamba-UNet from the keywords of upstream's VSSM; use_checkpoint and further keywords (embed_dim, mlp_ratio) have no effect there either."""
    only("patch_size", patch_size, 4)
    only("drop_rate", drop_rate, 0)
    only("attn_drop_rate", attn_drop_rate, 0)
    only("patch_norm", patch_norm, True)
    only("final_upsample", final_upsample, "expand_first")
    return _Upstream(
        in_channels=in_chans, out_channels=num_classes, features=doubled(dims, len(depths)), depths=depths, drop_path=drop_path_rate, d_state=d_state
    )
