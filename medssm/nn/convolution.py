"""3D convolutions by PyTorch's fast kernels on a CPU, whatever their size.

PyTorch computes a float32 convolution on a CPU by oneDNN, or by im2col and matrix products that take up to ten times as long. It takes the second
way for a single volume of few channels and slices and, on one thread, for kernels of one voxel in height and width (`use_mkldnn` in
aten/src/ATen/native/Convolution.cpp). The classes here are PyTorch's own, weights and names included, but take oneDNN there, forward and backward,
and a matrix product for kernels of one voxel. Transposed convolutions, those of 2D too, take `spaced` where PyTorch has no fast kernel. torch.export,
torch.jit.trace and torch.fx see PyTorch's own operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from medssm.nn.instance_norm import InstanceNorm2d, InstanceNorm3d
from medssm.nn.spaced import is_spaced, spaced

_ONEDNN = torch.backends.mkldnn.is_available()
_FEW = 20480  # batch * channels * depth * height up to which PyTorch keeps a single volume from oneDNN
_BATCH = 16  # below this batch, on one thread, PyTorch keeps kernels of one voxel in height and width from oneDNN
_SMALL = 128  # voxels of an output below which oneDNN's reordering of the weights costs more than it saves
_MANY = 1 << 16  # channels-last weights from which on PyTorch's own reordering of them, without gradients, costs more than oneDNN's


class Conv3d(nn.Conv3d):
    """nn.Conv3d, the same values faster on a CPU."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, self.padding_mode), (0, 0, 0)
        return conv3d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class ConvTranspose2d(nn.ConvTranspose2d):
    """nn.ConvTranspose2d, the same values faster on a CPU."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(b, in_channels, *spatial) -> (b, out_channels, *spatial)."""
        if output_size is None and _takes_spaced(self, input):
            return spaced(input, self.weight, self.bias, self.stride, self.output_padding)
        return super().forward(input, output_size)


class ConvTranspose3d(nn.ConvTranspose3d):
    """nn.ConvTranspose3d, the same values faster on a CPU."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(b, in_channels, *spatial) -> (b, out_channels, *spatial)."""
        if output_size is None and _takes_spaced(self, input):
            return spaced(input, self.weight, self.bias, self.stride, self.output_padding)
        slow = _untraced(input, self.weight) and _refused_by_size(input, self.weight, self.groups) and self.kernel_size != self.stride
        if not slow or torch.compiler.is_compiling() or type(input) is not Tensor:  # of a subclass there are no oneDNN tensors
            return super().forward(input, output_size)
        y = super().forward(input.to_mkldnn(), output_size).to_dense()
        return y.contiguous(memory_format=torch.channels_last_3d) if _is_channels_last(input) else y


def fast_layers(network: nn.Module) -> nn.Module:
    """Make the 3D and the transposed convolutions of any network those of this module, and its instance norms those of medssm.nn.instance_norm, in
    place: the same weights, names and hooks. Returns the network."""
    ours: dict[type[nn.Module], type[nn.Module]] = {
        nn.Conv3d: Conv3d,
        nn.ConvTranspose2d: ConvTranspose2d,
        nn.ConvTranspose3d: ConvTranspose3d,
        nn.InstanceNorm2d: InstanceNorm2d,
        nn.InstanceNorm3d: InstanceNorm3d,
    }
    for module in network.modules():
        module.__class__ = ours.get(type(module), type(module))
    return network


def conv3d(
    x: Tensor,  # (b, c, *spatial)
    weight: Tensor,  # (out, c / groups, *kernel)
    bias: Tensor | None,  # (out,)
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] | str = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
) -> Tensor:
    """torch.nn.functional.conv3d of tuples."""
    if isinstance(padding, str) or not _untraced(x, weight) or x.shape[1] != weight.shape[1] * groups:
        return F.conv3d(x, weight, bias, stride, padding, dilation, groups)
    last = _is_channels_last(x)
    pointwise = weight.shape[2:].numel() == groups == 1 and not any(padding) and all(s == 1 for s in stride)
    if last and pointwise:
        return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
    if not pointwise and _refused(x, weight, stride, padding, dilation, groups, last):
        y: Tensor = torch.ops.medssm.conv3d_forward(x, weight, bias, stride, padding, dilation, groups)
        return y
    y = F.conv3d(x, weight, bias, stride, padding, dilation, groups)
    return y.contiguous(memory_format=torch.channels_last_3d) if last else y


def _untraced(x: Tensor, weight: Tensor) -> bool:
    """Whether this is a float32 convolution of a batch of maps on a CPU with oneDNN, and no tracer or transform asks for PyTorch's operator."""
    if not (_ONEDNN and isinstance(x, Tensor) and x.dim() == weight.dim() and x.device.type == "cpu" and x.layout == torch.strided):
        return False
    if not x.dtype == weight.dtype == torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    watched = torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() or torch._C._functorch.peek_interpreter_stack()
    return not watched and forward_ad._current_level < 0 and bool(torch.backends.mkldnn.enabled)


