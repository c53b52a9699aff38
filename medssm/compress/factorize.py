"""Layers of low rank: a linear layer as two, a convolution as two or three smaller ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from medssm.compress.cost import costs
from medssm.errors import UserError
from medssm.nn.convolution import Conv3d

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, Conv3d)
_STEP = 8  # ranks are multiples of it
Method = Literal["svd", "tucker", "spatial"]


class LowRank(nn.Sequential):
    """Layers, one behind the other, in the place of one whose weight has a low rank."""

    @property
    def in_features(self) -> int:
        """As nn.Linear."""
        return int(self[0].in_features)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:
        """As nn.Linear."""
        return int(self[-1].out_features)  # type: ignore[arg-type]


class Form(NamedTuple):
    """A way to write a layer: the method, its ranks, its multiply-adds over the layer's, and the part of the weight's energy |W|^2 that it keeps.

    svd      out <- r <- in, of a linear layer or a convolution of one voxel
    tucker   1 <- r_out <- K <- r_in <- 1: the kernel between two convolutions of one voxel (Tucker-2: Kim et al., arXiv 1511.06530)
    spatial  the kernel along the first axis to r channels, then along the others (Jaderberg et al., arXiv 1405.3866)
    """

    method: Method
    ranks: tuple[int, ...]
    cost: float
    energy: float


def factorize(
    network: nn.Module,
    share: float | None = None,
    *,
    energy: float | None = None,
    milliseconds: float | None = None,
    example: Tensor | None = None,
    channels: int = 32,
) -> tuple[nn.Module, dict[str, Any]]:
    """A copy of a network with its linear layers and convolutions in forms of low rank: of each layer the form that keeps most of the weight's energy
    at its cost, or the cheapest that keeps as much. One of the three arguments says how far to go; a layer without such a form stays as it is.

    Args:
        network: any
        share: of each layer's multiply-adds to keep, above 0 and below 1
        energy: of each layer's weight to keep, above 0, at most 1
        milliseconds: for all these layers together, as measured here for `example`: all keep the largest energy with which they take no longer
        example: (b, c, *spatial), for `milliseconds`
        channels: a layer with fewer inputs or outputs stays as it is

    Returns:
        The network, and the step for config.json: {"kind": "factorize", "layers": {path: [method, *ranks]}}.

    Raises:
        UserError: not one of the three, or out of range.
    """
    given = {"share": share, "energy": energy, "milliseconds": milliseconds}
    if sum(value is not None for value in given.values()) != 1:
        raise UserError(f"factorize: expected one of {', '.join(given)}, got {given}")
    if share is not None and not 0 < share < 1:
        raise UserError(f"factorize: expected a share of each layer's multiply-adds, above 0 and below 1, got {share}")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"factorize: expected an energy above 0 and at most 1, got {energy}")
    network = copy.deepcopy(network)
    forms = {path: _forms(layer) for path, layer in network.named_modules() if _fits(layer, channels)}
    if share is not None:
        chosen = {
            path: max((form for form in found if form.cost <= share), key=lambda form: form.energy, default=None) for path, found in forms.items()
        }
    elif energy is not None:
        chosen = _cheapest(forms, energy)
    else:
        if example is None:
            raise UserError("factorize: expected an example for a budget in milliseconds, got None")
        chosen = _within(network, forms, float(milliseconds or 0), example)
    step = {"kind": "factorize", "layers": {path: [form.method, *form.ranks] for path, form in chosen.items() if form}}
    weights = {path: _factors(network.get_submodule(path), form) for path, form in chosen.items() if form}
    network = restructure(network, step)
    for path, factors in weights.items():
        layers: Any = network.get_submodule(path)
        with torch.no_grad():
            for layer, factor in zip(layers, factors, strict=True):
                layer.weight.copy_(factor.reshape(layer.weight.shape))
    return network, step


def restructure(network: nn.Module, step: Mapping[str, Any]) -> nn.Module:
    """The network, changed in place, with the forms that a step of `factorize` gave its layers; only biases keep their values."""
    for path, (method, *ranks) in step["layers"].items():
        parent, _, name = path.rpartition(".")
        layer: Any = network.get_submodule(path)
        if type(layer) not in (nn.Linear, *_CONVOLUTIONS):
            raise ValueError(f"expected a linear layer or a convolution, got {path} ({type(layer).__name__})")
        setattr(network.get_submodule(parent), name, _layers(layer, method, ranks))
    return network


def _fits(layer: Any, channels: int) -> bool:
    """Whether a layer is one of those that may be written in another form."""
    if type(layer) in _CONVOLUTIONS and (layer.groups > 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        return False
    return type(layer) in (nn.Linear, *_CONVOLUTIONS) and min(layer.weight.shape[:2]) >= channels


def _forms(layer: Any) -> list[Form]:
    """Every form that is cheaper than the layer."""
    weight: Tensor = layer.weight.detach().double()
    outs, ins, *kernel = weight.shape
    voxels = math.prod(kernel)
    whole = outs * ins * voxels  # for each voxel of the output
    steps = [1] if isinstance(layer, nn.Linear) else list(layer.stride)  # a convolution before the steps works at every voxel of the input
    found = []
    if voxels == 1:
        kept = _energies(weight.reshape(outs, ins))
        found = [Form("svd", (r,), r * (ins + outs) / whole, kept[r]) for r in _ranks(min(ins, outs))]
    else:
        kept_in, kept_out = _energies(weight.movedim(1, 0).flatten(1)), _energies(weight.flatten(1))
        for r_in in _ranks(ins):
            for r_out in _ranks(outs):
                cost = (r_in * ins * math.prod(steps) + voxels * r_in * r_out + r_out * outs) / whole
                found.append(Form("tucker", (r_in, r_out), cost, max(0.0, kept_in[r_in] + kept_out[r_out] - 1)))
        if kernel[0] > 1 and voxels > kernel[0]:
            rows = _apart(weight)
            kept = _energies(rows)
            first, rest = kernel[0] * ins * math.prod(steps[1:]), voxels // kernel[0] * outs
            found += [Form("spatial", (r,), r * (first + rest) / whole, kept[r]) for r in _ranks(min(rows.shape))]
    return [form for form in found if form.cost < 1]


def _ranks(most: int) -> list[int]:
    return [*range(_STEP, most, _STEP), most]


def _energies(matrix: Tensor) -> list[float]:
    """For each rank, from 0, the part of the matrix's energy that it keeps."""
    squares = torch.linalg.svdvals(matrix).square()
    return [0.0, *(squares.cumsum(0) / squares.sum().clamp(min=1e-30)).clamp(max=1).tolist()]


