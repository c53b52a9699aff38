"""The members of an ensemble: the runs of several trainings, the mirrored passes of a run, or passes with dropout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from medssm.errors import UserError
from medssm.segment.inference import mirrorings
from medssm.segment.preprocess import Fitted

Kind: TypeAlias = Literal["folds", "mirror", "dropout"]
PASSES = 10  # with dropout, of each run


class Run(Protocol):
    """A trained network, what was fitted to its data, and its folder."""

    @property
    def folder(self) -> Path: ...
    @property
    def network(self) -> nn.Module: ...
    @property
    def fitted(self) -> Fitted: ...


@dataclass(frozen=True)
class Member:
    """One of the predictions whose probabilities are averaged.

    Args:
        run: the position of its run
        mirror: as `inference.mirrorings` takes it
        seed: of dropout; None leaves dropout off
    """

    run: int
    mirror: bool | tuple[int, ...]
    seed: int | None = None


def members_of(wanted: Kind | Literal["auto"], runs: Sequence[Run], mirror: bool) -> tuple[Kind, list[Member]]:
    """The kind of the members, and the members.

    "auto" is the first kind that there is: several runs ("folds"), the mirrorings that a run was trained with ("mirror"), layers of dropout
    ("dropout"). Mirrored passes and passes with dropout are taken of each run.

    Args:
        wanted: the kind, or "auto"
        runs: of medssm train
        mirror: each member is the mean of all mirrorings

    Raises:
        UserError: there are no members of that kind.
    """
    has: dict[Kind, bool] = {
        "folds": len(runs) > 1,
        "mirror": all(len(mirrorings(run.fitted, True)) > 1 for run in runs) and not mirror,
        "dropout": all(_dropouts(run.network) for run in runs),
    }
    lacks: dict[Kind, str] = {
        "folds": "several runs (--more-runs, or a folder of them), got one",
        "mirror": "a network that was trained with mirroring (train --mirror), and no --mirror beside it",
        "dropout": "a network with dropout, got one without any",
    }
    kind: Kind | None = next((kind for kind in has if has[kind]), None) if wanted == "auto" else wanted
    if kind is None:
        raise UserError(
            "uncertainty: expected several runs (--more-runs), a network that was trained with mirroring, or one with dropout; got none of these"
        )
    if kind not in has:
        raise UserError(f"uncertainty: expected auto, {', '.join(has)}, got {kind!r}")
    if not has[kind]:
        raise UserError(f"uncertainty: {kind} needs {lacks[kind]}")
    if kind == "folds":
        return kind, [Member(i, mirror) for i in range(len(runs))]
    if kind == "mirror":
        return kind, [Member(i, axes) for i, run in enumerate(runs) for axes, _ in mirrorings(run.fitted, True)]
    return kind, [Member(i, mirror, seed) for i in range(len(runs)) for seed in range(PASSES)]


def described(kind: Kind, members: Sequence[Member]) -> str:
    """The members in words."""
    runs = len({member.run for member in members})
    number = len(members) // runs
    of_runs = f" of each of {runs} runs" if runs > 1 else ""
    return {"folds": f"{runs} runs", "mirror": f"{number} mirrored passes{of_runs}", "dropout": f"{number} passes with dropout{of_runs}"}[kind]


@contextlib.contextmanager
def dropping(network: nn.Module, seed: int | None) -> Iterator[None]:
    """Let a network that is not training drop what it drops in training, the same with each seed; with None nothing changes."""
    if seed is None:
        yield
        return
    layers = _dropouts(network)
    devices = {p.device.index for p in network.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)):
        torch.manual_seed(seed)
        for layer in layers:
            layer.train()
        try:
            yield
        finally:
            for layer in layers:
                layer.eval()


def _dropouts(network: nn.Module) -> list[nn.Module]:
    return [layer for layer in network.modules() if isinstance(layer, _DropoutNd) and layer.p > 0]
