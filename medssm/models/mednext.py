"""MedNeXt (Roy et al., arXiv 2303.09975): a U-Net of ConvNeXt blocks whose steps down and up are such blocks too; in 3D and 2D.
Upstream's networks have a parameter of one number, `dummy_tensor`, that nothing reads: from_upstream keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from medssm.models.facts import Facts
from medssm.models.options import only, per_stage, preset
from medssm.models.registry import register_model, register_upstream
from medssm.models.weights import Map
from medssm.nn import Decoder, Encoder, UNet
from medssm.nn.blocks import CONV, TRANSPOSED_CONV, ChannelsLast, check_dims
from medssm.nn.convnext import NeXtBlock


class Size(NamedTuple):
    """expand, depths: hidden channels over outer, and blocks, of the four levels down, the bottom and the four levels up."""

    expand: Sequence[int]
    depths: Sequence[int]


SIZES = {
    "small": Size((2,) * 9, (2,) * 9),
    "base": Size((2, 3, 4, 4, 4, 4, 4, 3, 2), (2,) * 9),
    "medium": Size((2, 3, 4, 4, 4, 4, 4, 3, 2), (3, 4, 4, 4, 4, 4, 4, 4, 3)),
    "large": Size((3, 4, 8, 8, 8, 8, 8, 4, 3), (3, 4, 8, 8, 8, 8, 8, 4, 3)),
}


@register_model("mednext", facts=Facts("2303.09975", "MIC-DKFZ/MedNeXt", "Apache-2.0", small={"features": 4, "depths": [1] * 9}, sizes=tuple(SIZES)))
def mednext(
    *,
    spatial_dims: int = 3,
    in_channels: int = 1,
    out_channels: int = 2,
    size: str = "small",
    features: int = 32,
    expand: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    kernel: int = 3,
    deep_supervision: bool = False,
    input_size: str = "any",
) -> UNet:
    """MedNeXt for any input size; logits (b, out_channels, *spatial).

    Args:
        size: "small" (5.6 M parameters in 3D), "base", "medium" or "large": presets of expand and depths, hidden channels over outer and blocks of
            nine parts: the levels down, the bottom, the levels up. features: channels at full resolution; each level has twice those above.
        kernel: odd side of the depthwise convolutions.
        deep_supervision: a list of logits, the highest resolution first. input_size: "any" pads and crops inside, "strict" raises.
    """
    preset_expand, preset_depths = preset(SIZES, size)
    parts = per_stage("expand", expand or preset_expand, 9), per_stage("depths", depths or preset_depths, 9)
    return _build(spatial_dims, in_channels, out_channels, features, *parts, (kernel, kernel), deep_supervision, input_size=input_size)


def _build(
    dims: int,
    in_channels: int,
    classes: int,
    features: int,
    expand: Sequence[int],
    depths: Sequence[int],
    kernels: tuple[int, int],
    supervised: bool,
    residual: bool = True,
    step_residual: bool = True,
    norm: str = "group",
    responses: bool = False,
    input_size: str = "any",
) -> UNet:
    """kernels: on the way down and up. residual, step_residual: shortcuts in blocks, and in those that change the resolution."""
    check_dims(dims)
    widths = [features * 2**s for s in range(5)]
    down, up = (partial(NeXtBlock, spatial_dims=dims, kernel=kernel, norm=norm, responses=responses) for kernel in kernels)
    stages, ups, up_stages = [], [], []
    heads: list[nn.Module | None] = []
    for s, width in enumerate(widths):
        steps = [down(widths[s - 1], width, expand=expand[s], residual=step_residual, step="down")] if s else []
        stages.append(nn.Sequential(*steps, *(down(width, width, expand=expand[s], residual=residual) for _ in range(depths[s]))))
        heads.insert(0, TRANSPOSED_CONV[dims](width, classes, 1) if supervised or s == 0 else None)
    for i, s in enumerate((3, 2, 1, 0), 5):
        ups.append(up(widths[s + 1], widths[s], expand=expand[i], residual=step_residual, step="up"))
        up_stages.append(nn.Sequential(*(up(widths[s], widths[s], expand=expand[i], residual=residual) for _ in range(depths[i]))))
    stem = nn.Sequential(ChannelsLast(dims), CONV[dims](in_channels, features, 1))
    encoder = Encoder(stem, stages, widths, [(1,) * dims] + [(2,) * dims] * 4)
    network = UNet(encoder, Decoder(ups, up_stages, heads, ["sum"] * 4, supervised), None, input_size)
    network.instance_norms = network.instance_norms or norm == "group"  # a group has one channel
    return network


MAP = Map(
    rename=(
        (r"^stem\.", "encoder.stem.1."),
        (r"^enc_block_0\.", "encoder.stages.0."),
        (r"^enc_block_(\d)\.(\d+)\.", lambda m: f"encoder.stages.{m[1]}.{int(m[2]) + 1}."),
        (r"^bottleneck\.(\d+)\.", lambda m: f"encoder.stages.4.{int(m[1]) + 1}."),
        (r"^down_(\d)\.", lambda m: f"encoder.stages.{int(m[1]) + 1}.0."),
        (r"^up_(\d)\.", lambda m: f"decoder.upsample_layers.{3 - int(m[1])}."),
        (r"^dec_block_(\d)\.", lambda m: f"decoder.stages.{3 - int(m[1])}."),
        (r"^out_(\d)\.conv_out\.", lambda m: f"decoder.seg_layers.{4 - int(m[1])}."),
    )
)
_NAMES = dict(zip("SBML", SIZES.values(), strict=True))


@register_upstream("mednext", map=MAP)
def upstream(
    *,
    in_channels: int = 1,
    n_classes: int,
    n_channels: int = 32,
    exp_r: int | Sequence[int] = 4,
    kernel_size: int | None = 7,
    enc_kernel_size: int | None = None,
    dec_kernel_size: int | None = None,
    deep_supervision: bool = False,
    do_res: bool = False,
    do_res_up_down: bool = False,
    checkpoint_style: str | None = None,
    block_counts: Sequence[int] = (2,) * 9,
    norm_type: str = "group",
    dim: str = "3d",
    grn: bool = False,
    size: str | None = None,
    in_ch: int | None = None,
) -> UNet:
    """MedNeXt from the keywords of upstream's class; checkpoint_style changes no output. size: "S", "B", "M" or "L", the networks of upstream's
    functions, in the place of exp_r, block_counts, do_res and do_res_up_down; in_ch: another word for in_channels."""
    only("norm_type", norm_type, "group", "layer")
    only("dim", dim, "2d", "3d")
    kernels = (kernel_size or enc_kernel_size or 0, kernel_size or dec_kernel_size or 0)
    if not all(kernels):
        raise ValueError(f"kernel_size: expected a number, or enc_kernel_size and dec_kernel_size, got {kernel_size!r}")
    chosen = Size(per_stage("exp_r", exp_r, 9), block_counts)
    if size is not None:
        chosen, do_res, do_res_up_down = preset(_NAMES, size), True, True
    network = _build(
        int(dim[0]), in_ch or in_channels, n_classes, n_channels, *chosen, kernels, deep_supervision, do_res, do_res_up_down, norm_type, grn
    )
    network.dummy_tensor = nn.Parameter(torch.ones(1))
    return network
