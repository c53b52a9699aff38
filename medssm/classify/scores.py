"""What was found in the held-out images, as the folder of a training keeps it: the temperature, the figures and a row for each image."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from medssm.classify import calibration
from medssm.classify.figures import confusion, figures
from medssm.classify.predictions import write_predictions
from medssm.classify.table import Sample
from medssm.files import write_json

PREDICTIONS, SCORES = "predictions.csv", "figures.json"
WRITTEN = (calibration.CALIBRATION, SCORES, PREDICTIONS)


class Scores(NamedTuple):
    """Probabilities (images, classes) at the temperature 1, those at the temperature of the other half, and the figures of both."""

    raw: np.ndarray
    calibrated: np.ndarray
    table: dict[str, Any]


def scored(held_out: Sequence[Sample], logits: Tensor, labels: Tensor, seed: int) -> Scores:
    """The scores of a network's logits (images, classes) of the held-out images, whose classes by position are `labels`."""
    groups, truth = [sample.unit for sample in held_out], labels.tolist()
    raw = calibration.scaled(logits, 1.0)
    halves = calibration.cross_scaled(logits, labels, groups, seed)
    calibrated = raw if halves is None else halves
    uncalibrated = {key: value["value"] for key, value in figures(truth, raw, ["one"] * len(truth)).items()}
    table = confusion(labels.numpy(), calibrated.argmax(1), logits.shape[1])
    return Scores(raw, calibrated, {"figures": figures(truth, calibrated, groups, seed), "uncalibrated": uncalibrated, "confusion": table})


def save(out: Path, scores: Scores, held_out: Sequence[Sample], classes: Sequence[str], temperatures: Mapping[str, float]) -> None:
    """Write calibration.json, figures.json and predictions.csv; the temperatures are those of the last and of the best weights."""
    calibration.save(out / calibration.CALIBRATION, temperatures, len(held_out), len({sample.unit for sample in held_out}))
    write_json(out / SCORES, {"classes": list(classes), **scores.table, "temperature": temperatures["last"]})
    absolute = [dataclasses.replace(sample, path=sample.path.resolve()) for sample in held_out]
    write_predictions(out / PREDICTIONS, absolute, scores.calibrated, classes)
