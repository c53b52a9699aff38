"""Scan orders: how a sequence op walks a 2D image or a 3D volume.

An Order is pure data: a kind, its parameters and a direction. `index(shape)` is the row-major position visited at each step, a
permutation; `starts(shape)` are the steps at which the state and a convolution's taps begin anew. Both depend on the spatial shape
alone and are cached. Ops read the tokens in place along the index, so no order needs a copy, a flip or a transpose.
"""

from __future__ import annotations

import ast
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Order", "axes3d", "cross2d", "dilated", "hilbert", "interleaved", "parse", "raster", "snake", "tri3d", "window", "zigzag"]


Shape = tuple[int, ...]
Ints = npt.NDArray[np.int64]
Steps = tuple[Ints, "Ints | None"]  # the position at each step; a number per step that changes where a segment ends, None for one segment


class Order:
    """One way through an image or a volume; made by the functions of this module.

    spec: its canonical text, `parse(spec)` gives the order back. Orders are equal when their specs are.
    """

    __slots__ = ("kind", "parameters", "reverse", "spec")

    def __init__(self, kind: str, reverse: bool = False, **parameters: Any) -> None:
        if kind not in _KINDS:
            raise ValueError(f"kind: expected one of {', '.join(_KINDS)}, got {kind!r}")
        self.kind, self.parameters, self.reverse = kind, parameters, bool(reverse)
        shown = [f"{k}={v!r}" for k, v in parameters.items() if v is not None] + (["reverse=True"] if reverse else [])
        self.spec = f"{kind}({', '.join(shown)})"

    def __repr__(self) -> str:
        return f"orders.{self.spec}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Order) and self.spec == other.spec

    def __hash__(self) -> int:
        return hash(self.spec)

    def __fx_create_arg__(self, tracer: Any) -> Any:
        """How torch.fx writes an order into a graph: as parse(spec)."""
        return tracer.create_node("call_function", parse, (self.spec,), {})

    def reversed(self) -> Order:
        """The same walk from its end to its beginning."""
        return Order(self.kind, not self.reverse, **self.parameters)

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError where this order cannot walk an array of this spatial shape."""
        _check(self, tuple(shape))

    def index(self, shape: Sequence[int]) -> torch.Tensor:
        """(length,) int64: the row-major position visited at each step."""
        return torch.from_numpy(_walk(self, tuple(int(n) for n in shape))[0].copy())

    def starts(self, shape: Sequence[int]) -> torch.Tensor:
        """(segments,) int64, sorted: the steps at which the state and the taps begin anew; [0], and empty for an empty array."""
        return torch.from_numpy(_walk(self, tuple(int(n) for n in shape))[1].copy())


# -- the orders -------------------------------------------------------------------------------------------------------------------


def raster(axes: Sequence[int] | None = None, reverse: bool = False) -> Order:
    """Line after line; axes: the spatial axes from slowest to fastest, default in their own order (row-major)."""
    return Order("raster", reverse, axes=_axes(axes))


def snake(axes: Sequence[int] | None = None, reverse: bool = False) -> Order:
    """Raster with every other line turned round, so that each step moves to a neighbour."""
    return Order("snake", reverse, axes=_axes(axes))


def window(size: int | Sequence[int], axes: Sequence[int] | None = None, reverse: bool = False) -> Order:
    """Windows of `size` voxels a side (an int, or one per axis in array order), raster inside; each window begins anew."""
    return Order("window", reverse, size=_positive(size, "size"), axes=_axes(axes))


def dilated(step: int | Sequence[int], axes: Sequence[int] | None = None, reverse: bool = False, fit: str | None = None) -> Order:
    """The phases of a grid with this step (an int, or one per axis in array order), raster inside; each phase begins anew.

    fit, for images of any size: "half" takes at most half of an axis as its step; "divide" takes a step of 1 where the given one does not divide all.
    """
    if fit not in (None, "half", "divide"):
        raise ValueError(f"fit: expected None, 'half' or 'divide', got {fit!r}")
    return Order("dilated", reverse, step=_positive(step, "step"), axes=_axes(axes), fit=fit)


def interleaved(n: int | None = None, reverse: bool = False) -> Order:
    """The row-major sequence cut in n chunks, visited in turn: the first token of each chunk, the second of each, and so on.

    With n the number of slices of a volume, which None takes (the length of the first axis), this steps through the same in-slice position across
    slices (SegMamba). A length that n does not divide has shorter last chunks: steps past their end are left out.
    """
    return Order("interleaved", reverse, n=None if n is None else _positive(n, "n", scalar=True))


def zigzag(reverse: bool = False) -> Order:
    """Diagonal after diagonal (voxels of equal coordinate sum), every other one turned round, as JPEG scans a block."""
    return Order("zigzag", reverse)


def hilbert(reverse: bool = False) -> Order:
    """A Hilbert curve through the smallest enclosing power-of-two square or cube, the positions outside left out (2D and 3D)."""
    return Order("hilbert", reverse)


def cross2d() -> list[Order]:
    """VMamba's four: rows, columns, and both reversed."""
    forward = [raster((0, 1)), raster((1, 0))]
    return forward + [order.reversed() for order in forward]


