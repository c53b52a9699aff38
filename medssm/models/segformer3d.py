"""SegFormer3D (Perera et al., arXiv 2404.10156), here in 2D too: a pyramid of transformers with reduced keys under a decoder of linear layers.

Upstream takes cubes alone; here any size. The decoder's fusion, a 1 x 1 convolution of all maps enlarged and side by side, is done on each map at its
own size and the results are enlarged and added, which is the same sum. Written from a description of the network and from its paper.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import interpolate

from medssm.models.facts import Facts
from medssm.models.options import per_stage, within
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn import AnySize, Encoder
from medssm.nn.blocks import CONV, LINEAR, ChannelNorm, ChannelsLast, check_dims
from medssm.nn.pvt import LinearHead, ReducedBlock


@register_model(
    "segformer3d",
    facts=Facts(
        "2404.10156",
        "OSUPCVLab/SegFormer3D",
        "GPL-3.0",
        small={"features": (8, 16), "depths": (1, 1), "heads": (1, 2), "strides": (4, 2), "reductions": (2, 1), "width": 8},
        input=(4, 128, 128, 128),
        classes=3,
    ),
)
class SegFormer3D(AnySize):
    """SegFormer3D for any input size; logits (b, out_channels, *spatial).

    Args:
        features, depths, heads: channels, blocks and attention heads per stage. strides: voxels of a stage's step, whose kernel is kernels' entry, by
            default 2 stride - 1.
        reductions: voxels along an axis that share a key, per stage. mlp_ratio: hidden channels of the MLPs over outer.
        width: channels of the decoder. dropout: before its logits. input_size: "any" pads and crops inside, "strict" raises.
    """

    def __init__(
        self,
        *,
        spatial_dims: int = 3,
        in_channels: int = 4,
        out_channels: int = 3,
        features: Sequence[int] = (32, 64, 160, 256),
        depths: Sequence[int] = (2, 2, 2, 2),
        heads: Sequence[int] = (1, 2, 5, 8),
        strides: Sequence[int] = (4, 2, 2, 2),
        kernels: Sequence[int] | None = None,
        reductions: Sequence[int] = (4, 2, 1, 1),
        mlp_ratio: int | Sequence[int] = 4,
        width: int = 256,
        dropout: float = 0.0,
        input_size: str = "any",
    ) -> None:
        n = len(features)
        check_dims(spatial_dims)
        lists = {"depths": depths, "heads": heads, "strides": strides, "kernels": kernels or [2 * s - 1 for s in strides], "mlp_ratio": mlp_ratio}
        depths, heads, strides, kernels, ratios = (per_stage(name, value, n) for name, value in lists.items())
        reductions = within("reductions", per_stage("reductions", reductions, n), strides)
        super().__init__((math.prod(strides),) * spatial_dims, input_size)
        stages = []
        for s, (a, b) in enumerate(itertools.pairwise([in_channels, *features])):
            down = nn.Sequential(CONV[spatial_dims](a, b, kernels[s], strides[s], kernels[s] // 2), ChannelNorm(b))
            blocks = nn.Sequential(*(ReducedBlock(b, heads[s], reductions[s], ratios[s] * b, spatial_dims) for _ in range(depths[s])))
            stages.append(nn.Sequential(OrderedDict(down=down, blocks=blocks, norm=ChannelNorm(b))))
        self.encoder = Encoder(ChannelsLast(spatial_dims), stages, features, [(s,) * spatial_dims for s in strides])
        self.decoder = LinearHead(features, width, out_channels, spatial_dims, dropout)

    def whole(self, x: Tensor) -> Tensor:
        """(b, in_channels, *spatial) -> (b, out_channels, *spatial)."""
        return interpolate(self.decoder(self.encoder(x)), x.shape[2:], mode=LINEAR[len(self.size_divisor)])


MAP = Map(
    rename=(
        (r"^segformer_encoder\.embed_(\d)\.patch_embeddings\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.down.0."),
        (r"^segformer_encoder\.embed_(\d)\.norm\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.down.1."),
        (r"^segformer_encoder\.tf_block(\d)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.blocks."),
        (r"^segformer_encoder\.norm(\d)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.norm."),
        (r"\.mlp\.dwconv\.bn\.", ".mlp.norm."),
        (r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
        (r"^segformer_decoder\.linear_c(\d)\.", lambda m: f"decoder.linears.{int(m[1]) - 1}."),
        (r"^(decoder\.linears\.\d)\.bn\.", r"\1.norm."),
        (r"^segformer_decoder\.linear_fuse\.0\.weight$", "decoder.fuse"),
        (r"^segformer_decoder\.linear_fuse\.1\.", "decoder.norm."),
        (r"^segformer_decoder\.linear_pred\.", "decoder.pred."),
    )
)


@register_upstream("segformer3d", map=MAP)
def upstream(
    *,
    in_channels: int = 4,
    sr_ratios: Sequence[int] = (4, 2, 1, 1),
    embed_dims: Sequence[int] = (32, 64, 160, 256),
    patch_kernel_size: Sequence[int] = (7, 3, 3, 3),
    patch_stride: Sequence[int] = (4, 2, 2, 2),
    patch_padding: Sequence[int] = (3, 1, 1, 1),
    mlp_ratios: Sequence[int] = (4, 4, 4, 4),
    num_heads: Sequence[int] = (1, 2, 5, 8),
    depths: Sequence[int] = (2, 2, 2, 2),
    decoder_head_embedding_dim: int = 256,
    num_classes: int = 3,
    decoder_dropout: float = 0.0,
) -> SegFormer3D:
    """SegFormer3D from upstream's keywords."""
    if list(patch_padding) != [k // 2 for k in patch_kernel_size]:
        raise ValueError(f"patch_padding: expected half of patch_kernel_size, {[k // 2 for k in patch_kernel_size]}, got {list(patch_padding)}")
    return SegFormer3D(
        in_channels=in_channels,
        out_channels=num_classes,
        features=embed_dims,
        depths=depths,
        heads=num_heads,
        strides=patch_stride,
        kernels=patch_kernel_size,
        reductions=sr_ratios,
        mlp_ratio=mlp_ratios,
        width=decoder_head_embedding_dim,
        dropout=decoder_dropout,
    )
