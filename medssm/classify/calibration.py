"""The temperature that makes a classifier's probabilities mean what they say, fitted on held-out images.

p = softmax(z / T) of the logits z, so no class that is found changes. T minimises the NLL of the held-out images (Guo et al., arXiv 1706.04599),
summed over them, plus (log T)^2 / 2: few images, or none that is wrong, do not move it far from 1. What is said of the result comes from other images
than those that T was fitted to: the held-out groups are split in two halves, and each half is judged with the temperature of the other one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medssm.classify.folds import assign
from medssm.errors import UserError
from medssm.files import read_json, write_json

CALIBRATION = "calibration.json"


def temperature(logits: Tensor, labels: Tensor) -> float:
    """T > 0 of the smallest NLL and (log T)^2 / 2, by LBFGS on log T.

    Args:
        logits: (images, classes)
        labels: (images,) of the classes, by position
    """
    logits, log_t = logits.double(), torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], lr=1.0, max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits / log_t.exp(), labels) + log_t**2 / (2 * len(labels))
        loss.backward()
        return loss

    optimizer.step(closure)
    return math.exp(log_t.item())


def scaled(logits: Tensor, t: float) -> np.ndarray:
    """softmax(logits / t), (images, classes) float64."""
    result: np.ndarray = (logits.double() / t).softmax(1).numpy()
    return result


def cross_scaled(logits: Tensor, labels: Tensor, groups: Sequence[str], seed: int) -> np.ndarray | None:
    """The probabilities of each image with a temperature that was fitted to the groups of the other half; None below two groups."""
    if len(set(groups)) < 2:
        return None
    half = np.array(assign([str(label) for label in labels.tolist()], list(groups), 2, seed))
    probabilities = np.empty(tuple(logits.shape))
    for part in (0, 1):
        own, other = torch.from_numpy(half == part), torch.from_numpy(half != part)
        probabilities[half == part] = scaled(logits[own], temperature(logits[other], labels[other]))
    return probabilities


def save(path: Path, temperatures: Mapping[str, float], images: int, groups: int) -> None:
    """Write the temperatures of the last and of the best weights."""
    write_json(path, {"temperature": dict(temperatures), "fitted": "NLL of the held-out images", "images": images, "groups": groups})


def load(folder: Path, weights: str) -> float | None:
    """The temperature of a training's "last" or "best" weights; None where none was held out."""
    if not (folder / CALIBRATION).is_file():
        return None
    table: Any = read_json(folder / CALIBRATION)
    try:
        found = float(table["temperature"][weights])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / CALIBRATION}: temperature: expected a number for the {weights} weights") from error
    if not 0 < found < math.inf:
        raise UserError(f"{folder / CALIBRATION}: temperature: expected more than 0, got {found:g}")
    return found
