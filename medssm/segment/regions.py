"""Regions: classes that overlap, as the whole tumour with its core in it (BraTS), each with a sigmoid output of its own.

A data set names them as nnU-Net does: a value of `labels` is the list of the values that a region is made of, and `regions_class_order` has for each
region the value that is written where the network finds it. Later regions are written over earlier ones, so outer ones come first:

    "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}, "regions_class_order": [1, 2, 3]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medssm.errors import UserError


@dataclass(frozen=True)
class Regions:
    """{name: its values in the label files}, in the order of the network's outputs, and the value that is written for each. Empty without regions."""

    values: dict[str, tuple[int, ...]] = field(default_factory=dict)
    written: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.values)


def take_apart(labels: Any, order: Any, description: Path) -> tuple[Any, Regions]:
    """(labels with one value each, the regions) of the entries `labels` and `regions_class_order` in the file `description`.

    Labels without a list of several values are given back as they are. A value that has no name of its own is called value_VALUE.

    Raises:
        UserError: a region has a value that is none, `regions_class_order` does not fit, or a region would be written over by a later one.
    """
    if not isinstance(labels, dict) or not any(isinstance(value, (list, tuple)) for value in labels.values()):
        return labels, Regions()
    lists = {str(name): tuple(value) if isinstance(value, (list, tuple)) else (value,) for name, value in labels.items()}
    for name, values in lists.items():
        if not values or not all(isinstance(value, int) for value in values):
            raise UserError(f"{description}: labels: {name}: expected a value or a list of values, got {labels[name]!r}")
    singles = {name: values[0] for name, values in lists.items() if len(set(values)) == 1}
    if len(singles) == len(lists):
        return singles, Regions()
    regions = {name: tuple(sorted(set(values))) for name, values in lists.items() if name != "ignore" and set(values) != {0}}
    for name, values in regions.items():
        if {0, singles.get("ignore")} & set(values):
            raise UserError(f"{description}: labels: {name}: a region has neither the background's value nor the ignored one, got {list(values)}")
    if (
        not isinstance(order, list)
        or len(order) != len(regions)
        or not all(value in part for value, part in zip(order, regions.values(), strict=True))
    ):
        names = ", ".join(regions)
        raise UserError(
            f"{description}: regions_class_order: expected for each of {names} one of its values, to write where it is found, got {order!r}"
        )
    for i, (name, value) in enumerate(zip(regions, order, strict=True)):
        over = [other for other, values in list(regions.items())[i + 1 :] if value in values and order[list(regions).index(other)] != value]
        if over:
            raise UserError(f"{description}: regions_class_order: {name} is written over by {over[0]}, which holds it: name the outer region first")
    named = {value: name for name, value in singles.items()}
    every = sorted({0, *(value for values in regions.values() for value in values)})
    plain = {named.get(value, f"value_{value}" if value else "background"): value for value in every}
    return plain | {name: value for name, value in singles.items() if name == "ignore"}, Regions(regions, tuple(order))


def decided(probabilities: Iterable[Tensor], classes: Sequence[int], regions: Regions) -> Tensor:
    """Positions in `classes`, (*spatial), from the probabilities (*spatial) of each output, one after the other or as one tensor.

    Without regions it is the largest probability's. With regions it is that of the last region whose probability is above one half, else 0.
    """
    positions, best = torch.zeros((), dtype=torch.int64), torch.full((), 0.5 if regions else -1.0)
    for i, found in enumerate(probabilities):
        better = found > best.to(found.device)
        positions = torch.where(better, classes.index(regions.written[i]) if regions else i, positions.to(found.device))
        best = best if regions else torch.where(better, found, best.to(found.device))
    return positions


def structures(classes: Mapping[str, int], regions: Regions) -> dict[str, tuple[int, ...]]:
    """{name: values} of all that is segmented and scored: the regions, or the classes without the background."""
    return regions.values or {name: (value,) for name, value in classes.items() if value}
