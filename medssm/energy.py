"""The energy that the processors took, from the counters that Linux reads out of them (RAPL, in /sys/class/powercap)."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from types import TracebackType

_COUNTERS = Path("/sys/class/powercap")
_SECONDS = 30.0  # between two readings: a counter begins anew after some minutes at full power


class Energy:
    """`with Energy() as energy: work()`; then energy.joules is what the whole machine's processors took, None where no counter can be read.

    Other programs that run at the time are in it too. Memory and a GPU are not.
    """

    def __init__(self, counters: Path = _COUNTERS) -> None:
        self.joules: float | None = None
        # intel-rapl:0, intel-rapl:1, ... are the processors; what has two numbers is a part of one. AMD's processors have the same names.
        self._files = [folder / "energy_uj" for folder in sorted(counters.glob("intel-rapl:*")) if folder.name.count(":") == 1]
        self._done = threading.Event()
        self._last: list[tuple[int, int]] = []  # of each counter: its value, and where it begins anew

    def __enter__(self) -> Energy:
        self._last = self._readings()
        if self._last:
            self.joules = 0.0
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._last:
            self._done.set()
            self._thread.join()
            self._add()

    def _watch(self) -> None:
        while not self._done.wait(_SECONDS):
            self._add()

    def _add(self) -> None:
        now = self._readings()
        if len(now) != len(self._last) or self.joules is None:  # a counter that cannot be read any more
            self.joules = None
            return
        for (value, _), (before, largest) in zip(now, self._last, strict=True):
            self.joules += (value - before + (largest if value < before else 0)) / 1e6
        self._last = now

    def _readings(self) -> list[tuple[int, int]]:
        """Of each processor; [] where one cannot be read, as without the right to."""
        with contextlib.suppress(OSError, ValueError):
            return [(int(file.read_text()), int(file.with_name("max_energy_range_uj").read_text())) for file in self._files]
        return []
