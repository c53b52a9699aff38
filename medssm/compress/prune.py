"""Pruning: channels, states and heads that count little are removed from a network, and their time with them."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medssm.compress.cost import Cost, costs, multiply_adds
from medssm.compress.couplings import groups_of
from medssm.compress.groups import Group, Groups, sizes_below
from medssm.compress.importance import Batches, Loss, scores
from medssm.errors import UserError


def prune(
    network: nn.Module, share: float, example: Tensor, *, batches: Batches = (), loss: Loss | None = None, multiple: int = 16
) -> tuple[nn.Module, dict[str, Any]]:
    """A copy of a network with so many channels, states and heads removed that at most `share` of its multiply-adds are left.

    Step by step a group loses its least important units: always the group that loses the least importance (`importance.scores`) for a millisecond
    saved, as measured on this machine. No group is cut below a quarter of its size. What is left is to be trained further: norms over channels have
    other statistics.

    Args:
        network: of blocks that declare their coupled channels (`couplings`)
        share: of the multiply-adds to keep, above 0 and below 1
        example: (b, c, *spatial), an input of the size at which it will work
        batches: images and labels, for the first-order importance
        loss: of the network's output and a label; None takes the magnitude of the weights
        multiple: of which the numbers of channels that are left are, with half of it where there are few

    Returns:
        The network, and the step for config.json: {"kind": "prune", "in_channels", "sizes": {group: units that are left}}.

    Raises:
        UserError: the network declares nothing, or cannot be cut so far.
    """
    if not 0 < share < 1:
        raise UserError(f"prune: expected a share of the multiply-adds to keep, above 0 and below 1, got {share}")
    network = copy.deepcopy(network)
    in_channels = example.shape[1]
    groups = groups_of(network, in_channels)
    important = scores(network, groups, example, batches, loss)
    cuts = _cuts(important, _Work(groups, costs(network, example)), multiple)
    whole = multiply_adds(network, example)

    def after(count: int) -> nn.Module:
        """The network after the first cuts."""
        small = copy.deepcopy(network)
        groups_of(small, in_channels).cut({cut.group: cut.kept for cut in cuts[:count]})
        return small

    count = next((i for i, cut in enumerate(cuts, 1) if cut.multiply_adds <= share * whole), len(cuts))
    small = after(count)
    while (left := multiply_adds(small, example)) > share * whole:  # what a cut leaves was estimated
        if count == len(cuts):
            raise UserError(f"prune: expected a share of at least {left / whole:.3f}, as no group is cut below a quarter of its size, got {share}")
        count, small = count + 1, after(count + 1)
    while count > 1 and multiply_adds(less := after(count - 1), example) <= share * whole:
        count, small = count - 1, less
    sizes = {cut.group: len(cut.kept) for cut in cuts[:count]}
    return small, {"kind": "prune", "in_channels": in_channels, "sizes": dict(sorted(sizes.items()))}


def restructure(network: nn.Module, step: Mapping[str, Any]) -> nn.Module:
    """The network, changed in place, with the sizes that a step of `prune` gave it."""
    groups = groups_of(network, step["in_channels"])
    sizes = {group.name: group for group in groups.all}
    groups.cut({name: sizes[name].first(size) for name, size in step["sizes"].items()})
    return network


class _Cut(NamedTuple):
    """The units of a group that are kept, and about how many multiply-adds of the network are left then."""

    group: str
    kept: Tensor
    multiply_adds: float


class _Work:
    """The cost of a network's weights as its groups become smaller."""

    def __init__(self, groups: Groups, table: Mapping[tuple[nn.Module, str], Cost]) -> None:
        self.table = table
        self.left = {group: group.size for group in groups.all}
        self.of: dict[Group, set[tuple[nn.Module, str]]] = {}
        self.rows: dict[tuple[nn.Module, str], dict[int, list[tuple[Group, int]]]] = {}
        for group in groups.all:
            for module, name, axis, index in group.slices:
                if (module, name) in table:
                    self.of.setdefault(group, set()).add((module, name))
                    self.rows.setdefault((module, name), {}).setdefault(axis, []).append((group, index.shape[1]))

    def of_group(self, group: Group) -> Cost:
        """Of all weights that have slices of the group."""
        numbers = [(self._numbers(key), self.table[key]) for key in self.of.get(group, ())]
        return Cost(sum(count * cost.multiply_adds for count, cost in numbers), sum(count * cost.milliseconds for count, cost in numbers))

    def share_weights(self, one: Group, other: Group) -> bool:
        """Whether the cost of one group depends on the size of the other."""
        return not self.of.get(one, set()).isdisjoint(self.of.get(other, ()))

    def saved(self, group: Group, size: int) -> Cost:
        """What becomes less with `size` units of the group instead of those that are left."""
        now, before = self.of_group(group), self.left[group]
        self.left[group] = size
        then, self.left[group] = self.of_group(group), before
        return Cost(now.multiply_adds - then.multiply_adds, now.milliseconds - then.milliseconds)

    def _numbers(self, key: tuple[nn.Module, str]) -> float:
        shape = getattr(*key).shape
        count = float(math.prod(shape))
        for axis, parts in self.rows[key].items():
            rows = sum(group.size * width for group, width in parts)
            if rows > shape[axis]:  # groups that share rows, as the heads of a mixer and the keys in each head
                count *= math.prod(self.left[group] / group.size for group, _ in parts)
            else:
                count *= (shape[axis] - sum((group.size - self.left[group]) * width for group, width in parts)) / shape[axis]
        return count


def _cuts(important: Mapping[Group, Tensor], work: _Work, multiple: int) -> list[_Cut]:
    """One cut after the other, as far as it goes."""
    sizes = {group: sizes_below(group, multiple) for group in important}
    ranked = {group: value.view(group.banks, -1).argsort(1, descending=True) for group, value in important.items()}
    cuts: list[_Cut] = []
    left = sum(cost.multiply_adds * getattr(*key).numel() for key, cost in work.table.items())

    def price(group: Group) -> float:
        """Importance lost for a millisecond."""
        each, size = work.left[group] // group.banks, sizes[group][0]
        lost = important[group].view(group.banks, -1).gather(1, ranked[group][:, size // group.banks : each]).sum().item()
        return lost / max(work.saved(group, size).milliseconds, 1e-9)

    prices = {group: price(group) for group in important if sizes[group]}
    while prices:
        group = min(prices, key=prices.__getitem__)
        size = sizes[group].pop(0)
        left -= work.saved(group, size).multiply_adds
        work.left[group] = size
        kept = ranked[group][:, : work.left[group] // group.banks] + torch.arange(group.banks)[:, None] * (group.size // group.banks)
        cuts.append(_Cut(group.name, kept.flatten().sort().values, left))
        if not sizes[group]:
            del prices[group]
        prices |= {other: price(other) for other in prices if work.share_weights(group, other)}
    return cuts
