"""Convolutions that take the batch norm and the activation behind them along, at inference on a CPU.

A batch norm of stored statistics is a scale and a shift of each channel: of the convolution's weights and bias as well as of its output. oneDNN
applies the activation while it writes the output. So one pass over the map is left of three. With gradients, under autocast, on another device, and
for torch.compile and the tracers the layers run one by one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from medssm.nn.convolution import Conv3d
from medssm.nn.inner import plain
from medssm.ops import modes

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, Conv3d)
_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d)
# oneDNN's names of activations.
_NAMES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "swish",
    nn.Hardswish: "hardswish",
    nn.GELU: "gelu",
    nn.Sigmoid: "sigmoid",
}
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


class Chain(nn.Sequential):
    """nn.Sequential, run by `chain`."""

    def forward(self, x: Tensor) -> Tensor:
        """x -> what the last layer gives."""
        return chain(self, x)


def chain(layers: Iterable[nn.Module | None], x: Tensor) -> Tensor:
    """The layers one after the other (None is none), on (b, c, *spatial). At inference on a CPU a convolution takes along the batch norm behind it,
    where that is less work than a pass over the map, and the activation."""
    rest = [layer for layer in layers if layer is not None and type(layer) is not nn.Identity]
    rest.reverse()
    while rest:
        layer = rest.pop()
        if not (isinstance(layer, _CONVOLUTIONS) and rest and _serves(layer, x)):
            x = layer(x)
            continue
        weight, bias = layer.weight, layer.bias
        if _folds(rest[-1], weight.numel() * layer.stride[0] ** (x.dim() - 2), x):
            weight, bias = folded(weight, bias, rest.pop())
        name, algorithm = "none", ""
        numbers: list[float] = []
        if rest and _is_activation(rest[-1]):
            activation: Any = rest.pop()
            name, algorithm = _NAMES[type(activation)], getattr(activation, "approximate", "")
            numbers = [activation.negative_slope] if name == "leaky_relu" else []
        if weight is layer.weight and name == "none":
            x = layer(x)
            continue
        options = layer.padding, layer.stride, layer.dilation, layer.groups
        x = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *options, name, numbers, algorithm)
    return x


def _serves(conv: nn.Conv2d | nn.Conv3d, x: Tensor) -> bool:
    """Whether oneDNN may take this convolution with more than itself: inference in float32, which nothing traces or watches."""
    if not (_ONEDNN and type(x) is Tensor and x.device.type == "cpu" and x.dtype == conv.weight.dtype == torch.float32):
        return False
    if torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.enabled or not modes.direct((x, None)) or torch.is_grad_enabled():
        return False
    shaped = x.dim() == conv.weight.dim() and x.shape[1] == conv.in_channels and x.numel() > 0 and x.layout == torch.strided
    return shaped and conv.padding_mode == "zeros" and not isinstance(conv.padding, str) and plain(conv)


def _folds(norm: nn.Module, weights: int, x: Tensor) -> bool:
    """Whether a norm is a scale and a shift of each channel, and scaling that many weights less than a pass over the map."""
    if not stored(norm):
        return False
    assert isinstance(norm, (nn.BatchNorm2d, nn.BatchNorm3d)) and norm.running_mean is not None
    return norm.running_mean.dtype == torch.float32 and weights < x[:, 0].numel() * norm.num_features


def stored(norm: nn.Module) -> bool:
    """Whether a norm is a batch norm that goes by stored statistics."""
    return plain(norm, _NORMS) and not norm.training and norm.running_mean is not None


def folded(weight: Tensor, bias: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """A convolution's weight and bias with those of the batch norm behind it."""
    scale = torch.rsqrt(norm.running_var + norm.eps)
    shift = norm.running_mean if bias is None else norm.running_mean - bias
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -shift * scale if norm.bias is None else torch.addcmul(norm.bias, shift, scale, value=-1)
    return weight * scale.view(-1, *[1] * (weight.dim() - 1)), shift


def _is_activation(layer: nn.Module) -> bool:
    return type(layer) in _NAMES and not (layer._forward_hooks or layer._forward_pre_hooks) and "forward" not in layer.__dict__
