"""The goals of whole networks, each a ratio between sides of one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medssm.bench.goals import Goal
from medssm.bench.networks import BF16, NATIVE, PYTORCH, RECURRENT

NOISE = 0.03  # of a measurement: what is slower by no more counts as not slower


def network_goals(networks: Mapping[str, Any]) -> list[Goal]:
    """For each network: upstream's arithmetic over our time, and bf16 over float32, in inference."""
    return [goal for name, figures in networks.items() for goal in (_against_upstream(name, figures), _bf16(name, figures))]


def wanted(ops: list[str]) -> float:
    """How many times as fast as upstream's arithmetic a network that calls these ops of ours should be."""
    return 3.0 if RECURRENT & {*ops} else 1.5 if "linear_attention" in ops else 1.0


def _against_upstream(name: str, figures: Mapping[str, Any]) -> Goal:
    least, title = wanted(figures.get("ops", [])), f"{name}: upstream's arithmetic in PyTorch / ours"
    inference = figures["inference"]
    if PYTORCH not in inference and figures["small"]:
        inference, title = figures["small"]["inference"], f"{title}, small input"
    if PYTORCH not in inference:
        return Goal(title, f"at least {least:g}", "not measured", None)
    ratio = inference[PYTORCH]["median"] / inference[NATIVE]["median"]
    return Goal(title, f"at least {least:g}", f"{ratio:.3g}", ratio >= least - NOISE)


def _bf16(name: str, figures: Mapping[str, Any]) -> Goal:
    title, inference = f"{name}: bf16 / float32", figures["inference"]
    if BF16 not in inference:
        return Goal(title, "at most 1", "not measured", None)
    ratio = inference[BF16]["median"] / inference[NATIVE]["median"]
    return Goal(title, "at most 1", f"{ratio:.3g}", ratio <= 1 + NOISE)
