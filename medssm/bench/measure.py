"""Timing and memory: the sides of a comparison take turns in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

Side = Callable[[], object]
_TURN = 0.3  # seconds


def times(
    sides: dict[str, Side], seconds: float, threads: int, limit: float | None = None, *, once: float | None = None
) -> dict[str, dict[str, Any]]:
    """Seconds of each side: {"min", "median", "calls"}.

    The sides take turns until the time is spent, for three rounds at least. A turn is one call, or several calls of a short side: the first call
    after another side's turn finds that side's data in the caches. The first call of each side is not counted.

    Args:
        sides: the calls to time, by name
        seconds: of all rounds together
        threads: of PyTorch and of our kernels
        limit: another side than the first, whose calls take longer, in seconds, is called in one round only
        once: a side whose first call takes longer is not called again: that call counts
    """
    torch.set_num_threads(threads)
    taken: dict[str, list[float]] = {name: [] for name in sides}
    first = {name: _time(side) for name, side in sides.items()}
    if once is not None:
        taken |= {name: [t] for name, t in first.items() if t > once}
    sides = {name: side for name, side in sides.items() if not taken[name]}
    begun, rounds, live = time.perf_counter(), 0, dict(sides)
    while live and (rounds < 3 or (time.perf_counter() - begun < seconds and rounds < 200)):
        if rounds == 1 and limit is not None:
            live = {name: side for i, (name, side) in enumerate(sides.items()) if i == 0 or min(first[name], *taken[name]) <= limit}
        for name, side in live.items():
            ends = time.perf_counter() + _TURN
            taken[name].append(_time(side))
            while time.perf_counter() < ends:
                taken[name].append(_time(side))
        rounds += 1
    return {name: {"min": min(t), "median": statistics.median(t), "calls": len(t)} for name, t in taken.items()}


def _time(side: Side) -> float:
    begun = time.perf_counter()
    side()
    return time.perf_counter() - begun


def call_overhead(side: Side, calls: int = 300, repeats: int = 40) -> float:
    """Seconds of one call of a tiny side: the smallest mean over `calls` calls, of `repeats` means."""
    torch.set_num_threads(1)
    return min(_time(lambda: [side() for _ in range(calls)]) for _ in range(repeats)) / calls


def peak_above(side: Side) -> int | None:
    """Bytes of resident memory that one call takes above what the process held before it, at its peak; None where the system is not Linux.

    The peak is Linux's VmHWM. Writing 5 to clear_refs resets it; psutil can neither read nor reset it.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        return None
    reset.write_text("5")
    before = psutil.Process().memory_info().rss
    side()
    peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return max(0, int(peak.split()[1]) * 1024 - before)
