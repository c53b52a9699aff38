"""VM-UNet-V2 (Zhang et al., arXiv 2403.09157): VMamba's encoder, whose maps are gated, multiplied with one another at every resolution and summed
on the way up; 2D, here 3D too.

What upstream's code does beside the paper, kept for its weights:
- Its `deep_supervision` adds the logits of the second level, through a transposed convolution for one class, to those of the first; it returns those
  alone. `create_model` returns the list of all, the sum first.
- A sigmoid is inside the network for one class, and one input channel is repeated to three. Inputs are square, multiples of 32.
- The blocks of the last encoder stage and a transposed convolution are never used. `create_model` takes what those blocks give.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medssm.models.facts import Facts
from medssm.models.options import only
from medssm.models.registry import register_model, register_upstream
from medssm.models.vmamba import EARLY, ENCODER
from medssm.models.weights import Map
from medssm.nn.blocks import CONV, TRANSPOSED_CONV
from medssm.nn.enlarged import EnlargedDecoder
from medssm.nn.fusion import AttendedFusion
from medssm.nn.unet import OneChannelToo
from medssm.nn.vss import start_linears, vss_encoder
from medssm.nn.vss_decoder import MirrorUNet, entrances


@register_model(
    "vmunet_v2",
    facts=Facts("2403.09157", "nobodyplayer1/VM-UNetV2", "Apache-2.0", small={"features": (8, 16), "depths": (1, 1)}, input=(3, 256, 256)),
)
class VMUNetV2(MirrorUNet):
    """VM-UNet-V2 for any input size; logits (b, out_channels, *spatial).

    Args:
        features, depths: channels and blocks per encoder stage, at 1/4, 1/8, … of the resolution. width: channels of the decoder.
        drop_path: stochastic depth at the last block. d_state: of the scans.
        deep_supervision: a list of logits at 1, 1/2, 1/4 and 1/8. To the first, which is all that the network gives once it is switched off, the
            second is added. input_size: "any" pads and crops inside, "strict" raises.
    """

    def __init__(
        self,
        *,
        spatial_dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 1,
        features: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 9, 2),
        width: int | None = None,
        drop_path: float = 0.2,
        d_state: int = 16,
        deep_supervision: bool = False,
        input_size: str = "any",
    ) -> None:
        encoder = vss_encoder(in_channels, features, depths, spatial_dims, drop_path, d_state=d_state)
        width, levels = width or features[0] // 2, len(features)
        ups = [TRANSPOSED_CONV[spatial_dims](width, width, 4, 2, 1, bias=False) for _ in range(levels - 1)]
        heads = [CONV[spatial_dims](width, out_channels, 1) if deep_supervision or s == levels - 1 else None for s in range(levels)]
        merge = TRANSPOSED_CONV[spatial_dims](out_channels, out_channels, 3, 2, 1, 1, out_channels) if deep_supervision else None
        parts: dict[str, Any] = {"fusion": AttendedFusion(features, width, spatial_dims), "merge": merge, "steps": encoder.strides[0]}
        decoder = _Decoder(ups, [nn.Identity() for _ in ups], heads, ["sum" for _ in ups], deep_supervision, **parts)
        super().__init__(encoder, decoder, nn.Identity(), input_size)
        self.in_channels = in_channels
        start_linears(self)


class _Decoder(EnlargedDecoder):
    """It takes fusion(skips); with `merge`, merge(the second logits) is added to the first."""

    def __init__(self, *args: Any, fusion: nn.Module, merge: nn.Module | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fusion, self.merge = fusion, merge

    def forward(self, skips: Sequence[Tensor]) -> Tensor | list[Tensor]:
        outputs = self.logits(self.fusion(skips), self.merge is not None)
        if self.merge is not None:
            outputs[0] = outputs[0] + self.merge(outputs[1])
        return outputs if self.deep_supervision else outputs[0]


class _Upstream(OneChannelToo, VMUNetV2):
    """With upstream's sigmoid and the layers that it does not use; supervised: its deep_supervision."""

    def __init__(self, supervised: bool, classes: int, **options: Any) -> None:
        super().__init__(out_channels=classes, deep_supervision=True, **options)
        assert isinstance(self.decoder, _Decoder)
        self.decoder.deep_supervision = False
        width = options["width"]
        self.unused = nn.ModuleList([nn.ConvTranspose2d(width, width, 4, 2, 1, bias=False)])
        if not supervised:
            self.decoder.merge = None
            self.unused.append(nn.ConvTranspose2d(1, 1, 3))

    def maps(self, x: Tensor) -> list[Tensor]:
        return entrances(self.encoder, x)[0]

    def whole(self, x: Tensor) -> Tensor | list[Tensor]:
        y = super().whole(x)
        return torch.sigmoid(y) if isinstance(y, Tensor) and y.shape[1] == 1 else y


def _map(deep_supervision: bool = True, **_: object) -> Map:
    return Map(
        rename=(
            (r"^ca_(\d)\.", lambda m: f"decoder.fusion.gates.{int(m[1]) - 1}.0.0."),
            (r"^sa_(\d)\.conv1\.", lambda m: f"decoder.fusion.gates.{int(m[1]) - 1}.0.1.conv."),
            (r"^Translayer_(\d)\.", lambda m: f"decoder.fusion.gates.{int(m[1]) - 1}.1."),
            (r"\.bn\.", ".norm."),
            (r"^sdi_(\d)\.", lambda m: f"decoder.fusion.products.{int(m[1]) - 1}."),
            (r"^seg_outs\.", "decoder.seg_layers."),
            (r"^deconv([234])\.", lambda m: f"decoder.upsample_layers.{int(m[1]) - 2}."),
            (r"^deconv6\.", "decoder.merge." if deep_supervision else "unused.1."),
            (r"^deconv5\.", "unused.0."),
            (r"^vmunet\.", ""),
            *EARLY,
            *ENCODER,
        )
    )


@register_upstream("vmunet_v2", map=_map)
def upstream(
    *,
    input_channels: int = 3,
    num_classes: int = 1,
    mid_channel: int = 48,
    depths: Sequence[int] = (2, 2, 9, 2),
    depths_decoder: Sequence[int] = (2, 9, 2, 2),
    drop_path_rate: float = 0.2,
    load_ckpt_path: str | None = None,
    deep_supervision: bool = True,
) -> VMUNetV2:
    """VM-UNet-V2 from upstream's keywords; depths_decoder has no effect there either. Weights come as `from_upstream`'s state_dict."""
    only("mid_channel", mid_channel, 48)
    only("load_ckpt_path", load_ckpt_path, None)
    if deep_supervision and num_classes != 1:
        raise ValueError(f"num_classes: expected 1 with deep_supervision=True, as upstream's last convolution is of one class, got {num_classes}")
    return _Upstream(deep_supervision, num_classes, in_channels=input_channels, depths=depths, width=mid_channel, drop_path=drop_path_rate)
