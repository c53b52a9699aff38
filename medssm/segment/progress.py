"""The progress of every long task, on standard error: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

LINES_APART = 30.0  # seconds between the lines of a log


@contextlib.contextmanager
def progress(title: str, quiet: bool = False) -> Iterator[Callable[[float, str], None]]:
    """Yields show(fraction, text), which shows the part that is done, the time passed and the time to go. Silent if `quiet`.

    Where standard error is no terminal, as under a job scheduler, it is a plain line every half minute.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not quiet and not console.is_terminal:
        yield _Lines(title)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("passed,"),
        TimeRemainingColumn(),
        TextColumn("to go"),
    )
    with Progress(*columns, console=console, disable=quiet) as bar:
        task = bar.add_task(title, total=1.0, text="")

        def show(fraction: float, text: str) -> None:
            bar.update(task, completed=min(fraction, 1.0), text=text)

        yield show


class _Lines:
    """Progress as lines of text: one every LINES_APART seconds of a task that takes longer than that."""

    def __init__(self, title: str):
        self.title, self.begun, self.last = title, time.monotonic(), time.monotonic()

    def __call__(self, fraction: float, text: str) -> None:
        now = time.monotonic()
        if now - self.last < LINES_APART:
            return
        self.last, passed = now, now - self.begun
        left = f", {_duration(passed * (1 - fraction) / fraction)} to go" if 0 < fraction < 1 else ""
        print(f"{self.title}: {min(fraction, 1.0):.0%}, {text}, {_duration(passed)} passed{left}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
