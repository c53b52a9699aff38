"""H-vmunet (Wu et al., arXiv 2403.13642): six levels, the coarser four of high-order scans, of orders 2 to 5; 2D, here 3D too.

What upstream's code does beside the paper: its sigmoid is inside the network, whatever the number of classes, and inputs must be multiples of 32.
Its local scans have a weight that is never used. `create_model` gives logits for any size, without that weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from medssm.models.facts import Facts
from medssm.models.options import only, per_stage
from medssm.models.registry import register_model, register_upstream
from medssm.models.ultralight_vmunet import LEVELS
from medssm.models.weights import Map
from medssm.nn.blocks import check_dims
from medssm.nn.high_order import HighOrderScan, high_order_layer
from medssm.nn.light import LightUNet, SkipAttention

_UNUSED = {2: (14, 8), 3: (14, 8), 4: (24, 13), 5: (12, 7)}  # upstream's sizes of the weight that is never used, by order


@register_model(
    "hvmunet",
    facts=Facts(
        "2403.13642", "wurenkai/H-vmunet", "none given", small={"features": (4, 4, 8, 16, 32, 32), "depths": (1, 1, 0, 0)}, input=(3, 256, 256)
    ),
)
def hvmunet(
    *,
    spatial_dims: int = 2,
    in_channels: int = 3,
    out_channels: int = 1,
    features: Sequence[int] = (8, 16, 32, 64, 128, 256),
    depths: Sequence[int] = (2, 2, 2, 2),
    layer_scale: float = 1e-6,
    bridge: bool = True,
    attention: str = "linear",
    activation: str | None = None,
    input_size: str = "any",
) -> LightUNet:
    """H-vmunet for any input size; logits (b, out_channels, *spatial).

    Args:
        features: six channel counts, each level at half the resolution of the one before but the last: multiples of 4, 4, 8, 16, 32 and 32.
        depths: blocks per level, for the orders 2, 3, 4 and 5, in encoder and decoder alike. layer_scale: what the blocks' branches start scaled by.
        bridge: channel and spatial attention on the skips. attention: "linear" or "convolution", the same arithmetic with weights of other shapes.
        activation: None, or "sigmoid" on the output. input_size: "any" pads and crops inside, "strict" raises.
    """
    check_dims(spatial_dims)
    depths = per_stage("depths", depths, 4)

    def layer(level: int, a: int, b: int) -> nn.Module:
        return high_order_layer(a, b, level + 1, depths[level - 1], spatial_dims, layer_scale)

    joint = SkipAttention(features[:5], spatial_dims, attention) if bridge else None
    return LightUNet(spatial_dims, in_channels, out_channels, features, layer, layer, joint, activation, input_size, mixed=1)


MAP = Map(
    rename=(
        (r"\.H_SS2D\.dwconv\.SS2D\.", ".scan.local.scan."),
        (r"\.H_SS2D\.dwconv\.dw\.", ".scan.local.conv."),
        (r"\.H_SS2D\.dwconv\.", ".scan.local."),
        (r"\.H_SS2D\.ss2d_(in|\d)\.", lambda m: f".scan.scans.{0 if m[1] == 'in' else m[1]}."),
        (r"\.H_SS2D\.", ".scan."),
        (r"\.pwconv([12])\.", r".mlp.fc\1."),
        (r"^(encoder[3-6]|decoder[1-4])\.", r"\1.0."),
        *LEVELS,
    )
)


@register_upstream("hvmunet", map=MAP)
def upstream(
    *,
    num_classes: int = 1,
    input_channels: int = 3,
    layer_scale_init_value: float = 1e-6,
    pretrained: None = None,
    use_checkpoint: bool = False,
    c_list: Sequence[int] = (8, 16, 32, 64, 128, 256),
    depths: Sequence[int] = (2, 2, 2, 2),
    drop_path_rate: float = 0.0,
    split_att: str = "fc",
    bridge: bool = True,
) -> LightUNet:
    """H-vmunet from upstream's keywords, with its sigmoid; use_checkpoint changes no output."""
    only("pretrained", pretrained, None)
    only("drop_path_rate", drop_path_rate, 0)
    model = hvmunet(
        in_channels=input_channels,
        out_channels=num_classes,
        features=c_list,
        depths=depths,
        layer_scale=layer_scale_init_value,
        bridge=bridge,
        attention="linear" if split_att == "fc" else "convolution",
        activation="sigmoid",
    )
    for scan in model.modules():
        if isinstance(scan, HighOrderScan):
            shape = (sum(scan.widths) // 2, *_UNUSED[len(scan.widths)], 2)
            scan.local.register_parameter("complex_weight", nn.Parameter(torch.randn(shape) * 0.02))
    return model
