"""EMCAD (Rahman et al., arXiv 2405.06880): a light decoder of attention and multi-scale depthwise blocks, on PVTv2 or on any encoder here; 2D and 3D.

What upstream's code does beside the paper: one input channel becomes three by a convolution, a norm and a ReLU, which every network has; all logits
are brought to full resolution and returned from coarse to fine. `create_model` has its encoder take the channels, and gives the finest logits alone,
or those of all levels at several resolutions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import interpolate

from medssm.models.encoders import encoder as encoder_of
from medssm.models.facts import Facts
from medssm.models.options import only
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn import Encoder, UNet
from medssm.nn.blocks import check_dims
from medssm.nn.emcad import EMCADDecoder
from medssm.nn.pvt_encoder import SIZES, pvt_encoder

# Upstream's names of PVTv2's encoder.
_PVT = (
    (r"patch_embed(\d)\.proj\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.patch.0."),
    (r"patch_embed(\d)\.norm\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.patch.1."),
    (r"block(\d)\.(\d+)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.blocks.{m[2]}."),
    (r"norm(\d)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.norm."),
)
_BLOCK = (
    (r"\.attn\.q\.", ".attention.query."),
    (r"\.attn\.kv\.", ".attention.key_value."),
    (r"\.attn\.norm\.", ".attention.sr_norm."),
    (r"\.attn\.", ".attention."),
    (r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
)
_ACT = {"relu": nn.ReLU, "relu6": nn.ReLU6, "gelu": nn.GELU, "hswish": nn.Hardswish}


@register_model(
    "emcad",
    facts=Facts(
        "2405.06880",
        "SLDGroup/EMCAD",
        "UT Austin research licence",
        small={"encoder": "vmamba", "encoder_options": {"features": (8, 16), "depths": (1, 1)}},
        input=(3, 256, 256),
        parity="parameter and key counts",
    ),
)
def emcad(
    *,
    spatial_dims: int = 2,
    in_channels: int = 3,
    out_channels: int = 1,
    encoder: str = "pvt_v2_b2",
    encoder_options: Mapping[str, Any] | None = None,
    kernels: Sequence[int] = (1, 3, 5),
    expand: float = 2,
    deep_supervision: bool = False,
    input_size: str = "any",
) -> UNet:
    """EMCAD's decoder on an encoder, for any input size; logits (b, out_channels, *spatial).

    Args:
        encoder: "pvt_v2_b0" to "pvt_v2_b5", or the name of a network of create_model, with that network's encoder_options.
        kernels: odd sides of the depthwise convolutions of a block. expand: hidden channels of the blocks over outer.
        deep_supervision: a list of logits, the highest resolution first. input_size: "any" pads and crops inside, "strict" raises.
    """
    check_dims(spatial_dims)
    maps = encoder_of(encoder, spatial_dims, in_channels, encoder_options)
    return UNet(maps, EMCADDecoder(maps, out_channels, spatial_dims, deep_supervision, expand=expand, kernels=kernels), None, input_size)


class _Upstream(UNet):
    """With upstream's entrance for one channel, and its order and size of the logits."""

    def __init__(self, encoder: Encoder, decoder: EMCADDecoder) -> None:
        super().__init__(encoder, decoder)
        self.gray = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.ReLU())

    def whole(self, x: Tensor) -> list[Tensor]:
        assert isinstance(self.decoder, EMCADDecoder)
        logits = self.decoder.coarse(self.encoder(self.gray(x) if x.shape[1] == 1 else x), all_heads=True)
        return [interpolate(y, x.shape[2:], mode="bilinear") for y in reversed(logits)]


def _level(prefix: str, first: int) -> Callable[[re.Match[str]], str]:
    """Upstream numbers levels from fine to coarse, beginning with 1."""
    return lambda found: f"decoder.{prefix}.{first - int(found[1])}."


MAP = Map(
    rename=(
        (r"^conv\.", "gray."),
        (r"^decoder\.mscb(\d)\.0\.", _level("stages", 4)),
        (r"^decoder\.eucb(\d)\.(?:up_dwc|pwc)\.", _level("upsample_layers", 4)),
        (r"^(decoder\.upsample_layers\.\d)\.0\.", r"\1.4."),
        (r"^decoder\.lgag(\d)\.", _level("gates", 3)),
        (r"^decoder\.cab(\d)\.", _level("channels", 4)),
        (r"^decoder\.sab\.", "decoder.spatial."),
        (r"^out_head(\d)\.", _level("seg_layers", 4)),
        (r"\.pconv1\.", ".up."),
        (r"\.msdc\.dwconvs\.", ".scales."),
        (r"\.pconv2\.", ".down."),
        (r"\.W_g\.", ".x."),
        (r"\.W_x\.", ".skip."),
        *((rf"^backbone\.{pattern}", to) for pattern, to in _PVT),
        *_BLOCK,
    )
)


@register_upstream("emcad", map=MAP)
def upstream(
    *,
    num_classes: int = 1,
    kernel_sizes: Sequence[int] = (1, 3, 5),
    expansion_factor: float = 2,
    dw_parallel: bool = True,
    add: bool = True,
    lgag_ks: int = 3,
    activation: str = "relu",
    encoder: str = "pvt_v2_b2",
    pretrain: bool = False,
    pretrained_dir: str | None = None,
) -> UNet:
    """EMCADNet from upstream's keywords, with a PVTv2 encoder; nothing is ever downloaded, so that pretrained_dir is not read."""
    only("encoder", encoder, *SIZES)
    only("pretrain", pretrain, False)
    only("activation", activation.lower(), *_ACT)
    maps = pvt_encoder(3, 2, SIZES[encoder])
    options: dict[str, Any] = {"expand": expansion_factor, "kernels": kernel_sizes, "parallel": dw_parallel, "add": add, "gate_kernel": lgag_ks}
    return _Upstream(maps, EMCADDecoder(maps, num_classes, 2, True, act=_ACT[activation.lower()], **options))
