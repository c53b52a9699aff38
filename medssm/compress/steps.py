"""The steps by which a network was compressed, as config.json lists them under "compression", and the structure that they give."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

import medssm
from medssm.errors import UserError

# {kind: the module whose restructure(network, step) gives a network of the structure that the step describes}
KINDS = {"prune": "medssm.compress.prune", "factorize": "medssm.compress.factorize", "fold": "medssm.compress.fold", "int8": "medssm.compress.int8"}


def restructured(network: nn.Module, steps: Sequence[Mapping[str, Any]]) -> nn.Module:
    """The network with the structure that the steps give it, one after the other. Its weights are to be loaded afterwards.

    Args:
        network: as it was before the first step; it may be changed in place
        steps: each {"kind": one of KINDS, ...}

    Raises:
        UserError: a step is of no known kind, or does not fit the network.
    """
    for step in steps:
        kind = step.get("kind")
        if kind not in KINDS:
            raise UserError(f"compression: expected steps of the kinds {', '.join(KINDS)}, got {kind!r}: written by a later version of medssm?")
        try:
            network = importlib.import_module(KINDS[kind]).restructure(network, step)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise UserError(f"compression: the step {kind!r} does not fit the network of medssm {medssm.__version__}: {error}") from error
    return network
