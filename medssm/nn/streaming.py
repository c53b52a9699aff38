"""A U-Net over a volume of any size in bounded memory: layer after layer, each in slabs of the first spatial axis."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from medssm.nn import sizes
from medssm.nn.blocks import ChannelNorm, ChannelsLast, ConvBlock, DenseBlock, Down, MixerBlock, Up, image, tokens
from medssm.nn.carried import Carried, carried
from medssm.nn.unet import Decoder, Encoder, UNet
from medssm.scratch import Scratch, Store

WORK = 24  # slabs that are in memory at a time, of the widest map: a layer's input and output and what is between
_POINTWISE = (ChannelNorm, nn.BatchNorm2d, nn.BatchNorm3d, nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Dropout, nn.Dropout2d, nn.Dropout3d)


@dataclass(frozen=True)
class View:
    """A map (*spatial, c) that is computed where it is read: `view[rows]`, or slices of more axes. `close` gives back what it is computed from."""

    shape: tuple[int, ...]
    read: Callable[[Any], Tensor]
    close: Callable[[], None] = lambda: None

    def __getitem__(self, key: Any) -> Tensor:
        return self.read(key)


Map: TypeAlias = "View | Store"


@torch.inference_mode()
def streamed(
    network: nn.Module,
    volume: Map,  # (*spatial, channels)
    scratch: Scratch,
    *,
    slab: int = 2**25,
    show: Callable[[int], None] = lambda written: None,
) -> View:
    """The finest logits (*spatial, classes) of a network in eval mode for one volume, equal to those of the whole volume at once.

    Every map between two layers is in `scratch`. Convolutions read a halo; a mixer's scans carry their state from slab to slab, along the axis of
    each order, and its sums over all voxels are taken first. A layer of another kind runs on its whole map, where that is no larger than a slab.

    Args:
        network: a UNet whose decoder concatenates skips, as medssm_unet
        volume: channels last; `volume[rows]` is read
        scratch: where the maps and the result live
        slab: bytes of a map in a slab, or one row where that is more; WORK times as much memory is needed at a time
        show: is called with the bytes of the maps that are written so far

    Raises:
        ValueError: the network or a layer cannot be streamed; the message names it and says that sliding windows take any network.
    """
    return _finest(network, volume, _Run(scratch, slab, next(network.parameters()).device, show))


class Needs(NamedTuple):
    """Bytes that `streamed` needs.

    maps      of all maps that it has at a time, in the scratch
    written   of all maps that it writes
    memory    of memory, about and at most, beside the scratch
    """

    maps: int
    written: int
    memory: int


def needs(network: nn.Module, spatial: Sequence[int], channels: int, slab: int = 2**25) -> Needs:
    """What `streamed` needs for a volume (*spatial, channels), found without computing it. Raises ValueError as `streamed`."""
    with _Counted() as counted, torch.inference_mode():
        run = _Run(counted, slab, torch.device("meta"), lambda written: None)
        _finest(copy.deepcopy(network).to("meta"), View((*spatial, channels), lambda rows: torch.empty(*spatial, channels, device="meta")[rows]), run)
        return Needs(counted.peak, run.written, WORK * run.widest)


def _finest(network: nn.Module, volume: Map, run: _Run) -> View:
    _check(network)
    assert isinstance(network, UNet)
    decoder = network.decoder
    padded = _padded(volume, network)
    x = run.layer(network.encoder.stem, padded, "encoder.stem")
    maps = []
    for s, stage in enumerate(network.encoder.stages):
        before, x = x, run.layer(stage, x, f"encoder.stages.{s}")
        if s == 0 and x is not before:  # the stem's map is no skip
            before.close()
        maps.append(x)
    x = maps.pop()
    if network.bottleneck is not None:
        before, x = x, run.layer(network.bottleneck, x, "bottleneck")
        if x is not before:
            before.close()
    for s, (up, stage) in enumerate(zip(decoder.upsample_layers, decoder.stages, strict=True)):
        y = run.layer(up, x, f"decoder.upsample_layers.{s}")
        x.close()
        joined = _joined(y, maps.pop())
        x = run.layer(stage, joined, f"decoder.stages.{s}")
        if x is not joined:
            joined.close()
    logits = run.layer(decoder.seg_layers[-1], x, f"decoder.seg_layers.{len(decoder.seg_layers) - 1}")
    x.close()
    kept = [-(-w * n // p) for n, p, w in zip(volume.shape[:-1], padded.shape, logits.shape[:-1], strict=False)]
    rest = tuple(slice(n) for n in kept[1:])
    return View((*kept, logits.shape[-1]), lambda rows: logits[(rows, *rest)], logits.close)


class _Counted(Scratch):
    """Counts the bytes of stores and holds none of them."""

    def __init__(self) -> None:
        super().__init__(math.inf, Path(), "")
        self.peak = 0

    def __enter__(self) -> _Counted:
        return self

    def store(self, *shape: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Store:
        """A store without memory."""
        made = Store(shape, device=torch.device("meta"), dtype=dtype)
        self._stores.append(made)
        self.peak = max(self.peak, sum(store.memory for store in self._stores))
        return made


def _check(network: nn.Module) -> None:
    if not isinstance(network, UNet) or type(network).whole is not UNet.whole or network.skips is not None:
        raise ValueError(_refusal("the network", network, "it is no U-Net of plain stages"))
    if network.training:
        raise ValueError("network: expected it in eval mode, got one in training")
    encoder, decoder = network.encoder, network.decoder
    if not isinstance(encoder, Encoder) or type(encoder).stage is not Encoder.stage or encoder.outs is not None or encoder.least > 1:
        raise ValueError(_refusal("encoder", encoder, "it is no sequence of stages"))
    if not isinstance(decoder, Decoder) or not all(join is True for join in decoder.joins):
        raise ValueError(_refusal("decoder", decoder, "it does not concatenate its skips"))
    if network.instance_norms:
        found = next(name for name, layer in network.named_modules() if isinstance(layer, (nn.InstanceNorm2d, nn.InstanceNorm3d)))
        raise ValueError(_refusal(found, network.get_submodule(found), "its statistics need the whole map"))


def _refusal(name: str, layer: nn.Module, why: str) -> str:
    return f"{name} ({type(layer).__name__}) cannot be streamed: {why}; sliding windows take any network"


class _Run:
    """Runs layers, each from a map to a new one in `scratch`."""

    def __init__(self, scratch: Scratch, slab: int, device: torch.device, show: Callable[[int], None]) -> None:
        self.scratch, self.slab, self.device, self.show = scratch, slab, device, show
        self.written = self.widest = 0

    def layer(self, module: nn.Module, x: Map, name: str) -> Map:
        """The layer's output; x itself where the layer changes nothing."""
        if isinstance(module, (ChannelsLast, nn.Identity)):
            return x
        reach = _reach(module)
        if reach is not None:
            return self._local(module, x, *reach)
        if type(module) is MixerBlock:
            mixed = self._mixed(module, x, f"{name}.mixer")
            y = self.layer(module.local, mixed, f"{name}.local")
            mixed.close()
            return y
        if type(module) is nn.Sequential:
            y = x
            for i, part in enumerate(module):
                before, y = y, self.layer(part, y, f"{name}.{i}")
                if before is not x and before is not y:
                    before.close()
            return y
        self._must_fit(module, x, name)
        return self._local(module, x, 0, x.shape[0], None)

    def _local(self, module: nn.Module, x: Map, halo: int, rows_in: int, rows_out: int | None) -> Store:
        """A layer that makes of every `rows_in` rows `rows_out` (None: however many), and sees `halo` rows more on both sides."""
        units, more = x.shape[0] // rows_in, -(-halo // rows_in)
        out: Store | None = None
        for begin, end in self._steps(units, rows_in * self._row(module, x), more):
            low, high = max(0, begin - more), min(units, end + more)
            y = tokens(module(image(self._read(x, slice(low * rows_in, high * rows_in)))))[0]
            each = y.shape[0] // (high - low) if rows_out is None else rows_out
            if out is None:
                out = self.scratch.store(units * each, *y.shape[1:])
            self._write(out, slice(begin * each, end * each), y[(begin - low) * each : (end - low) * each])
        assert out is not None
        return out

    def _mixed(self, block: MixerBlock, x: Map, name: str) -> Store:
        """x + mixer(norm(x))."""
        normed = View(x.shape, lambda key: block.norm(x[key].to(self.device)))
        parts, row = carried(block.mixer, x.shape[:-1]), self._row(block.mixer, x)
        out = self.scratch.store(*x.shape)
        if parts is None or row * x.shape[0] <= self.slab:
            self._must_fit(block.mixer, x, name)
            whole = slice(0, x.shape[0])
            self._write(out, whole, x[whole].to(self.device) + block.mixer(self._read(normed, whole))[0])
            self.widest = max(self.widest, row * x.shape[0])
        else:
            self._carried(parts, normed, x, out, row)
        return out

    def _carried(self, parts: Carried, normed: Map, x: Map, out: Store, row: int) -> None:
        before, after = parts.halo
        u, length = normed, x.shape[0]
        if parts.before is not None:
            u = self.scratch.store(*x.shape[:-1], parts.width[0])
            for begin, end in self._steps(length, row, before):
                low = max(0, begin - before)
                found = parts.before(self._read(normed, slice(low, min(length, end + before))))[0]
                self._write(u, slice(begin, end), found[begin - low : end - low])
        total: Any = None
        if parts.totals is not None:
            for begin, end in self._steps(length, row):
                total = parts.totals(self._read(u, slice(begin, end)), begin, total)
        y = self.scratch.store(*x.shape[:-1], parts.width[1]) if parts.scans else None
        for order, scan in parts.scans:
            assert y is not None
            axis = (order.parameters["axes"] or range(len(x.shape)))[0]
            steps = list(self._steps(x.shape[axis], row * length // x.shape[axis]))
            state: Any = None
            for begin, end in reversed(steps) if order.reverse else steps:
                key = (*[slice(None)] * axis, slice(begin, end))
                found, state = scan(self._read(u, key), self._read(normed, key), state, total)
                y.add(key, found[0])
        for begin, end in self._steps(length, row, after):
            low = max(0, begin - after)
            rows = slice(low, min(length, end + after))
            sums = None if y is None else self._read(y, rows)
            found = parts.after(sums, self._read(u, rows), self._read(normed, rows), low, total)[0, begin - low : end - low]
            self._write(out, slice(begin, end), x[slice(begin, end)].to(self.device) + found)
        u.close()
        if y is not None:
            y.close()

    def _must_fit(self, module: nn.Module, x: Map, name: str) -> None:
        size = self._row(module, x) * x.shape[0]
        if size > self.slab:
            raise ValueError(_refusal(name, module, f"it needs its whole map at once, {size} bytes, where a slab has {self.slab}"))

    def _row(self, module: nn.Module, x: Map) -> int:
        """Bytes of a row of x, or of what the layer makes of it where that is wider."""
        width = max([x.shape[-1], *(p.shape[0] for p in module.parameters())])
        return 4 * width * math.prod(x.shape[1:-1])

    def _steps(self, length: int, row: int, halo: int = 0) -> Iterator[tuple[int, int]]:
        self.widest = max(self.widest, min(max(self.slab, row * (1 + 2 * halo)), row * length))
        step = length if self.device.type == "meta" else max(1, self.slab // row - 2 * halo)
        return ((begin, min(begin + step, length)) for begin in range(0, length, step))

    def _read(self, x: Map, key: Any) -> Tensor:
        return x[key].to(self.device)[None]

    def _write(self, out: Store, rows: slice, values: Tensor) -> None:
        out[rows] = values
        self.written += 4 * values.numel()
        self.show(self.written)


def _reach(module: nn.Module) -> tuple[int, int, int] | None:
    """(rows that a layer sees on both sides, rows of its input, rows of its output that they become); None for a layer that may see all rows."""
    if type(module) in _POINTWISE:
        return 0, 1, 1
    if isinstance(module, (nn.Conv2d, nn.Conv3d)):
        size, step, pad = module.dilation[0] * (module.kernel_size[0] - 1) + 1, module.stride[0], module.padding[0]
        if module.padding_mode == "zeros" and isinstance(pad, int) and -step <= 2 * pad - size < 0:
            return max(pad, size - step - pad), step, 1
    if type(module) is DenseBlock:
        first, second = _reach(module.conv1), _reach(module.conv2)
        return None if first is None or second is None else (first[0] + second[0], 1, 1)
    if type(module) is ConvBlock:
        return _reach(module.conv)
    if type(module) is Down:
        return _reach(module[1])
    if type(module) is Up:
        return 0, 1, module.stride[0]
    return None


def _padded(volume: Map, network: UNet) -> View:
    """The volume with zeros behind it, as the network pads it."""
    *spatial, channels = volume.shape
    wanted = sizes.pad_to(torch.empty(1, channels, *spatial, device="meta"), network.size_divisor, network.size).shape[2:]

    def read(rows: slice) -> Tensor:
        start, stop, _ = rows.indices(wanted[0])
        part = volume[slice(min(start, spatial[0]), min(stop, spatial[0]))]
        missing = [stop - start - part.shape[0], *(w - n for w, n in zip(wanted[1:], spatial[1:], strict=True))]
        return nn.functional.pad(part, [0, 0, *(p for m in reversed(missing) for p in (0, m))])

    return View((*wanted, channels), read)


def _joined(first: Map, second: Map) -> View:
    """Both maps, one behind the other along the channels."""
    shape = (*first.shape[:-1], first.shape[-1] + second.shape[-1])

    def close() -> None:
        first.close()
        second.close()

    return View(shape, lambda key: torch.cat([first[key], second[key]], -1), close)
