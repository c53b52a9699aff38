"""What is known of a network beside its code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple


class Plan(NamedTuple):
    """The U-Net that nnU-Net planned for a data set: its patch and batch, and lists with one entry per stage, decoder_blocks one fewer."""

    patch: list[int]
    batch: int
    features: list[int]
    strides: list[list[int]]
    kernels: list[list[int]]
    blocks: list[int]
    decoder_blocks: list[int]

    def first(self, stages: int) -> Plan:
        """The same for its first stages."""
        return self._replace(
            features=self.features[:stages],
            strides=self.strides[:stages],
            kernels=self.kernels[:stages],
            blocks=self.blocks[:stages],
            decoder_blocks=self.decoder_blocks[: stages - 1],
        )


class Facts(NamedTuple):
    """What a network's file says of it when it registers.

    paper: an arXiv number, or a DOI of what arXiv has not. source: the repository that it follows; licence: that repository's.
    task: "segment", logits (b, classes, *spatial), or "classify", logits (b, classes). dims: the numbers of spatial dimensions.
    small: the options that make it as small as it goes; tests build it so. sizes: the presets that timm's names are made of.
    input: (channels, *spatial) that benchmarks give it, with so many `classes`.
    from_plan: the options that it takes from nnU-Net's plan, beside those that are given; None for a network that needs none.
    of_width: (width, patch) -> the options that give it so many channels at full resolution, for the comparison of networks at equal multiply-adds;
    the width need not be whole, as coarser stages have multiples of it. None for a network that is compared as it is.
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
    from_plan: Callable[[Plan, Mapping[str, Any]], dict[str, Any]] | None = None
    of_width: Callable[[float, Sequence[int]], dict[str, Any]] | None = None
    parity: str = ""


def halvings(patch: Sequence[int], most: int) -> int:
    """How often every edge of a patch can be halved, at most `most` times."""
    return next(count for count in range(most, -1, -1) if all(edge % 2**count == 0 for edge in patch))


def widths(width: float, times: Sequence[int]) -> list[int]:
    """Channels of stages that are so many times as wide as the first one, rounded."""
    return [max(1, round(width * each)) for each in times]


def groups_of(width: int, most: int = 8) -> int:
    """The largest number of groups, at most `most`, that divides a number of channels."""
    return next(count for count in range(most, 0, -1) if width % count == 0)
