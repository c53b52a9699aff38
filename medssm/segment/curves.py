"""Learning curves of one training as a picture, also while it runs."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path

from medssm.files import atomic, first_line, read_json_lines

logger = logging.getLogger("medssm")

SEGMENTATION = ("loss (Dice + cross-entropy)", "mean Dice of the validation cases")  # what the two axes are called


def draw(log: Path, picture: Path, names: tuple[str, str] = SEGMENTATION) -> None:
    """The loss and the validation's mean by seconds, from metrics.jsonl, as a PNG."""
    from matplotlib.figure import Figure

    records = read_json_lines(log)
    losses = [record for record in records if "loss" in record]
    checks = [record for record in records if "validation" in record]
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([r["seconds"] for r in losses], [r["loss"] for r in losses], color="tab:blue")
    axes.set_xlabel("seconds of training")
    axes.set_ylabel(names[0], color="tab:blue")
    axes.grid(alpha=0.3)
    if checks:
        right = axes.twinx()
        right.plot([r["seconds"] for r in checks], [r["validation"]["mean"] for r in checks], "o-", color="tab:orange")
        right.set_ylabel(names[1], color="tab:orange")
        right.set_ylim(0, 1)
    with atomic(picture) as temporary:
        figure.savefig(temporary)


@contextlib.contextmanager
def said_if_it_fails(path: Path) -> Iterator[None]:
    """What a library that draws `path` raises is a line in the log: a training is worth more than its pictures."""
    try:
        yield
    except Exception as error:
        logger.warning("%s: cannot be drawn (%s: %s)", path, type(error).__name__, first_line(error))


class Live:
    """Call it as often as you like: it draws the curves anew where the last time is a minute ago. What fails is said once, and ends nothing.

    Args:
        log: metrics.jsonl
        picture: the PNG to write
        every: seconds between two drawings
        names: see `draw`
    """

    def __init__(self, log: Path, picture: Path, every: float = 60.0, names: tuple[str, str] = SEGMENTATION):
        self.log, self.picture, self.every, self.last, self.names = log, picture, every, time.monotonic(), names

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self.last >= self.every and self.log.exists():
            self.last = math.inf  # where it fails, the last time
            with said_if_it_fails(self.picture):
                draw(self.log, self.picture, self.names)
                self.last = now
