"""Rows of the 3D convolutions: one convolution, and medssm_unet, with medssm.nn.convolution and with PyTorch's own choice of kernels."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

import medssm
from medssm.bench.measure import Side
from medssm.bench.row import OURS, Row
from medssm.nn.convolution import Conv3d, ConvTranspose3d, fast_layers

_PYTORCH = "PyTorch's convolutions"


def _sides(network: nn.Module, x: Tensor, grad: bool) -> dict[str, Side]:
    """The network with both kinds of convolutions: inference, or output and gradients of the weights (and of x where it requires one)."""
    theirs = copy.deepcopy(network)
    for module in theirs.modules():
        module.__class__ = {Conv3d: nn.Conv3d, ConvTranspose3d: nn.ConvTranspose3d}.get(type(module), type(module))

    def side(model: nn.Module) -> Side:
        leaves = [*model.parameters(), *([x] if x.requires_grad else [])]

        def step() -> tuple[Tensor, ...]:
            out = model(x)
            return torch.autograd.grad(out, leaves, torch.ones_like(out))

        def infer() -> Tensor:
            with torch.no_grad():
                return model(x)

        return step if grad else infer

    return {OURS: side(network), _PYTORCH: side(theirs)}


def _one(batch: int, channels: tuple[int, int], kernel: int, n: int, grad: bool = False) -> dict[str, Side]:
    torch.manual_seed(0)
    x = torch.randn(batch, channels[0], n, n, n).contiguous(memory_format=torch.channels_last_3d).requires_grad_(grad)
    return _sides(fast_layers(nn.Conv3d(*channels, kernel, padding=kernel // 2)), x, grad)


def _unet(size: str, batch: int, spatial: tuple[int, int, int], grad: bool = False) -> dict[str, Side]:
    torch.manual_seed(0)
    return _sides(medssm.create_model("medssm_unet", size=size).train(grad), torch.randn(batch, 1, *spatial), grad)


ROWS: dict[str, Row] = {
    "conv3d": Row("Conv3d 3x3x3, 16 to 16 channels, 32^3, forward", partial(_one, 1, (16, 16), 3, 32), tokens=16 * 32**3),
    "conv3d-train": Row("Conv3d 3x3x3, 16 to 16 channels, 32^3, forward and backward", partial(_one, 1, (16, 16), 3, 32, True), tokens=16 * 32**3),
    "conv3d-point": Row("Conv3d 1x1x1, batch 2, 32 to 16 channels, 48^3, forward", partial(_one, 2, (32, 16), 1, 48), tokens=2 * 32 * 48**3),
    "conv3d-point-train": Row(
        "Conv3d 1x1x1, batch 2, 32 to 16 channels, 48^3, forward and backward", partial(_one, 2, (32, 16), 1, 48, True), tokens=2 * 32 * 48**3
    ),
    "unet": Row("medssm_unet tiny, 3D, inference on a 64^3 patch", partial(_unet, "tiny", 1, (64, 64, 64))),
    "unet-train": Row("medssm_unet small, 3D, a step on 2 patches of 48 x 64 x 48", partial(_unet, "small", 2, (48, 64, 48), True), limit=5.0),
}
