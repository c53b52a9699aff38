"""What is known of a network beside its code."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Facts(NamedTuple):
    """What a network's file says of it when it registers.

    paper: an arXiv number. source: the repository that it follows; licence: that repository's.
    task: "segment", logits (b, classes, *spatial), or "classify", logits (b, classes). dims: the numbers of spatial dimensions.
    small: the options that make it as small as it goes; tests build it so. sizes: the presets that timm's names are made of.
    input: (channels, *spatial) that benchmarks give it, with so many `classes`.
    parity: how it was held to its source, where that is not by a parity card (outputs recorded from the source's own classes) alone.
    """

    paper: str = ""
    source: str = ""
    licence: str = ""
    task: str = "segment"
    dims: tuple[int, ...] = (2, 3)
    small: Mapping[str, Any] = MappingProxyType({})
    sizes: tuple[str, ...] = ()
    input: tuple[int, ...] = (1, 64, 64, 64)
    classes: int = 4
    parity: str = ""
