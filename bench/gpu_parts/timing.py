"""Times on a GPU, and the floors they are held against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_CACHE = 120 << 20  # bytes: calls rotate over copies of their inputs that together outgrow the second-level cache


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def copies(make: Callable[[int], list[torch.Tensor]], rehearse: bool) -> list:
    """Enough inputs to outgrow the cache, each from its own seed: make(seed) gives the tensors of one call."""
    first = make(0)
    size = sum(t.numel() * t.element_size() for t in first)
    return [first, *(make(seed) for seed in range(1, 1 if rehearse else min(16, -(-_CACHE // size))))]


def times(sides: dict[str, Callable[[int], object]], seconds: float) -> dict[str, float]:
    """Median seconds of a call of each side, the sides taking turns; side(i) is the i-th call, which picks its inputs by i."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(3):
        for side in sides.values():
            side(0)
    synchronize()
    begun, i = time.perf_counter(), 0
    while i < 10 or (time.perf_counter() - begun < seconds and i < 300):
        for name, side in sides.items():
            taken[name].append(_one(side, i))
        i += 1
        if time.perf_counter() - begun > 4 * seconds:
            break
    return {name: statistics.median(t) for name, t in taken.items()}


def _one(side: Callable[[int], object], i: int) -> float:
    if DEVICE == "cpu":
        begun = time.perf_counter()
        side(i)
        return time.perf_counter() - begun
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    side(i)
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def peak_memory(side: Callable[[int], object]) -> int:
    """Bytes that one call takes above what was there before it, at its peak."""
    if DEVICE == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    side(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@dataclass(frozen=True)
class Floor:
    """What the chip can do, per second: bytes copied (measured), exponentials (16 per multiprocessor and clock), float32 operations (128)."""

    bytes: float
    exps: float
    flops: float

    @classmethod
    def of(cls, rehearse: bool) -> Floor:
        if DEVICE == "cpu":
            return cls(1e10, 1e10, 1e11)
        source = torch.empty(1 << (20 if rehearse else 30), dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        seconds = times({"copy": lambda _: target.copy_(source)}, 0.3)["copy"]
        properties = torch.cuda.get_device_properties(0)
        clock = getattr(properties, "clock_rate", 1_755_000) * 1e3
        return cls(2 * source.numel() / seconds, properties.multi_processor_count * 16 * clock, properties.multi_processor_count * 128 * clock)

    def scan(self, tokens: int, state: int, element: int, backward: bool) -> float:
        """Seconds below which no selective scan of so many tokens x channels stays: each input read and each output written once, one exponential
        a state and two for softplus (backward four more), and in backward 14 operations a state."""
        moved, exps, flops = (5 * element, state + 4, 14 * state + 20) if backward else (3 * element, state + 2, 4 * state + 8)
        return tokens * max(moved / self.bytes, exps / self.exps, flops / self.flops)

    def stream(self, elements: int, element: int) -> float:
        """Seconds to read and write so many elements once."""
        return 2 * elements * element / self.bytes

    def describe(self) -> dict[str, float]:
        return asdict(self)