def tri3d(n: int | None = None) -> list[Order]:
    """SegMamba's three: forward, reversed, and across n slices, those of the first axis for None."""
    return [raster(), raster(reverse=True), interleaved(n)]


def axes3d() -> list[Order]:
    """Six: each of the three axes fastest in turn, both ways."""
    forward = [raster((0, 1, 2)), raster((0, 2, 1)), raster((1, 2, 0))]
    return forward + [order.reversed() for order in forward]


@functools.lru_cache(maxsize=256)
def parse(spec: str) -> Order:
    """The order of a spec such as "snake(axes=(1, 0), reverse=True)"."""
    found = re.fullmatch(r"(\w+)\((.*)\)", spec)
    makers = {name: globals()[name] for name in _KINDS}
    if not found or found[1] not in makers:
        raise ValueError(f"spec: expected one of {', '.join(_KINDS)} with its arguments, got {spec!r}")
    call = ast.parse(spec, mode="eval").body
    assert isinstance(call, ast.Call)
    order: Order = makers[found[1]](**{k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg})
    return order


# -- walks ------------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _walk(order: Order, shape: Shape) -> tuple[Ints, Ints]:
    _check(order, shape)
    length = math.prod(shape)
    segment = None
    if length:
        parameters = {k: v for k, v in order.parameters.items() if k != "axes"}
        index, segment = _KINDS[order.kind](shape, order.parameters.get("axes") or tuple(range(len(shape))), **parameters)
    else:
        index = np.zeros(0, np.int64)
    if order.reverse:
        index, segment = index[::-1], None if segment is None else segment[::-1]
    starts = np.zeros(min(length, 1), np.int64)
    if segment is not None:
        starts = np.concatenate([starts, 1 + np.flatnonzero(segment[1:] != segment[:-1])])
    return np.ascontiguousarray(index, np.int64), starts.astype(np.int64)


def _grid(shape: Shape) -> list[Ints]:
    """Coordinates of every position in row-major order, one array per axis."""
    return [c.reshape(-1) for c in np.indices(shape, dtype=np.int64)]


def _sorted(keys: Sequence[Ints]) -> Ints:
    """Positions sorted by the keys, the first key slowest."""
    return np.lexsort(keys[::-1])


def _raster(shape: Shape, axes: Shape) -> Steps:
    return np.arange(math.prod(shape), dtype=np.int64).reshape(shape).transpose(axes).reshape(-1), None


def _snake(shape: Shape, axes: Shape) -> Steps:
    at = _grid(shape)
    keys: list[Ints] = []
    turned = np.zeros_like(at[0])
    for axis in axes:
        keys.append(np.where(turned % 2 == 0, at[axis], shape[axis] - 1 - at[axis]))
        turned = turned * shape[axis] + keys[-1]  # the number of the line in the order of the walk
    return _sorted(keys), None


