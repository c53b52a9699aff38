"""Coupled channels: which slices of a network's tensors belong to one channel, state or head, and the network without some of them.

A block declares what it does with the channels of its input (`couplings`) by the methods of `Groups`: which tensors read them, which write new ones
or add to them. Skips, concatenations, residuals and gates need no words of their own: the same channels are given to several layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medssm.errors import UserError

Norm = (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class Slice(NamedTuple):
    """What belongs to a group in one tensor: unit i has the rows `rows[i]` of the axis."""

    module: nn.Module
    name: str
    axis: int
    rows: Tensor  # (units, rows)


@dataclass(eq=False)
class Group:
    """Units that can only be removed with all their slices.

    name     the path of the layer that makes them, and what they are
    size     how many there are
    kind     "channels"; "states" and "heads" of a mixer; "fixed" for what stays, as the channels of the image
    banks    they fall into so many equal parts, one behind the other, each of which keeps as many
    slices   in the network's tensors
    on_cut   called with the units that stay, before the slices go
    """

    name: str
    size: int
    kind: str = "channels"
    banks: int = 1
    slices: list[Slice] = field(default_factory=list)
    on_cut: list[Callable[[Tensor], None]] = field(default_factory=list)

    def first(self, count: int) -> Tensor:
        """The first `count` units, as many of each bank."""
        return (torch.arange(self.banks)[:, None] * (self.size // self.banks) + torch.arange(count // self.banks)).flatten()


Channels = tuple[Group, ...]  # of a map: those of one group behind those of another


def total(x: Channels) -> int:
    """The number of channels."""
    return sum(group.size for group in x)


class Groups:
    """The groups of one network, filled by the declarations of its blocks.

    Args:
        network: any whose blocks `declarations` knows
        declarations: {class of a module: (groups, module, channels of its input) -> channels of its output}
    """

    def __init__(self, network: nn.Module, declarations: Mapping[type[nn.Module], Callable[..., Channels]]) -> None:
        self.declarations, self.all = declarations, list[Group]()
        self._names = {module: name for name, module in network.named_modules()}
        self._after: list[Callable[[], None]] = []

    def new(self, module: nn.Module, size: int, kind: str = "channels", banks: int = 1, what: str = "") -> Group:
        """A group that a module makes."""
        self.all.append(Group(self._names[module] + (f".{what}" if what else ""), size, kind, banks))
        return self.all[-1]

    def take(self, group: Group, module: nn.Module, name: str, axis: int = 0, index: Tensor | None = None) -> None:
        """The tensor `name` of a module, if there is one, has the rows `index` (units, rows) for the group's units; by default a row for each."""
        if getattr(module, name) is not None:
            index = torch.arange(group.size) if index is None else index
            group.slices.append(Slice(module, name, axis, index.reshape(group.size, -1)))

    def along(self, x: Channels, module: nn.Module, name: str, axis: int = 0, start: int = 0, repeat: int = 1) -> None:
        """The tensor has a row for each channel, from `start` on, `repeat` times."""
        at = start
        for group in x:
            self.take(group, module, name, axis, at + torch.arange(repeat) * total(x) + torch.arange(group.size)[:, None])
            at += group.size

    def after(self, update: Callable[[], None]) -> None:
        """Called when the slices are gone and the groups have their new sizes: attributes of modules that say how many there are."""
        self._after.append(update)

    def pass_through(self, module: nn.Module, x: Channels, out: Channels | None = None) -> Channels:
        """What the module makes of channels, or what it adds to `out`, where its declaration takes that. Raises UserError for one without."""
        self._check(module)
        return self.declarations[type(module)](self, module, x, *(() if out is None else (out,)))

    def _check(self, module: nn.Module) -> None:
        """UserError for a module that declares nothing."""
        if type(module) not in self.declarations:
            named = dict.fromkeys(kind.__name__ for kind in self.declarations if kind.__module__.startswith("medssm."))
            layer, ours = self._names[module], [name for name in named if not name.startswith("_")]
            raise UserError(
                f"prune: {type(module).__name__}{f' ({layer})' if layer else ''} does not say which of its channels belong together: "
                f"expected a network of PyTorch's layers and {', '.join(ours)}"
            )

    def linear(self, layer: Any, x: Channels, out: Channels | None = None, repeat: int = 1) -> Channels:
        """A layer with a matrix (outputs, inputs, …) and a bias; its outputs are new channels, or are added to `out`, or hold it `repeat` times."""
        self._check(layer)
        out = (self.new(layer, layer.weight.shape[0] // repeat),) if out is None else out
        self.along(x, layer, "weight", 1)
        for name in ("weight", "bias"):
            self.along(out, layer, name, 0, repeat=repeat)
        self.after(lambda: resize(layer))
        return out

    def convolution(self, layer: Any, x: Channels, out: Channels | None = None) -> Channels:
        """A convolution: of all channels, or of each one alone."""
        self._check(layer)
        if layer.groups == 1:
            return self.linear(layer, x, out)
        if layer.groups != layer.in_channels or layer.in_channels != layer.out_channels:
            raise UserError(f"prune: {self._names[layer]}: a convolution of {layer.groups} groups of channels declares no coupled channels")
        return self.each(layer, x)

    def transposed(self, layer: Any, x: Channels, out: Channels | None = None) -> Channels:
        """A transposed convolution of all channels."""
        if layer.groups > 1:
            raise UserError(
                f"prune: {self._names[layer]}: a transposed convolution of {layer.groups} groups of channels declares no coupled channels"
            )
        out = (self.new(layer, layer.weight.shape[1]),) if out is None else out
        self.along(x, layer, "weight", 0)
        self.along(out, layer, "weight", 1)
        self.along(out, layer, "bias")
        self.after(lambda: resize(layer))
        return out

    def each(self, layer: nn.Module, x: Channels) -> Channels:
        """A layer that treats each channel alone, or normalises them: its tensors have a row for each."""
        if isinstance(layer, nn.Identity):
            return x
        for name in ("weight", "bias", "running_mean", "running_var"):
            if hasattr(layer, name):
                self.along(x, layer, name)
        self.after(lambda: resize(layer, total(x)))
        return x

    def in_parts(self, layer: nn.GroupNorm, x: Channels) -> Channels:
        """A group norm: each of its groups keeps as many channels."""
        (group, *others), parts = x, layer.num_groups
        if others or (parts % group.banks and group.banks % parts):
            raise UserError(f"prune: {self._names[layer]}: a group norm over joined channels declares no coupled channels")
        group.banks = max(group.banks, parts)
        return self.each(layer, x)

    def cut(self, kept: Mapping[str, Tensor]) -> None:
        """Remove all units but those kept, of the groups that are named, from the network: real removal, the tensors are smaller.

        Afterwards these groups are of no further use. Raises KeyError for a group that is not there.
        """
        groups = {group.name: group for group in self.all}
        removed: dict[tuple[nn.Module, str], dict[int, list[Tensor]]] = {}
        for name, units in kept.items():
            group = groups[name]
            gone = torch.ones(group.size, dtype=torch.bool)
            gone[units] = False
            for update in group.on_cut:
                update(units)
            for module, tensor, axis, index in group.slices:
                removed.setdefault((module, tensor), {}).setdefault(axis, []).append(index[gone].flatten())
            group.size = len(units)
        for (module, tensor), axes in removed.items():
            setattr(module, tensor, _without(getattr(module, tensor), axes))
        for change in self._after:
            change()


def _without(tensor: Tensor, axes: Mapping[int, Sequence[Tensor]]) -> Tensor:
    """The tensor, or the parameter with its marks, without these rows."""
    value = tensor.detach()
    for axis, rows in axes.items():
        stays = torch.ones(value.shape[axis], dtype=torch.bool, device=value.device)
        stays[torch.cat(list(rows)).to(value.device)] = False
        value = value.index_select(axis, torch.arange(len(stays), device=value.device)[stays])
    if not isinstance(tensor, nn.Parameter):
        return value
    parameter = nn.Parameter(value, tensor.requires_grad)
    parameter.__dict__.update(tensor.__dict__)
    return parameter


def resize(layer: Any, channels: int | None = None) -> None:
    """Set the numbers of a layer of PyTorch to what its weights are now; `channels` for a norm without weights."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        layer.normalized_shape = (channels if layer.weight is None else len(layer.weight),)
    elif isinstance(layer, nn.GroupNorm):
        layer.num_channels = channels if layer.weight is None else len(layer.weight)
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = len(layer.weight)
    elif isinstance(layer, Norm):
        layer.num_features = channels if layer.weight is None else len(layer.weight)
    elif isinstance(layer, (nn.ConvTranspose2d, nn.ConvTranspose3d)):
        layer.in_channels, layer.out_channels = layer.weight.shape[:2]
    elif layer.groups > 1:
        layer.in_channels = layer.out_channels = layer.groups = layer.weight.shape[0]
    else:
        layer.out_channels, layer.in_channels = layer.weight.shape[:2]


def rows(starts: Sequence[int], units: int, width: int = 1) -> Tensor:
    """(units, rows): unit i has `width` rows behind each start, from i width on."""
    return torch.cat([start + torch.arange(units * width).view(units, width) for start in starts], 1)


def sizes_below(group: Group, multiple: int) -> list[int]:
    """The sizes that a group may be cut to, the largest first, none below a quarter of its size.

    Channels: multiples of `multiple`, then half of it, and a quarter of it where there are no more than half of it. States and heads: as many of each
    bank, in steps of an eighth.
    """
    each = group.size // group.banks
    least = math.ceil(each / 4)
    if group.kind == "fixed":
        return []
    if group.kind == "channels" and group.banks == 1:
        small = [multiple // 2] if each > multiple // 2 else [multiple // 4]
        found = [*range(multiple * (each // multiple), 0, -multiple), *small]
    else:
        step = max(1, each // 8)
        found = list(range(each - step, 0, -step))
    return [size * group.banks for size in found if least <= size < each and size > 0]
