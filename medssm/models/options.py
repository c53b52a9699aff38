"""Options that the networks' builders check alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

Preset = TypeVar("Preset")


def preset(sizes: Mapping[str, Preset], size: str, **given: Any) -> Preset:
    """The preset of that name, of a NamedTuple with what is given, unless it is None, in the place of its own; ValueError for another name."""
    if size not in sizes:
        raise ValueError(f"size: expected one of {', '.join(sizes)}, got {size!r}")
    chosen: Any = sizes[size]
    instead = {name: value for name, value in given.items() if value is not None}
    return chosen._replace(**instead) if instead else chosen  # type: ignore[no-any-return]


def only(name: str, value: object, *known: object) -> None:
    """ValueError for a value of upstream's keyword `name` that no network here is built for."""
    if value not in known:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, known))}, got {value!r}")


def doubled(features: int | Sequence[int], stages: int) -> list[int]:
    """Channels per stage: a list as it is, one number doubled from stage to stage."""
    return [features * 2**s for s in range(stages)] if isinstance(features, int) else list(features)


def per_stage(name: str, value: Any, stages: int) -> list[Any]:
    """A new list with one entry per stage, from one number or a list; ValueError for a list of another length."""
    entries = [value] * stages if isinstance(value, int) else list(value)
    if len(entries) != stages:
        raise ValueError(f"{name}: expected {stages} entries, one per stage, got {entries}")
    return entries


def several(name: str, stages: Sequence[object]) -> None:
    """ValueError for a list of fewer than two stages."""
    if len(stages) < 2:
        raise ValueError(f"{name}: expected two stages or more, got {list(stages)}")


def within(name: str, steps: Sequence[int], strides: Sequence[int]) -> list[int]:
    """The steps inside the stages, one per stage: each must divide the product of the later stages' strides, so that it divides every padded map."""
    for s, step in enumerate(steps):
        if math.prod(strides[s + 1 :]) % step:
            raise ValueError(f"{name}: expected stage {s}'s to divide {math.prod(strides[s + 1 :])}, the later strides' product, got {step}")
    return list(steps)


def sides(name: str, value: int | Sequence[int], dims: int) -> list[int]:
    """One number per axis, from a number or a list; ValueError for a list of another length."""
    entries = [value] * dims if isinstance(value, int) else list(value)
    if len(entries) != dims:
        raise ValueError(f"{name}: expected {dims} values, one per axis, got {entries}")
    return entries


def per_axis(name: str, value: Any, stages: int, dims: int) -> list[tuple[int, ...]]:
    """One tuple per stage with one entry per axis, from a number, a list of numbers or a list of lists."""
    entries = [(v,) * dims if isinstance(v, int) else tuple(v) for v in per_stage(name, value, stages)]
    for entry in entries:
        if len(entry) != dims:
            raise ValueError(f"{name}: expected {dims} values for each stage, got {entry}")
    return entries
