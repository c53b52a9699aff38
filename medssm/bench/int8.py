"""Rows of layers and networks in 8-bit integers, beside float32 (on oneDNN, batch norms folded) and bfloat16: inference on one thread."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import medssm
from medssm.bench.measure import Side
from medssm.bench.row import OURS, Row
from medssm.compress.fold import fold
from medssm.compress.int8 import quantize
from medssm.segment.networks import memory_format, placed

FLOAT, _HALF = "float32", "bfloat16 autocast"


class _Layer(NamedTuple):
    title: str
    make: Callable[[], nn.Module]
    channels: int
    side: int


_LAYERS = {
    "3-32": _Layer("Conv3d 3x3x3, 32 to 32", partial(nn.Conv3d, 32, 32, 3, padding=1), 32, 48),
    "3-64": _Layer("Conv3d 3x3x3, 64 to 64", partial(nn.Conv3d, 64, 64, 3, padding=1), 64, 32),
    "3-128": _Layer("Conv3d 3x3x3, 128 to 128", partial(nn.Conv3d, 128, 128, 3, padding=1), 128, 16),
    "3-16": _Layer("Conv3d 3x3x3, 16 to 16", partial(nn.Conv3d, 16, 16, 3, padding=1), 16, 64),
    "3-8": _Layer("Conv3d 3x3x3, 8 to 8", partial(nn.Conv3d, 8, 8, 3, padding=1), 8, 64),
    "1-64": _Layer("Conv3d 1x1x1, 64 to 64", partial(nn.Conv3d, 64, 64, 1), 64, 32),
    "stride": _Layer("Conv3d 3x3x3, stride 2, 32 to 64", partial(nn.Conv3d, 32, 64, 3, 2, 1), 32, 48),
    "transposed": _Layer("ConvTranspose3d 2x2x2, stride 2, 64 to 32", partial(nn.ConvTranspose3d, 64, 32, 2, 2), 64, 24),
    "depthwise": _Layer("Conv3d 3x3x3, depthwise, 64", partial(nn.Conv3d, 64, 64, 3, padding=1, groups=64), 64, 32),
}


def _sides(network: nn.Module, x: Tensor, layers: Literal["faster", "all"]) -> dict[str, Side]:
    folded = placed(fold(copy.deepcopy(network).eval())[0], torch.device("cpu"), x.ndim - 2)
    integers, _ = quantize(network.eval(), [x], layers=layers)

    def side(model: nn.Module, half: bool = False) -> Side:
        def infer() -> object:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
                return model(x)

        return infer

    return {OURS: side(integers), FLOAT: side(folded), _HALF: side(folded, True)}


def _layer(name: str, size: int | None = None) -> dict[str, Side]:
    torch.manual_seed(0)
    layer = _LAYERS[name]
    n = size or layer.side
    return _sides(nn.Sequential(layer.make()), torch.randn(1, layer.channels, n, n, n).contiguous(memory_format=memory_format(3)), "all")


def _network(name: str, n: int, **options: Any) -> dict[str, Side]:
    torch.manual_seed(0)
    network = medssm.create_model(name, out_channels=3, **options)
    return _sides(network, torch.randn(1, 1, n, n, n).contiguous(memory_format=memory_format(3)), "faster")


ROWS: dict[str, Row] = {
    **{
        f"int8-{name}": Row(f"8 bits: {layer.title}, {layer.side}^3", partial(_layer, name), threads="one", kept=True)
        for name, layer in _LAYERS.items()
    },
    "int8-tiny": Row("8 bits: medssm_unet tiny, 64^3", partial(_network, "medssm_unet", 64, size="tiny"), threads="one", kept=True),
    "int8-tiny-attention": Row(
        "8 bits: medssm_unet tiny, linear attention, 64^3",
        partial(_network, "medssm_unet", 64, size="tiny", mixer="linear_attention"),
        "one",
        kept=True,
    ),
    "int8-small": Row("8 bits: medssm_unet small, 64^3", partial(_network, "medssm_unet", 64, size="small"), threads="one", limit=5.0, kept=True),
    "int8-segresnet": Row("8 bits: monai_segresnet, 64^3", partial(_network, "monai_segresnet", 64), threads="one", limit=5.0, kept=True),
}
QUICK: dict[str, Row] = {"int8-3-8": Row("8 bits: Conv3d 3x3x3, 8 to 8, 16^3", partial(_layer, "3-8", 16), threads="one", kept=True)}