def _apart(weight: Tensor) -> Tensor:
    """(out other axes, in first axis) of a kernel (out, in, first axis, *other axes)."""
    return weight.movedim((1, 2), (-2, -1)).flatten(-2).flatten(0, -2)


def _cheapest(forms: Mapping[str, Sequence[Form]], energy: float) -> dict[str, Form | None]:
    """The cheapest form of each layer that keeps so much."""
    return {
        path: min((form for form in found if form.energy >= energy - 1e-12), key=lambda form: form.cost, default=None)
        for path, found in forms.items()
    }


def _within(network: nn.Module, forms: Mapping[str, Sequence[Form]], budget: float, example: Tensor) -> dict[str, Form | None]:
    """Forms of one energy, the largest with which all layers take no longer than the budget, as time goes with multiply-adds."""
    table = costs(network, example)
    spent = {path: table[key].milliseconds * key[0].weight.numel() for path in forms if (key := (network.get_submodule(path), "weight")) in table}  # type: ignore[operator]

    def time(chosen: Mapping[str, Form | None]) -> float:
        return sum(spent.get(path, 0.0) * (form.cost if form else 1.0) for path, form in chosen.items())

    levels: list[float] = sorted({form.energy for found in forms.values() for form in found})
    if not levels or time(_cheapest(forms, levels[0])) > budget:
        least = time(_cheapest(forms, levels[0])) if levels else sum(spent.values())
        raise UserError(f"factorize: expected a budget of at least {least:.3g} ms, which the smallest ranks take, got {budget:.3g}")
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if time(_cheapest(forms, levels[middle])) <= budget else (low, middle - 1)
    return _cheapest(forms, levels[low])


def _factors(layer: Any, form: Form) -> list[Tensor]:
    """The weights of the smaller layers, from the input on."""
    weight: Tensor = layer.weight.detach().double()
    outs, ins, *kernel = weight.shape
    if form.method == "tucker":
        r_in, r_out = form.ranks
        U_in = _left(weight.movedim(1, 0).flatten(1), r_in)
        for _ in range(3):  # alternating least squares, from the higher-order SVD
            U_out = _left(torch.einsum("oi...,ir->or...", weight, U_in).flatten(1), r_out)
            U_in = _left(torch.einsum("oi...,or->ir...", weight, U_out).flatten(1), r_in)
        core = torch.einsum("oi...,ir,os->sr...", weight, U_in, U_out)
        return [U_in.T, core, U_out]
    (rank,) = form.ranks
    matrix = weight.reshape(outs, ins) if form.method == "svd" else _apart(weight)
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    U, V = U[:, :rank] * S[:rank].sqrt(), V[:rank] * S[:rank].sqrt()[:, None]
    if form.method == "svd":
        return [V, U]
    return [V, U.reshape(outs, *kernel[1:], rank).movedim(-1, 1)]  # (rank, in first axis), (out, rank, *other axes)


def _left(matrix: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(matrix, full_matrices=False).U[:, :rank] if rank <= min(matrix.shape) else torch.linalg.qr(matrix, "complete").Q[:, :rank]


def _layers(layer: Any, method: Method, ranks: Sequence[int]) -> LowRank:
    """The smaller layers, with the last one's bias."""
    bias = layer.bias is not None
    options: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        (rank,) = ranks
        parts: list[Any] = [nn.Linear(layer.in_features, rank, bias=False, **options), nn.Linear(rank, layer.out_features, bias=bias, **options)]
    else:
        make: Callable[..., Any] = type(layer)
        ins, outs, dims = layer.in_channels, layer.out_channels, len(layer.kernel_size)
        axes = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation")}
        if method == "tucker":
            r_in, r_out = ranks
            parts = [
                make(ins, r_in, 1, bias=False, **options),
                make(r_in, r_out, **axes, bias=False, **options),
                make(r_out, outs, 1, bias=bias, **options),
            ]
        elif method == "svd":
            (rank,) = ranks
            axes["kernel_size"], padding = 1, axes.pop("padding")
            parts = [make(ins, rank, **axes, padding=padding, bias=False, **options), make(rank, outs, 1, bias=bias, **options)]
        else:
            (rank,) = ranks
            none = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}
            first = {name: (value[0], *[none[name]] * (dims - 1)) for name, value in axes.items()}
            rest = {name: (none[name], *value[1:]) for name, value in axes.items()}
            parts = [make(ins, rank, **first, bias=False, **options), make(rank, outs, **rest, bias=bias, **options)]
    if bias:
        parts[-1].bias = layer.bias
    return LowRank(*parts)