def _window(shape: Shape, axes: Shape, size: int | Shape) -> Steps:
    at, sizes = _grid(shape), _per_axis(size, shape)
    outer = [at[a] // sizes[a] for a in axes]
    index = _sorted([*outer, *(at[a] % sizes[a] for a in axes)])
    return index, _ids(outer, index)


def _dilated(shape: Shape, axes: Shape, step: int | Shape, fit: str | None = None) -> Steps:
    at, steps = _grid(shape), _per_axis(step, shape)
    if fit == "half":
        steps = tuple(min(s, max(1, n // 2)) for s, n in zip(steps, shape, strict=True))
    elif fit == "divide" and any(n % s for s, n in zip(steps, shape, strict=True)):
        steps = (1,) * len(shape)
    phase = [at[a] % steps[a] for a in axes]
    index = _sorted([*phase, *(at[a] // steps[a] for a in axes)])
    return index, _ids(phase, index)


def _interleaved(shape: Shape, _axes: Shape, n: int | None) -> Steps:
    length = math.prod(shape)
    inside = -(-length // (n or shape[0]))
    position = np.arange(length, dtype=np.int64)
    return _sorted([position % inside, position // inside]), None


def _zigzag(shape: Shape, _axes: Shape) -> Steps:
    at = _grid(shape)
    diagonal = np.sum(at, axis=0)
    return _sorted([diagonal, *(np.where(diagonal % 2 == 0, -c, c) for c in at[:-1])]), None


def _hilbert(shape: Shape, _axes: Shape) -> Steps:
    """John Skilling's transform (Programming the Hilbert curve, AIP 2004) of coordinates to the transposed index, then its bits interleaved."""
    bits = max(1, (max(shape) - 1).bit_length())
    x = _grid(shape)
    dims = len(x)
    for b in range(bits - 1, 0, -1):
        q, low = 1 << b, (1 << b) - 1
        for i in range(dims):
            on = (x[i] & q) != 0
            swap = np.where(on, 0, (x[0] ^ x[i]) & low)
            x[0] = np.where(on, x[0] ^ low, x[0] ^ swap)
            if i:
                x[i] = x[i] ^ swap
    for i in range(1, dims):
        x[i] = x[i] ^ x[i - 1]
    fix = np.zeros_like(x[0])
    for b in range(bits - 1, 0, -1):
        fix = np.where((x[-1] & (1 << b)) != 0, fix ^ ((1 << b) - 1), fix)
    x = [c ^ fix for c in x]
    distance = np.zeros_like(x[0])
    for b in range(bits - 1, -1, -1):
        for c in x:
            distance = (distance << 1) | ((c >> b) & 1)
    return np.argsort(distance, kind="stable"), None


_KINDS: dict[str, Callable[..., Steps]] = {
    "raster": _raster,
    "snake": _snake,
    "window": _window,
    "dilated": _dilated,
    "interleaved": _interleaved,
    "zigzag": _zigzag,
    "hilbert": _hilbert,
}


# -- checks -----------------------------------------------------------------------------------------------------------------------


def _check(order: Order, shape: tuple[int, ...]) -> None:
    axes = order.parameters.get("axes")
    if axes is not None and len(axes) != len(shape):
        raise ValueError(f"order: {order.spec} walks {len(axes)} spatial axes, got spatial shape {shape}")
    for name in ("size", "step"):
        value = order.parameters.get(name)
        if isinstance(value, tuple) and len(value) != len(shape):
            raise ValueError(f"order: {order.spec} has {len(value)} values of {name}, got spatial shape {shape}")
    if order.kind == "hilbert" and len(shape) not in (2, 3):
        raise ValueError(f"order: hilbert walks an image or a volume, got spatial shape {shape}")


def _axes(axes: Sequence[int] | None) -> Shape | None:
    if axes is None:
        return None
    axes = tuple(int(a) for a in axes)
    if sorted(axes) != list(range(len(axes))):
        raise ValueError(f"axes: expected a permutation of 0..{len(axes) - 1}, slowest first, got {axes}")
    return axes


def _positive(value: Any, name: str, scalar: bool = False) -> int | Shape:
    values = value if isinstance(value, (tuple, list)) and not scalar else (value,)
    if not values or any(isinstance(v, bool) or not isinstance(v, (int, np.integer)) or v < 1 for v in values):
        raise ValueError(f"{name}: expected {'a positive int' if scalar else 'a positive int, or one per axis'}, got {value!r}")
    return tuple(int(v) for v in value) if isinstance(value, (tuple, list)) else int(value)


def _per_axis(value: int | Shape, shape: Shape) -> Shape:
    return value if isinstance(value, tuple) else (value,) * len(shape)


def _ids(keys: Sequence[Ints], index: Ints) -> Ints:
    """A number per step that changes where any key changes."""
    ids = np.zeros(len(index), np.int64)
    for key in keys:
        ids = ids * (int(key.max()) + 1) + key[index]
    return ids
