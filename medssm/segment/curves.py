"""Learning curves of one training as a picture, also while it runs."""

from __future__ import annotations

import time
from pathlib import Path

from medssm.files import atomic, read_json_lines

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


class Live:
    """Call it as often as you like: it draws the curves anew where the last time is a minute ago.

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
            draw(self.log, self.picture, self.names)
            self.last = now
