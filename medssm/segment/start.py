"""What a training may begin with in the place of a new network: one that was trained before, with all that was fitted to its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from medssm.errors import UserError
from medssm.files import read_json
from medssm.segment import networks
from medssm.segment.cases import Case
from medssm.segment.data import FITTED, Dataset
from medssm.segment.preprocess import Fitted
from medssm.segment.volumes import Arrays, Volume, prepare


class Start(NamedTuple):
    """A network with its weights, what its config.json says of it, and what was fitted to its data."""

    network: nn.Module
    config: dict[str, Any]
    fitted: Fitted

    @classmethod
    def of(cls, run: Path) -> Start:
        """A finished training's. Raises UserError for what cannot be read, and for a network that was given as a module."""
        config = read_json(run / networks.CONFIG)
        return cls(networks.load(run), config, Fitted.load(run / FITTED))

    def check(self, table: Dataset) -> None:
        """UserError where a data set has other channels, classes or regions than the network."""
        for what in ("channels", "classes", "ignore", "regions"):
            wanted, found = getattr(self.fitted, what), getattr(table, what)
            if wanted != found:
                raise UserError(f"dataset: {table.name}: expected the {what} that the network was trained for, {_named(wanted)}, got {_named(found)}")

    def check_trainable(self, argument: str) -> None:
        """UserError that names the argument, where a step of the network's compression is for inference alone."""
        check_trainable(self.config, argument)

    def volumes(self, cases: Sequence[Case], arrays: Sequence[Arrays], seed: int) -> list[Volume]:
        """The cases' images and labels, ready for cropping."""
        return [prepare(case.name, *pair, self.fitted, seed) for case, pair in zip(cases, arrays, strict=True)]


def check_trainable(config: Mapping[str, Any], argument: str) -> None:
    """UserError that names the argument, where a step of a network's compression is for inference alone."""
    for step in config.get("compression", []):
        if step["kind"] in ("fold", "int8"):
            raise UserError(f"{argument}: its network has the step {step['kind']}, which is for inference alone: take the run that it was made of")


def _named(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (tuple, dict)) else str(value)
