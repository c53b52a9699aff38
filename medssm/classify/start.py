"""What the training of a classifier may begin with, and learn from: networks that were trained before, with all that was fitted to their data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from medssm.classify.images import Fitted
from medssm.classify.table import Sample, classes_of
from medssm.errors import UserError
from medssm.files import read_json
from medssm.segment import networks
from medssm.segment.data import FITTED
from medssm.segment.distil import checked_teacher
from medssm.segment.start import check_trainable


class Start(NamedTuple):
    """A classifier with its weights, what its config.json says of it, and what was fitted to its data."""

    network: nn.Module
    config: dict[str, Any]
    fitted: Fitted

    @classmethod
    def of(cls, run: Path) -> Start:
        """A finished training's. Raises UserError for what cannot be read, and for a network that was given as a module."""
        fitted = Fitted.load(run / FITTED)
        return cls(networks.load(run), read_json(run / networks.CONFIG), fitted)

    def check(self, samples: Sequence[Sample]) -> None:
        """UserError where the images have other classes than the network."""
        if classes_of(samples) != self.fitted.classes:
            raise UserError(
                f"dataset: expected the classes that the network was trained for, {', '.join(self.fitted.classes)}, "
                f"got {', '.join(classes_of(samples))}"
            )

    def check_trainable(self, argument: str) -> None:
        """UserError that names the argument, where a step of the network's compression is for inference alone."""
        check_trainable(self.config, argument)


def teacher_for(run: Path, fitted: Fitted, held_out: Sequence[Sample]) -> nn.Module:
    """The network of a run that may teach one for which `fitted` was fitted.

    Raises UserError where it sees other images or gives other classes, or has learnt from one of the images that are held out.
    """
    alike = ("channels", "classes", "shape", "sizes", "spacing", "intensity")
    return checked_teacher(run, Fitted.load(run / FITTED), fitted, alike, [(sample.name, sample.path) for sample in held_out], "image", "images")