def _takes_spaced(layer: nn.ConvTranspose2d | nn.ConvTranspose3d, x: Tensor) -> bool:
    """Whether PyTorch would compute this transposed convolution slower than `spaced`, and no mode asks for its function (medssm.parallel)."""
    if not _untraced(x, layer.weight) or torch.compiler.is_compiling() or not is_spaced(layer) or torch._C._is_torch_function_mode_enabled():
        return False
    if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:  # a subclass that wants to see operators
        return False
    return x.shape[1] == layer.in_channels > 1 and x.numel() > 0 and _is_channels_last(x)


def _refused(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, last: bool) -> bool:
    """Whether PyTorch would compute this convolution without oneDNN, and slower."""
    out = _sizes(x, weight, stride, padding, dilation)
    reordered = last and _is_channels_last(weight) and weight.numel() >= _MANY and not torch.is_grad_enabled()
    if min(out) < 1 or (out[0] * out[1] * out[2] < _SMALL and not reordered) or (not last and list(stride) == list(weight.shape[2:])):
        return False
    flat = weight.shape[3] == weight.shape[4] == 1 and all(s == 1 for s in (*stride, *dilation))
    if flat and x.shape[0] < _BATCH and (torch.compiler.is_compiling() or torch.get_num_threads() == 1):
        return True
    return _refused_by_size(x, weight, groups)


def _refused_by_size(x: Tensor, weight: Tensor, groups: int) -> bool:
    if groups > 1 or x.shape[0] != 1 or (weight.shape[3] > 3 and weight.shape[4] > 3):
        return False
    return x.shape[1] * x.shape[2] * x.shape[3] <= _FEW


def _is_channels_last(x: Tensor) -> bool:
    """By its strides: a single channel's memory is contiguous either way."""
    return x.stride(1) == 1 and x.is_contiguous(memory_format=memory_format(x.dim() - 2))


def _sizes(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> list[int]:
    axes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes]


# -- operators: oneDNN's convolution with oneDNN's gradient; that of aten::mkldnn_convolution would choose by PyTorch's rule again -------------------


@torch.library.custom_op("medssm::conv3d_forward", mutates_args=(), device_types="cpu")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    y: Tensor = torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)
    return y.contiguous(memory_format=_format(x, weight))


@torch.library.custom_op("medssm::conv3d_backward", mutates_args=(), device_types="cpu")
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias; one that is not wanted is empty."""
    # oneDNN's own tensors always take oneDNN.
    found = _gradients(dy, x.to_mkldnn(), weight, stride, padding, dilation, groups, wanted)
    dx, dweight, dbias = (dy.new_empty(0) if d is None else d.contiguous() for d in found)
    return dx.contiguous(memory_format=_format(x, weight)) if wanted[0] else dx, dweight, dbias


def _gradients(dy: Tensor, x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, wanted: Sequence[bool]) -> Any:
    return torch.ops.aten.convolution_backward(dy, x, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0, 0], groups, wanted)


def _format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The memory format that oneDNN's output has."""
    return torch.channels_last_3d if _is_channels_last(x) or _is_channels_last(weight) else torch.contiguous_format


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[0], *_sizes(x, weight, stride, padding, dilation))
    return y.contiguous(memory_format=_format(x, weight))


@_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    dx, dweight, dbias = (dy.new_empty(shape if want else 0) for shape, want in zip((x.shape, weight.shape, weight.shape[:1]), wanted, strict=True))
    return (dx.contiguous(memory_format=_format(x, weight)) if wanted[0] else dx), dweight, dbias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *ctx.options = inputs
    ctx.save_for_backward(x, weight)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    found = torch.ops.medssm.conv3d_backward(dy, *ctx.saved_tensors, *ctx.options, wanted)
    return *(d if want else None for d, want in zip(found, wanted, strict=True)), None, None, None, None


def _setup_twice(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, stride, padding, dilation, groups, wanted = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (stride, padding, dilation, groups, wanted)


def _gradient_twice(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """Of the gradients, by PyTorch's own operators."""
    with torch.enable_grad():
        tensors = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        found = _gradients(*tensors, *ctx.options)
        pairs = [(f, g) for f, g, want in zip(found, grads, ctx.options[-1], strict=True) if want]
        back = torch.autograd.grad([f for f, _ in pairs], tensors, [g for _, g in pairs], allow_unused=True)
    return *back, None, None, None, None, None


_forward.register_autograd(_gradient, setup_context=_setup)
_backward.register_autograd(_gradient_twice, setup_context=_setup_twice)


def memory_format(spatial_dims: int) -> torch.memory_format:
    """Channels last, for weights and input alike: PyTorch's CPU convolutions run without reordering."""
    return torch.channels_last_3d if spatial_dims == 3 else torch.channels_last


def placed(network: nn.Module, device: torch.device, spatial_dims: int) -> nn.Module:
    """The network on a device, with its weights in `memory_format` and `fast_layers`."""
    there: nn.Module = fast_layers(network).to(device, memory_format=memory_format(spatial_dims))  # type: ignore[call-overload]  # torch's annotations lack it
    return there
