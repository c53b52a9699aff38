"""Convolutions and linear layers in 8-bit integers on a CPU.

A quantized layer takes the input x and the weights W to integers, multiplies and adds integers, and gives floating point:

    q = clamp(round(x / s) + z, 0, 255);   y = s t (sum Q (q - z)) + bias,   Q = round(W / t) in -127 to 127

with one s and z for a layer's input, from volumes that it saw (`quantize`), and one t for each output channel. Scans, norms and activations stay in
floating point. The products are oneDNN's. Where it has none (another device, a gradient, a traced call), the same values are computed in floating
point. Processors without VNNI add pairs of products in 16 bits, where 8-bit weights overflow without a sign: there the weights have 7 bits.
"""

from __future__ import annotations

import copy
import functools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import wrap_torch_function

from medssm.compress import fold
from medssm.errors import UserError
from medssm.files import first_line
from medssm.nn import convolution
from medssm.nn.blocks import image, spread, tokens
from medssm.nn.inner import plain

_SAMPLE, _MOST = 2**14, 2**20  # values of a layer's input that are kept of each call, and that are looked at
_GAIN = 0.9  # a layer is quantized where it then takes at most this part of its time
_STORED = 256  # weights from which a layer's file is worth integers
_SHRUNK = [part / 80 for part in range(1, 81)]  # parts of the range that are tried for the least squared error


def quantize(
    network: nn.Module,
    batches: Iterable[Tensor],
    *,
    ranges: Literal["percentile", "mse"] = "percentile",
    percentile: float = 99.99,
    layers: Literal["faster", "all"] = "faster",
    keep: Sequence[str] = (),
) -> tuple[nn.Module, dict[str, Any]]:
    """Quantize a network's convolutions and linear layers to 8 bits, in place; its batch norms are folded first.

    A layer is computed in integers where that is faster on this machine. The weights of the others are rounded to 8 bits too, which makes the file
    smaller, and computed in floating point. Layers and projections whose weights a kernel reads are among those.

    Args:
        network: in floating point, on the CPU
        batches: inputs (b, channels, *spatial) as the network sees them in use, for the ranges of the layers' inputs
        ranges: "percentile": the range of a layer's input without its outermost values; "mse": the range with the least squared error
        percentile: more than 50, at most 100; outermost are the values above it, and as many below
        layers: "faster": in integers where the time of the layer's calls falls by a tenth or more; "all": wherever the engine has the layer
        keep: names of layers to leave as they are, also as patterns such as "decoder.*"

    Returns:
        The network, and the step by which `restructure` gives another one the same structure:
        {"kind": "int8", "fold": [[convolution, norm], ...], "layers": [layers in integers], "stored": [rounded weights]}

    Raises:
        UserError: batches that the network does not take, or none; a network without a layer to quantize; an argument out of its range.
    """
    if ranges not in ("percentile", "mse"):
        raise UserError(f"ranges: expected percentile or mse, got {ranges!r}")
    if layers not in ("faster", "all"):
        raise UserError(f"layers: expected faster or all, got {layers!r}")
    if not 50 < percentile <= 100:
        raise UserError(f"percentile: expected more than 50 and at most 100, got {percentile}")
    given = list(batches)
    if not given:
        raise UserError("batches: expected at least one batch of inputs, got none")
    for batch in given:
        if batch.ndim not in (4, 5) or not torch.isfinite(batch).all():
            raise UserError(f"batches: expected (b, channels, *spatial) in 2D or 3D, finite, got {_told(batch)}")
    if any(parameter.device.type != "cpu" for parameter in network.parameters()):
        raise UserError("network: expected one on the CPU, got one on another device")
    training = network.training
    network.eval()
    _, folded = fold.fold(network)
    free = {name: layer for name, layer in network.named_modules() if not any(fnmatchcase(name, kept) for kept in keep)}
    weights = {f"{name}.{key}": value for name, layer in free.items() for key, value in _roundable(layer)}
    names = {layer: name for name, layer in free.items() if _has_integers(layer)}
    if not weights:
        raise UserError(f"network: expected a convolution or a linear layer to quantize{' besides those to keep' if keep else ''}, got none")
    convolution.placed(network, torch.device("cpu"), given[0].ndim - 2)
    seen: dict[nn.Module, list[_Seen]] = {}
    for batch in given:
        _run(network, batch, lambda layer, x: seen.setdefault(layer, []).append(_Seen.of(x)) if layer in names else None)
    found = {layer: _range(inputs, ranges, percentile) for layer, inputs in seen.items()}
    if layers == "faster":
        seconds = _timed(network, given[0], found)
        found = {layer: found[layer] for layer, (floats, integers) in seconds.items() if integers <= _GAIN * floats}
    chosen = [names[layer] for layer in found]
    stored = [name for name, value in weights.items() if value.numel() >= _STORED and name.removesuffix(".weight") not in chosen]
    for layer, of_input in found.items():
        _become(layer, *of_input)
    for name in stored:
        _store(network, name)
    return network.train(training), {"kind": "int8", "fold": folded["pairs"], "layers": chosen, "stored": stored}


