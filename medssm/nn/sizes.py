"""Padding an input to sizes that a network's strides divide, and cropping its outputs: what depends on the numbers of an input's size.

While PyTorch traces or exports, both are operators, medssm::pad and medssm::crop: one program then serves every size, also one that needs no padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from medssm.ops import modes


@torch.fx.wrap
def pad_to(x: Tensor, divisor: Sequence[int], size: str = "any", two: bool = False) -> Tensor:
    """(b, c, *spatial) with zeros behind it, up to a multiple of `divisor` along each axis; x itself where nothing is missing.

    two: what would be one divisor along every axis becomes two along the last. ValueError where size is "strict" and some are missing.
    """
    if x.dim() != 2 + len(divisor):
        raise ValueError(f"x: expected (b, c, *spatial) with {len(divisor)} spatial axes, got {tuple(x.shape)}")
    if size == "strict":
        for axis, (n, d) in enumerate(zip(x.shape[2:], divisor, strict=True)):
            if n % d:
                raise ValueError(f"x: expected spatial axis {axis} to be a multiple of {d}, got {tuple(x.shape[2:])}")
        return x
    if modes.traced():
        padded: Tensor = torch.ops.medssm.pad(x, list(divisor), two, 1)
        return padded
    return _behind(x, _padded(x.shape[2:], divisor, two))


@torch.fx.wrap
def pad_up(x: Tensor, least: int) -> Tensor:
    """(b, c, *spatial) with zeros behind it along each axis of less than `least` voxels."""
    if modes.traced() and least > 1:
        padded: Tensor = torch.ops.medssm.pad(x, [1] * (x.dim() - 2), False, least)
        return padded
    return _behind(x, [max(n, least) for n in x.shape[2:]])


@torch.fx.wrap
def crop(y: Tensor, padded: Tensor, x: Tensor) -> Tensor:
    """The part of an output y (of any resolution) for `padded` that lies over x, which `pad_to` padded."""
    if modes.traced():
        cropped: Tensor = torch.ops.medssm.crop(y, padded, x)
        return cropped
    return _front(y, _kept(y, padded, x))


def _padded(sizes: Sequence[Any], divisor: Sequence[int], two: bool, least: int = 1) -> list[Any]:
    """The sizes, each a multiple of its divisor and at least `least`."""
    if least > 1:
        sizes = [torch.sym_max(n, least) for n in sizes]
    counts = [(n + d - 1) // d for n, d in zip(sizes, divisor, strict=True)]
    if two:
        counts[-1] = torch.sym_max(counts[-1], 3 - math.prod(counts))
    return [n * d for n, d in zip(counts, divisor, strict=True)]


def _kept(y: Tensor, padded: Tensor, x: Tensor) -> list[Any]:
    """The sizes of y's part over x."""
    return [(w * n + p - 1) // p for n, p, w in zip(y.shape[2:], padded.shape[2:], x.shape[2:], strict=True)]


def _behind(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """(b, c, *spatial) with zeros behind it, up to these sizes."""
    missing = [m - n for n, m in zip(x.shape[2:], sizes, strict=True)]
    return functional.pad(x, [p for m in reversed(missing) for p in (0, m)]) if any(missing) else x


def _front(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """The first voxels of (b, c, *spatial), a view."""
    for axis, n in enumerate(sizes, 2):
        x = x.narrow(axis, 0, n)
    return x


# Contiguous outputs, whatever the memory of the inputs is: a compiler may give them another one than it traced.
@torch.library.custom_op("medssm::pad", mutates_args=())
def _pad(x: Tensor, divisor: list[int], two: bool, least: int) -> Tensor:
    y = _behind(x, _padded(x.shape[2:], divisor, two, least))
    return y.clone(memory_format=torch.contiguous_format) if y is x else y.contiguous()


@torch.library.custom_op("medssm::crop", mutates_args=())
def _crop(y: Tensor, padded: Tensor, x: Tensor) -> Tensor:
    return _front(y, _kept(y, padded, x)).clone(memory_format=torch.contiguous_format)


_pad.register_fake(lambda x, divisor, two, least: x.new_empty(x.shape[:2] + tuple(_padded(x.shape[2:], divisor, two, least))))
_crop.register_fake(lambda y, padded, x: y.new_empty(y.shape[:2] + tuple(_kept(y, padded, x))))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.sizes = inputs[0].shape[2:]


_pad.register_autograd(lambda ctx, d: (_front(d, ctx.sizes), None, None, None), setup_context=_remember)
_crop.register_autograd(lambda ctx, d: (_behind(d, ctx.sizes), None, None), setup_context=_remember)
