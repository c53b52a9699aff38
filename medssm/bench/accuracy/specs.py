"""The networks of a comparison as words of a command line: NAME or NAME:option=value,option=value."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn

from medssm.bench.accuracy import nnunet
from medssm.bench.networks import multiply_adds
from medssm.errors import UserError
from medssm.models import list_models, model_facts
from medssm.segment import networks
from medssm.segment.stages import open_stages, strides_and_kernels

PARTS = 8  # of a channel: the steps in which a width is searched


@dataclass(frozen=True)
class Net:
    """A network: the word that named it, its registered name, and its options."""

    text: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The word as the name of a folder."""
        return re.sub(r"[^\w.-]+", "_", self.text).strip("_")

    def build(self, dims: int, channels: int, classes: int) -> nn.Module:
        """The network; UserError where it cannot be built."""
        options = {"spatial_dims": dims, "in_channels": channels, "out_channels": classes, **self.options}
        return nnunet.build(**options) if self.model == nnunet.NAME else networks.build(self.model, **options)


def parse(words: Sequence[str]) -> list[Net]:
    """The networks that words name. Raises UserError for an unknown name, an option without a value, and a word that is there twice."""
    nets = [_parsed(word) for word in words]
    for i, net in enumerate(nets):
        if net.folder in [other.folder for other in nets[:i]]:
            raise UserError(f"models: expected different networks, got {net.text} twice")
    return nets


def _parsed(word: str) -> Net:
    model, _, rest = word.partition(":")
    known = [*list_models(), nnunet.NAME]
    if model not in known and not model.startswith(networks.MONAI):
        raise UserError(f"models: expected one of {', '.join(known)}, or {networks.MONAI}NAME, got {model!r}")
    options = {}
    for part in filter(None, re.split(r",(?=[^\W\d]\w*=)", rest)):  # at commas before a name: a list has commas too
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"models: {word}: expected NAME:option=value,option=value, got {part!r}")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return Net(word, model, options)


def strided(net: Net, shape: Sequence[int], spacing: Sequence[float]) -> Net:
    """The network with the strides that `medssm train` chooses for a patch, where it has strides to choose.

    shape: (1, channels, *patch). spacing: of the patch, in millimetres
    """
    stages = open_stages(net.model, {"spatial_dims": len(shape) - 2, **net.options})
    if stages is None:
        return net
    return Net(net.text, net.model, {**net.options, "strides": strides_and_kernels(shape[2:], spacing, stages)[0]})


def sized(net: Net, wanted: int, shape: Sequence[int], spacing: Sequence[float], classes: int) -> Net:
    """The network with the width at which its multiply-adds are nearest to `wanted`, for an input (1, channels, *patch), and its strides.

    One that is named with options, or that has no width to choose, keeps its width.
    """
    facts = model_facts(net.model) if net.model in list_models() else None
    if net.options or facts is None or facts.of_width is None:
        return strided(net, shape, spacing)
    of_width, patch = facts.of_width, shape[2:]

    def wide(parts: int) -> Net:
        return strided(Net(net.text, net.model, of_width(parts / PARTS, patch)), shape, spacing)

    return wide(nearest(cache(lambda parts: cost(wide(parts), shape, classes)), wanted))


def cost(net: Net, shape: Sequence[int], classes: int) -> int:
    """Multiply-adds of one inference of an input (1, channels, *patch), by PyTorch's counter."""
    return multiply_adds(net.build(len(shape) - 2, shape[1], classes), torch.empty(tuple(shape), device="meta"))


def nearest(count: Callable[[int], float], wanted: float) -> int:
    """The number from 1 up whose count, which grows with it, is nearest to what is wanted."""
    low, high = 1, 2
    while count(high) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < wanted else (low, middle)
    return min((low, high), key=lambda number: abs(count(number) - wanted))
