"""VM-UNet (Ruan, Li and Xiang, arXiv 2402.02491): VMamba's encoder and its mirror image, joined by sums; 2D, here 3D too.

What upstream's code does beside the paper, kept for its weights:
- A skip is the input of an encoder stage, after its downsampling and before its blocks; the finest one is not used.
- One input channel is repeated to the three that the network was made for.
- One class has its sigmoid inside the network. `create_model` gives logits, takes any number of channels, and pads inputs that 32 does not divide.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medssm.models.facts import Facts
from medssm.models.options import only, per_stage
from medssm.models.registry import register_model, register_upstream
from medssm.models.vmamba import EARLY, ENCODER
from medssm.models.weights import Map
from medssm.nn import AnySize, VSSBlock
from medssm.nn.blocks import CONV, check_dims
from medssm.nn.unet import OneChannelToo
from medssm.nn.vss import PatchExpand, drop_paths, start_linears, vss_encoder
from medssm.nn.vss_decoder import entrances


@register_model(
    "vmunet",
    facts=Facts(
        "2402.02491", "JCruan519/VM-UNet", "Apache-2.0", small={"features": (8, 16), "depths": (1, 1), "decoder_depths": (1, 1)}, input=(3, 256, 256)
    ),
)
class VMUNet(AnySize):
    """VM-UNet for any input size; logits (b, out_channels, *spatial).

    Args:
        features: channels per encoder stage, at 1/4, 1/8, … of the resolution. depths: blocks per stage; decoder_depths: from coarse to fine.
        drop_path: stochastic depth, at the coarse ends of encoder and decoder. d_state: of the scans.
        activation: None, or "sigmoid" on the output. input_size: "any" pads and crops inside, "strict" raises.
    """

    def __init__(
        self,
        *,
        spatial_dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 1,
        features: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 2, 2),
        decoder_depths: Sequence[int] = (2, 2, 2, 1),
        drop_path: float = 0.2,
        d_state: int = 16,
        activation: str | None = None,
        input_size: str = "any",
    ) -> None:
        features, n = list(features), len(features)
        check_dims(spatial_dims)
        per_stage("decoder_depths", decoder_depths, n)
        only("activation", activation, None, "sigmoid")
        super().__init__([4 * 2 ** (n - 1)] * spatial_dims, input_size)
        self.in_channels, self.activation = in_channels, activation
        self.encoder = vss_encoder(in_channels, features, depths, spatial_dims, drop_path, d_state=d_state)
        self.ups = nn.ModuleList([PatchExpand(a, b, spatial_dims) for a, b in zip(features[:0:-1], features[-2::-1], strict=True)])
        rates = drop_paths(decoder_depths[::-1], drop_path)[::-1]
        self.stages = nn.ModuleList(
            [
                nn.Sequential(*(VSSBlock(c, spatial_dims, rate, d_state=d_state) for rate in reversed(stage)))
                for c, stage in zip(features[::-1], rates, strict=True)
            ]
        )
        self.final_up = PatchExpand(features[0], features[0] // 4, spatial_dims, 4)
        self.final_conv = CONV[spatial_dims](features[0] // 4, out_channels, 1)
        start_linears(self)

    def whole(self, x: Tensor) -> Tensor | list[Tensor]:
        """(b, in_channels, *spatial) -> (b, out_channels, *spatial)."""
        skips, x = entrances(self.encoder, x)
        x = self.stages[0](x)
        for up, stage, skip in zip(self.ups, self.stages[1:], reversed(skips[1:]), strict=True):
            x = stage(up(x + skip))
        x = self.final_conv(self.final_up(x))
        return torch.sigmoid(x) if self.activation else x


class _Upstream(OneChannelToo, VMUNet):
    pass


MAP = Map(
    rename=(
        (r"^vmunet\.", ""),
        *EARLY,
        *ENCODER,
        (r"^layers_up\.(\d)\.blocks\.", r"stages.\1."),
        (r"^layers_up\.(\d)\.upsample\.", lambda m: f"ups.{int(m[1]) - 1}."),
    )
)


@register_upstream("vmunet", map=MAP)
def upstream(
    *,
    input_channels: int = 3,
    num_classes: int = 1,
    depths: Sequence[int] = (2, 2, 9, 2),
    depths_decoder: Sequence[int] = (2, 9, 2, 2),
    drop_path_rate: float = 0.2,
    load_ckpt_path: str | None = None,
) -> VMUNet:
    """VM-UNet from upstream's keywords; weights come as `from_upstream`'s state_dict, not from load_ckpt_path."""
    if load_ckpt_path is not None:
        raise ValueError(f"load_ckpt_path: expected None, pass the file as state_dict; got {load_ckpt_path!r}")
    return _Upstream(
        in_channels=input_channels,
        out_channels=num_classes,
        depths=depths,
        decoder_depths=depths_decoder,
        drop_path=drop_path_rate,
        activation="sigmoid" if num_classes == 1 else None,
    )
