"""PyTorch's functions that see along space, on slabs: convolutions and pooling with the rows around, norms with the statistics of all ranks.

Every other function is called as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from medssm.nn.convolution import conv3d
from medssm.parallel.norms import normalised

if TYPE_CHECKING:
    from medssm.parallel.slabs import Slabs


class Mode(TorchFunctionMode):
    """What PyTorch's functions do inside the block of `Slabs`."""

    def __init__(self, slabs: Slabs) -> None:
        super().__init__()
        self.slabs = slabs

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        found = _FUNCTIONS.get(func)
        return func(*args, **kwargs) if found is None else found(self.slabs, func, *args, **kwargs)


def _convolution(
    slabs: Slabs,
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    dims = weight.dim() - 2
    _check_dims(slabs, func, dims)
    stride, dilation = _each(stride, dims), _each(dilation, dims)
    if isinstance(padding, str):
        spans = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if padding == "same" and any(span % 2 for span in spans):
            raise ValueError(f"padding: expected as many voxels on both sides, got 'same' with a kernel {tuple(weight.shape[2:])}")
        padding = [span // 2 if padding == "same" else 0 for span in spans]
    padding = _each(padding, dims)
    x, padding = _windows(slabs, input, weight.shape[2 + slabs.axis], stride, padding, dilation)
    return (conv3d if dims == 3 else functional.conv2d)(x, weight, bias, stride, padding, dilation, groups)


def _windows(
    slabs: Slabs, x: Tensor, kernel: int, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], fill: float = 0.0
) -> tuple[Tensor, tuple[int, ...]]:
    """(the slab with the rows that this rank's windows see, the padding that is left)."""
    axis = slabs.axis
    span, step, pad = dilation[axis] * (kernel - 1) + 1, stride[axis], padding[axis]
    begins = slabs.place(x.shape[2 + axis])
    if any(begin % step for begin in begins) or (begins[-1] + 2 * pad - span) // step + 1 != begins[-1] // step:
        raise ValueError(
            f"x: expected a layer with one row of its output for every {step} of its input along axis {axis}, got a kernel of {kernel} with the "
            f"padding {pad} on {begins[-1]} rows, slabs of which begin at {begins[:-1]}"
        )
    after = max(span - step - pad, 0)
    if pad or after:
        x = slabs.margins(x, 2 + axis, pad, after, fill)
    return x, (*padding[:axis], 0, *padding[axis + 1 :])


def _transposed(
    slabs: Slabs,
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    dims = weight.dim() - 2
    _check_dims(slabs, func, dims)
    stride, padding, output_padding, dilation = (_each(value, dims) for value in (stride, padding, output_padding, dilation))
    x = input.to_dense() if input.is_mkldnn else input
    axis, dim = slabs.axis, 2 + slabs.axis
    begins, span = slabs.place(x.shape[dim]), dilation[axis] * (weight.shape[dim] - 1)
    step, pad = stride[axis], padding[axis]
    if span + 1 + output_padding[axis] - 2 * pad != step:
        raise ValueError(
            f"x: expected a layer with {step} rows of its output for each of its input along axis {axis}, got a kernel of {weight.shape[dim]} with "
            f"the padding {pad} and the output padding {output_padding[axis]}"
        )
    # Row o of the output sees rows (o + pad - dilation j) / stride of the input, j in 0 … kernel - 1.
    begin, end = begins[slabs.ranks.rank], begins[slabs.ranks.rank + 1]
    before, after = max(-((pad - span) // step), 0), max((step - 1 + pad) // step, 0)
    wide = slabs.margins(x, dim, before, after) if before or after else x
    bare = (*padding[:axis], 0, *padding[axis + 1 :])
    room = (*output_padding[:axis], max(step - span - 1, 0), *output_padding[axis + 1 :])  # rows that no row of the input reaches are the bias
    y: Tensor = func(wide, weight, bias, stride, bare, room, groups, dilation)
    return y.narrow(dim, before * step + pad, (end - begin) * step)


def _max_pool(
    slabs: Slabs,
    func: Any,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    dims = input.dim() - 2
    _check_dims(slabs, func, dims)
    if ceil_mode or return_indices:
        raise ValueError("max_pool: expected ceil_mode=False and return_indices=False over ranks, got another one")
    kernel, padding, dilation = _each(kernel_size, dims), _each(padding, dims), _each(dilation, dims)
    stride = _each(stride or kernel, dims)
    x, padding = _windows(slabs, input, kernel[slabs.axis], stride, padding, dilation, -torch.inf)
    y: Tensor = func(x, kernel, stride, padding, dilation)
    return y


def _batch_norm(
    slabs: Slabs,
    func: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        y: Tensor = func(input, running_mean, running_var, weight, bias, False, momentum, eps)
        return y
    return normalised(slabs.ranks, input, weight, bias, eps, running_mean, running_var, momentum)


def _instance_norm(
    slabs: Slabs,
    func: Any,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        y: Tensor = func(input, running_mean, running_var, weight, bias, False, momentum, eps)
        return y
    if running_mean is not None:
        raise ValueError("instance_norm: expected no running statistics in training over ranks, got track_running_stats=True")
    b, c = input.shape[:2]
    weight, bias = (None if t is None else t.repeat(b) for t in (weight, bias))
    return normalised(slabs.ranks, input.flatten(0, 1)[None], weight, bias, eps).unflatten(1, (b, c))[0]


def _group_norm(
    slabs: Slabs, func: Any, input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    b, c = input.shape[:2]
    y = normalised(slabs.ranks, input.reshape(1, b * num_groups, c // num_groups, *input.shape[2:]), None, None, eps).reshape(input.shape)
    shape = (1, c, *[1] * (input.dim() - 2))
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def _interpolate(slabs: Slabs, func: Any, input: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest", **kwargs: Any) -> Tensor:
    factors = _each(scale_factor, input.dim() - 2) if scale_factor is not None else ()
    if size is not None or mode != "nearest" or any(factor != int(factor) for factor in factors):
        raise ValueError(f"interpolate: expected mode='nearest' and whole scale factors over ranks, got {mode!r}, {size or scale_factor}")
    y: Tensor = func(input, None, scale_factor, mode, **kwargs)
    return y


def _refused(slabs: Slabs, func: Any, *args: Any, **kwargs: Any) -> Any:
    raise ValueError(f"{func.__name__}: it sees along space in a way that is not done over ranks: leave parallel.Slabs out")


def _check_dims(slabs: Slabs, func: Any, dims: int) -> None:
    if dims != slabs.dims:
        raise ValueError(f"{func.__name__}: expected maps of {slabs.dims} spatial axes, as the volume has, got {dims}")


def _each(value: Any, dims: int) -> tuple[Any, ...]:
    """One value per axis."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * dims if len(values) == 1 else values


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.conv2d, torch.conv3d, torch.ops.medssm.conv3d_forward), _convolution),
    **dict.fromkeys((torch.conv_transpose2d, torch.conv_transpose3d), _transposed),
    **dict.fromkeys((functional.max_pool2d, functional.max_pool3d), _max_pool),
    functional.batch_norm: _batch_norm,
    functional.instance_norm: _instance_norm,
    functional.group_norm: _group_norm,
    functional.interpolate: _interpolate,
    **dict.fromkeys(
        (
            *(torch.conv1d, torch.conv_transpose1d, functional.avg_pool2d, functional.avg_pool3d, functional.adaptive_avg_pool2d),
            *(functional.adaptive_avg_pool3d, functional.adaptive_max_pool2d, functional.adaptive_max_pool3d, functional.grid_sample),
            *(functional.unfold, functional.fold, functional.scaled_dot_product_attention, torch.roll),
        ),
        _refused,
    ),
}