def restructure(network: nn.Module, step: Mapping[str, Any]) -> nn.Module:
    """The network with the layers that the step names in integers, in place, and without ranges: they come with the weights."""
    fold.restructure(network, {"pairs": step["fold"]})
    for name in step["layers"]:
        layer = network.get_submodule(name)
        if not _has_integers(layer):
            raise ValueError(f"expected a convolution or a linear layer that can be quantized, got {name} ({type(layer).__name__})")
        _become(layer)
    for name in step["stored"]:
        _store(network, name)
    return network


# -- layers ----------------------------------------------------------------------------------------------------------------------------------------


class Int8(nn.Module):
    """A layer with weights in 8 bits. A subclass is also the layer that it was made of, with that one's attributes.

    State: weight (int8, the layer's shape), weight_scale (channels out,), bias (channels out,) if any, input_scale (), input_zero_point ().
    """

    out_axis = 0  # of the weights
    integers = True  # False: in floating point everywhere, with the same values on every processor
    weight: Tensor
    weight_scale: Tensor
    bias: Any  # Tensor or None
    input_scale: Tensor
    input_zero_point: Tensor
    _packed: tuple[Any, ...] | None

    def forward(self, x: Tensor, *unused: Any) -> Tensor:
        """As the layer that it was made of; the output has x's type."""
        if not (self.integers and _direct(x) and self._takes(x)):
            return self._simulated(x)
        if self._packed is None:
            self._packed = float(self.input_scale), int(self.input_zero_point), *self._pack(*self._fitting())
        scale, zero, *weights = self._packed
        return self._product(_integers(x, scale, zero), scale, zero, weights, x.dtype if x.dtype == torch.bfloat16 else torch.float32).to(x.dtype)

    def _takes(self, x: Tensor) -> bool:
        """Whether x has the layer's shape; for any other the layer in floating point says what is wrong."""
        raise NotImplementedError

    def _simulated(self, x: Tensor) -> Tensor:
        """The same in floating point, from values that are rounded as the integers."""
        with torch.autocast(x.device.type, enabled=False):
            weight = floats(self.weight, self.weight_scale, self.out_axis)
            return self._float(rounded(x.float(), self.input_scale, self.input_zero_point), weight).to(x.dtype)

    def _pack(self, weight: Tensor, scale: Tensor) -> list[Any]:
        """What `_product` needs of the weights, in the engine's layout."""
        raise NotImplementedError

    def _product(self, q: Tensor, scale: float, zero: int, packed: Sequence[Any], out: torch.dtype) -> Tensor:
        raise NotImplementedError

    def _float(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def _fitting(self) -> tuple[Tensor, Tensor]:
        """Weights that this processor can add without overflow, and their scale."""
        if _engine() == "7-bit":
            return (self.weight / 2).round().to(torch.int8), 2 * self.weight_scale
        return self.weight, self.weight_scale

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._packed = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # the engine's layout cannot be copied


class _Int8Conv(Int8):
    def _takes(self, x: Tensor) -> bool:
        return x.ndim == self.weight.ndim and x.shape[1] == self.in_channels

    def _pack(self: Any, weight: Tensor, scale: Tensor) -> list[Any]:
        options = [list(self.stride), list(self.padding), list(self.dilation)]
        packed = torch.ops.onednn.qconv_prepack(
            weight.contiguous(), scale, float(self.input_scale), int(self.input_zero_point), *options, self.groups
        )
        return [packed, scale, torch.zeros_like(scale, dtype=torch.int32), options]

    def _product(self: Any, q: Tensor, scale: float, zero: int, packed: Sequence[Any], out: torch.dtype) -> Tensor:
        weight, scales, zeros, options = packed
        y: Tensor = torch.ops.onednn.qconv_pointwise(
            q, scale, zero, weight, scales, zeros, self.bias, *options, self.groups, 1.0, 0, out, "none", [], ""
        )
        return y

    def _float(self: Any, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, self.bias)


class Int8Conv2d(_Int8Conv, nn.Conv2d):
    """nn.Conv2d with weights and input in 8 bits."""


class Int8Conv3d(_Int8Conv, convolution.Conv3d):
    """nn.Conv3d with weights and input in 8 bits."""


class _Int8Matrix(Int8):
    """A product of tokens (*, channels) and a matrix."""

    def _matrix(self, weight: Tensor) -> Tensor:
        """The weights as (rows, channels)."""
        return weight

    def _takes(self: Any, x: Tensor) -> bool:
        return x.shape[-1] == self.in_features

    def _pack(self, weight: Tensor, scale: Tensor) -> list[Any]:
        matrix = self._matrix(weight).contiguous()
        blocks = len(matrix) // len(scale)
        scale, bias = scale.repeat(blocks), None if self.bias is None else self.bias.repeat(blocks)
        return [torch.ops.onednn.qlinear_prepack(matrix, None), scale, torch.zeros_like(scale, dtype=torch.int32), bias]

    def _product(self, q: Tensor, scale: float, zero: int, packed: Sequence[Any], out: torch.dtype) -> Tensor:
        weight, scales, zeros, bias = packed
        y: Tensor = torch.ops.onednn.qlinear_pointwise(q, scale, zero, weight, scales, zeros, bias, 1.0, 0, out, "none", [], "")
        return y


class Int8Linear(_Int8Matrix, nn.Linear):
    """nn.Linear with weights and input in 8 bits."""

    def _float(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)


class _Int8ConvTranspose(_Int8Matrix):
    """A transposed convolution whose kernel is its stride: a linear layer from each voxel to a block of voxels."""

    out_axis = 1

    def _takes(self: Any, x: Tensor) -> bool:
        return x.ndim == self.weight.ndim and x.shape[1] == self.in_channels

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.movedim((0, 1), (-1, -2)).flatten(0, -2)  # (*kernel, out, in)

    def _product(self: Any, q: Tensor, scale: float, zero: int, packed: Sequence[Any], out: torch.dtype) -> Tensor:
        return image(spread(super()._product(tokens(q), scale, zero, packed, out), self.stride))

    def _float(self: Any, x: Tensor, weight: Tensor) -> Tensor:
        product = {4: F.conv_transpose2d, 5: F.conv_transpose3d}[weight.ndim]
        y: Tensor = product(x, weight, self.bias, self.stride)
        return y


class Int8ConvTranspose2d(_Int8ConvTranspose, nn.ConvTranspose2d):
    """nn.ConvTranspose2d with weights and input in 8 bits; its kernel is its stride."""


class Int8ConvTranspose3d(_Int8ConvTranspose, nn.ConvTranspose3d):
    """nn.ConvTranspose3d with weights and input in 8 bits; its kernel is its stride."""


_KINDS: dict[type[nn.Module], type[Int8]] = {
    nn.Linear: Int8Linear,
    nn.Conv2d: Int8Conv2d,
    nn.Conv3d: Int8Conv3d,
    convolution.Conv3d: Int8Conv3d,
    nn.ConvTranspose2d: Int8ConvTranspose2d,
    nn.ConvTranspose3d: Int8ConvTranspose3d,
    convolution.ConvTranspose2d: Int8ConvTranspose2d,
    convolution.ConvTranspose3d: Int8ConvTranspose3d,
}
_ROUNDED = (nn.Conv1d, nn.ConvTranspose1d, *_KINDS)  # layers that can have a rounded weight


def _has_integers(layer: nn.Module) -> bool:
    """Whether the layer can be computed in integers."""
    if type(layer) not in _KINDS or not _can_round(layer):
        return False
    if isinstance(layer, nn.Linear):
        return True
    if isinstance(layer, (nn.ConvTranspose2d, nn.ConvTranspose3d)):
        bare = not any((*layer.padding, *layer.output_padding)) and set(layer.dilation) == {layer.groups} == {1}
        return bare and layer.kernel_size == layer.stride
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _can_round(layer: nn.Module) -> bool:
    return plain(layer, _ROUNDED) and layer.weight.dtype == torch.float32


@torch.no_grad()
def _become(layer: Any, scale: float = 1.0, zero: int = 0) -> None:
    """Compute the layer in integers from now on; scale and zero point are those of its input."""
    kind = _KINDS[type(layer)]
    weight, weight_scale = _integer_weights(layer.weight, kind.out_axis)
    bias = layer.bias
    del layer.weight, layer.bias
    layer.__class__ = kind
    layer._packed = None
    layer.register_buffer("weight", weight)
    layer.register_buffer("weight_scale", weight_scale)
    layer.register_buffer("bias", None if bias is None else bias.detach())
    layer.register_buffer("input_scale", torch.tensor(scale))
    layer.register_buffer("input_zero_point", torch.tensor(zero, dtype=torch.int32))


def _roundable(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a layer that rounding leaves useful: of a convolution or a linear layer, or a matrix of weights of its own (x_proj_weight)."""
    for name, value in layer.named_parameters(recurse=False):
        if value.dtype == torch.float32 and (_can_round(layer) if name == "weight" else name.endswith("_weight") and value.ndim > 1):
            yield name, value


@torch.no_grad()
def _store(network: nn.Module, name: str) -> None:
    """Round a weight of the network to 8 bits. It stays a parameter; the network's state has NAME_int8 and NAME_scale in its place."""
    parent, _, key = name.rpartition(".")
    owner = network.get_submodule(parent)
    if key not in dict(_roundable(owner)):
        raise ValueError(f"expected a weight that can be rounded, got {name}")
    weight = owner.get_parameter(key)
    weight.copy_(_of_rows(owner, *_rows(owner, weight)))
    owner.register_state_dict_post_hook(partial(_saved, key))
    owner.register_load_state_dict_pre_hook(partial(_loaded, key))


def _saved(key: str, owner: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    name = prefix + key
    state[f"{name}_int8"], state[f"{name}_scale"] = _rows(owner, state.pop(name).detach())


def _loaded(key: str, owner: nn.Module, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    name = prefix + key
    if f"{name}_int8" in state:
        state[name] = _of_rows(owner, state.pop(f"{name}_int8"), state.pop(f"{name}_scale"))


def _rows(owner: nn.Module, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight in 8 bits, and one scale for each output of a layer, for each row of another matrix."""
    q, scale = _integer_weights(_as_rows(owner, weight))
    return q.reshape(weight.shape), scale


def _of_rows(owner: nn.Module, q: Tensor, scale: Tensor) -> Tensor:
    return floats(_as_rows(owner, q), scale).reshape(q.shape)


def _as_rows(owner: nn.Module, weight: Tensor) -> Tensor:
    return weight.flatten(1) if type(owner) in _ROUNDED else weight.flatten(0, -2)


def _integer_weights(weight: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
    """Q and t, one t for each index of `axis`. t has 16 bits, so that Q t is exact and gives the same Q and t again."""
    largest = weight.abs().movedim(axis, 0).flatten(1).amax(1)
    fraction, exponent = torch.frexp(largest / 127)
    scale = torch.ldexp((fraction * 2**16).ceil() / 2**16, exponent).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight / _along(scale, weight, axis)).round().to(torch.int8), scale


@wrap_torch_function(lambda weight, *_: (weight,))  # an exporter may put its own in the place of it
def floats(weight: Tensor, scale: Tensor, axis: int = 0) -> Tensor:
    """Weights (int8) with a scale for each index of `axis`, in floating point."""
    return weight.float() * _along(scale, weight, axis)


def _along(scale: Tensor, weight: Tensor, axis: int) -> Tensor:
    return scale.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])


# -- what a layer's input is ------------------------------------------------------------------------------------------------------------------------


def _run(network: nn.Module, batch: Tensor, see: Callable[[nn.Module, Tensor], None]) -> None:
    """The network on a batch; `see` gets every layer that is called, before, and its input. Layers that a kernel only reads are not called."""

    def hook(layer: nn.Module, given: tuple[Any, ...]) -> None:
        if given and isinstance(given[0], Tensor):
            see(layer, given[0])

    handle = register_module_forward_pre_hook(hook)
    try:
        with torch.no_grad():
            network(batch.contiguous(memory_format=convolution.memory_format(batch.ndim - 2)))
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise UserError(f"batches: expected inputs that the network takes, got {_told(batch)}: {first_line(error)}") from error
    finally:
        handle.remove()


def _told(batch: Tensor) -> str:
    return f"{tuple(batch.shape)}{'' if torch.isfinite(batch).all() else ', not finite'}"


class _Seen(NamedTuple):
    """Of one input of a layer: some of its values, the smallest and the largest."""

    values: Tensor
    least: float
    most: float

    @classmethod
    def of(cls, x: Tensor) -> _Seen:
        flat = x.detach().flatten().float()
        if len(flat) > _SAMPLE:
            chosen = torch.randint(len(flat), (_SAMPLE,), generator=torch.Generator().manual_seed(0))
            return cls(flat[chosen], float(flat.min()), float(flat.max()))
        return cls(flat, float(flat.min()), float(flat.max()))


def _range(seen: Sequence[_Seen], ranges: str, percentile: float) -> tuple[float, int]:
    """Scale and zero point of a layer's input. Zero is one of the values that they give, as zeros pad the input."""
    values = torch.cat([one.values for one in seen])
    values = values[:: len(values) // _MOST + 1]
    least, most = min(0.0, *(one.least for one in seen)), max(0.0, *(one.most for one in seen))
    if ranges == "percentile" and percentile < 100:
        low, high = torch.quantile(values, torch.tensor([1 - percentile / 100, percentile / 100])).tolist()
        least, most = min(0.0, low), max(0.0, high)
    if least == most:
        return 1.0, 0
    if ranges == "mse":

        def error(ends: tuple[float, float]) -> float:
            scale, zero = _affine(*ends)
            return float((rounded(values, torch.tensor(scale), torch.tensor(zero, dtype=torch.int32)) - values).square().sum())

        _, most = min(((least, most * part) for part in _SHRUNK), key=error)
        least, _ = min(((least * part, most) for part in _SHRUNK), key=error)
    return _affine(least, most)


def _affine(least: float, most: float) -> tuple[float, int]:
    scale = (most - least) / 255
    return scale, round(-least / scale)


def _timed(network: nn.Module, batch: Tensor, ranges: Mapping[nn.Module, tuple[float, int]]) -> dict[nn.Module, tuple[float, float]]:
    """Seconds that all calls of each layer take, in floating point and in integers."""
    found = dict.fromkeys(ranges, (0.0, 0.0))
    integers = {layer: copy.deepcopy(layer) for layer in ranges}
    for layer, copied in integers.items():
        _become(copied, *ranges[layer])

    def see(layer: nn.Module, x: Tensor) -> None:
        if layer in found:
            sides = {"float": partial(layer.forward, x), "integers": partial(integers[layer].forward, x)}
            for side in sides.values():
                side()  # compiles oneDNN's kernels
            taken = [min(_seconds(side) for _ in range(3)) for side in sides.values()]
            found[layer] = (found[layer][0] + taken[0], found[layer][1] + taken[1])

    _run(network, batch, see)
    return found


def _seconds(side: Callable[[], object]) -> float:
    begun = time.perf_counter()
    side()
    return time.perf_counter() - begun


# -- the engine -------------------------------------------------------------------------------------------------------------------------------------


@functools.cache
def _engine() -> str | None:
    """What oneDNN adds without overflow on this processor: "8-bit" or "7-bit" weights; None where it has no integer products."""
    x = torch.full((1, 64, 8, 8), 255.0)
    for name, most in (("8-bit", 127), ("7-bit", 63)):
        layer: Any = nn.Conv2d(64, 16, 3, bias=False)
        _become(layer)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch says once that its types of quantized tensors are to go
                q = _integers(x, 1.0, 0)
            y = layer._product(q, 1.0, 0, layer._pack(torch.full_like(layer.weight, most), torch.ones(16)), torch.float32)
        except (RuntimeError, AttributeError):
            return None
        if bool((y == 255.0 * most * 64 * 9).all()):
            return name
    return None


def _integers(x: Tensor, scale: float, zero: int) -> Tensor:
    """x in 8 bits without a sign, in x's memory format."""
    q = torch.quantize_per_tensor(x.float(), scale, zero, torch.quint8)
    return torch.empty(0, dtype=torch.uint8).set_(q.untyped_storage(), 0, q.shape, q.stride())


@wrap_torch_function(lambda x, *_: (x,))  # an exporter may put its own in the place of it
def rounded(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x as its 8 bits give it back; the gradient is that of x inside the range."""
    if torch.compiler.is_exporting():  # ONNX lacks PyTorch's operator
        return (((x / scale).round() + zero).clamp(0, 255) - zero) * scale
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)


def _direct(x: Tensor) -> bool:
    """Whether x is a tensor on the CPU that no gradient, tracer or transform follows, and the processor has integer products."""
    if type(x) is not Tensor or x.device.type != "cpu" or not x.is_floating_point() or x.dtype == torch.float64 or torch.compiler.is_compiling():
        return False
    watched = torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() or torch._C._functorch.peek_interpreter_stack()
    return not watched and not (x.requires_grad and torch.is_grad_enabled()) and x.numel() > 0 and _engine() is not None
