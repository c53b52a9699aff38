"""EGE-UNet (Ruan et al., arXiv 2307.08473): fifty thousand parameters, learned maps that multiply groups of channels, skips gated by the coarser
level and by a coarse prediction; 2D, here 3D too.

What upstream's code does beside the paper: its sigmoid is inside the network, the coarse predictions have one channel whatever the number of classes
and are brought to full resolution, and inputs must be multiples of 32. `create_model` gives logits for any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from medssm.models.facts import Facts
from medssm.models.options import only
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn import Decoder, Encoder, UNet
from medssm.nn.blocks import CONV, check_dims
from medssm.nn.grouped import Gate, GatedDecoder, MultiAxisProduct
from medssm.nn.light import halving_stages, rising_stages
from medssm.nn.unet import NARROW


@register_model("egeunet", facts=Facts("2307.08473", "JCruan519/EGE-UNet", "Apache-2.0", small={"features": (4, 4, 8, 8, 8, 8)}, input=(3, 256, 256)))
def egeunet(
    *,
    spatial_dims: int = 2,
    in_channels: int = 3,
    out_channels: int = 1,
    features: Sequence[int] = (8, 16, 24, 32, 48, 64),
    deep_supervision: bool = False,
    input_size: str = "any",
) -> UNet:
    """EGE-UNet for any input size; logits (b, out_channels, *spatial).

    Args:
        features: six channel counts, multiples of 4: three convolutional levels and three of learned maps, each at half the resolution of the one
            before but the last.
        deep_supervision: a list of logits, the highest resolution first; they gate the skips, which one channel at each level does without it.
        input_size: "any" pads and crops inside, "strict" raises.
    """
    network = UNet(*_parts(spatial_dims, in_channels, out_channels, features, out_channels if deep_supervision else 0), size=input_size)
    network.narrow = max(features) <= NARROW
    return network


def _parts(dims: int, in_channels: int, out_channels: int, features: Sequence[int], supervised: int) -> tuple[Encoder, Decoder]:
    """supervised: channels of the coarse predictions, 0 for none."""
    check_dims(dims)
    conv = CONV[dims]

    def mix(_: int, a: int, b: int) -> nn.Module:
        return MultiAxisProduct(a, b, spatial_dims=dims)

    stages = halving_stages(in_channels, features, dims, mix)
    stages.append(nn.Sequential(mix(4, features[4], features[5]), nn.GELU()))
    encoder = Encoder(nn.Identity(), stages, features, [(2,) * dims] * 5 + [(1,) * dims])
    gates = [Gate(features[s + 1], features[s], supervised or 1, dims, not supervised) for s in range(4, -1, -1)]
    heads = [conv(features[s], supervised, 1) if supervised else None for s in range(4, -1, -1)]
    decoder = GatedDecoder(gates, rising_stages(features, dims, mix), [*heads, conv(features[0], out_channels, 1)], bool(supervised), dims)
    return encoder, decoder


class _FullResolution(UNet):
    """As upstream: (coarse predictions from coarse to fine, the prediction), all of full resolution, behind a sigmoid."""

    def whole(self, x: Tensor) -> Any:
        finest, *coarse = (torch.sigmoid(interpolate(y, x.shape[2:], mode="bilinear", align_corners=True)) for y in super().whole(x))
        return [*reversed(coarse), finest]


_AXES = {"xy": 0, "zx": 1, "zy": 2}
MAP = Map(
    rename=(
        (r"^GAB(\d)\.", lambda m: f"decoder.gates.{5 - int(m[1])}."),
        (r"\.pre_project\.", ".below."),
        (r"\.g(\d)\.", r".groups.\1."),
        (r"\.tail_conv\.", ".tail."),
        (r"^gt_conv(\d)\.0\.", lambda m: f"decoder.seg_layers.{int(m[1]) - 1}."),
        (r"^final\.", "decoder.seg_layers.5."),
        (r"\.params_(\w\w)$", lambda m: f".maps.{_AXES[m[1]]}"),
        (r"\.conv_(\w\w)\.", lambda m: f".convs.{_AXES[m[1]]}."),
        (r"\.dw\.", ".rest."),
        (r"\.ldw\.", ".out."),
        (r"^encoder(\d)\.0\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.0."),
        (r"^ebn(\d)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.1."),
        (r"^decoder(\d)\.0\.", lambda m: f"decoder.stages.{int(m[1]) - 1}.0."),
        (r"^dbn(\d)\.", lambda m: f"decoder.stages.{int(m[1]) - 1}.1."),
    )
)


@register_upstream("egeunet", map=MAP)
def upstream(
    *, num_classes: int = 1, input_channels: int = 3, c_list: Sequence[int] = (8, 16, 24, 32, 48, 64), bridge: bool = True, gt_ds: bool = True
) -> UNet:
    """EGE-UNet from upstream's keywords; upstream's forward fails for bridge=False and gt_ds=False."""
    only("bridge", bridge, True)
    only("gt_ds", gt_ds, True)
    return _FullResolution(*_parts(2, input_channels, num_classes, c_list, 1))
