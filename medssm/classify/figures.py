"""How good a classifier is: figures of its probabilities against the labels, with intervals over groups.

With N images, y_i the class of image i, p_i its probabilities, y'_i = argmax p_i, and n_c images of the class c:
  accuracy           the share of y'_i = y_i
  balanced accuracy  the mean over classes of the recall, the share of y'_i = c among the images of c
  F1                 the mean over classes of 2 TP / (2 TP + FP + FN)
  AUROC              the mean over classes of the chance that an image of the class has a larger p_c than one of another class, ties half
  NLL                the mean of -log p_i[y_i]
  ECE                sum_b n_b / N |accuracy_b - confidence_b| over 15 bins of equal width of the confidence max p_i (Guo et al., arXiv 1706.04599)
A class that no image has counts in no mean. Intervals are 95 % bootstrap percentiles over groups, and only from five groups on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

FIGURES = {"balanced_accuracy": "balanced accuracy", "accuracy": "accuracy", "auroc": "AUROC", "f1": "F1", "nll": "NLL", "ece": "ECE"}
BINS = 15
FEWEST = 5  # groups that an interval is given for
_DRAWS = 2000
_AT_ONCE = 4_000_000  # weights of images in one part of the draws


def figures(labels: Sequence[int], probabilities: np.ndarray, groups: Sequence[str], seed: int = 0) -> dict[str, dict[str, float | None]]:
    """{figure: {"value", "low", "high"}}; low and high are None below five groups, and all three where the figure has no value (AUROC of one class).

    Args:
        labels: the class of each image, by position
        probabilities: (images, classes)
        groups: of each image; images of one group are drawn together
        seed: of the draws
    """
    truth, scores = np.asarray(labels), np.asarray(probabilities, np.float64)
    values = {name: float(value[0]) for name, value in weighted(truth, scores, np.ones((1, len(truth)))).items()}
    bounds: dict[str, tuple[float, float] | tuple[None, None]] = dict.fromkeys(values, (None, None))
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) >= FEWEST:
        random, parts = np.random.default_rng(seed), []
        for _ in range(-(-_DRAWS // (draws := max(1, min(_DRAWS, _AT_ONCE // len(truth)))))):
            times = random.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
            parts.append(weighted(truth, scores, times[:, member].astype(np.float64)))
        for name in values:
            drawn = np.concatenate([part[name] for part in parts])[:_DRAWS]
            if np.isfinite(drawn).any():
                low, high = np.nanpercentile(drawn, (2.5, 97.5))
                bounds[name] = float(low), float(high)
    return {name: {"value": value if np.isfinite(value) else None, "low": bounds[name][0], "high": bounds[name][1]} for name, value in values.items()}


def weighted(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Each figure (draws,) where image i counts weights[draw, i] times."""
    classes, found, total = probabilities.shape[1], probabilities.argmax(1), weights.sum(1)
    right = (found == labels).astype(np.float64)
    positives = np.stack([weights @ (labels == c) for c in range(classes)], 1)  # (draws, classes)
    said = np.stack([weights @ (found == c) for c in range(classes)], 1)
    hits = np.stack([weights @ ((labels == c) & (found == c)) for c in range(classes)], 1)
    there = positives > 0
    recall, f1 = hits / np.where(there, positives, 1), 2 * hits / np.maximum(positives + said, 1e-300)
    rank = np.stack([_auroc(labels == c, probabilities[:, c], weights) for c in range(classes)], 1)
    ranked = np.isfinite(rank)
    truth = probabilities[np.arange(len(labels)), labels]
    return {
        "balanced_accuracy": _mean(recall, there),
        "accuracy": weights @ right / total,
        "auroc": _mean(np.where(ranked, rank, 0), ranked),
        "f1": _mean(f1, there),
        "nll": weights @ -np.log(np.maximum(truth, 1e-12)) / total,
        "ece": _ece(right, probabilities.max(1), weights) / total,
    }


def recalls(labels: np.ndarray, found: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """{class: recall} of the classes that an image has."""
    return {name: float((found[labels == c] == c).mean()) for c, name in enumerate(classes) if (labels == c).any()}


def confusion(labels: np.ndarray, found: np.ndarray, classes: int) -> list[list[int]]:
    """Numbers of images: a row for each class, a column for what was found."""
    table: list[list[int]] = np.bincount(labels * classes + found, minlength=classes**2).reshape(classes, classes).tolist()
    return table


def reliability(labels: np.ndarray, probabilities: np.ndarray) -> list[dict[str, Any]]:
    """For each bin of the confidence that has images: "low", "high", "n", "confidence" and "accuracy"."""
    right, confidence = probabilities.argmax(1) == labels, probabilities.max(1)
    bins, rows = _bin(confidence), []
    for b in np.unique(bins):
        inside = bins == b
        means = {"confidence": float(confidence[inside].mean()), "accuracy": float(right[inside].mean())}
        rows.append({"low": float(b / BINS), "high": float((b + 1) / BINS), "n": int(inside.sum()), **means})
    return rows


def _mean(values: np.ndarray, there: np.ndarray) -> np.ndarray:
    """The mean of each row's values that are there; NaN without any."""
    with np.errstate(invalid="ignore"):
        result: np.ndarray = (values * there).sum(1) / there.sum(1)
    return result


def _auroc(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The area under the ROC curve of each draw; NaN where one side is empty."""
    levels, level = np.unique(scores, return_inverse=True)
    order = np.argsort(level, kind="stable")
    starts = np.searchsorted(level[order], np.arange(len(levels)))
    inside, outside = (np.add.reduceat((weights * side)[:, order], starts, axis=1) for side in (positive, ~positive))
    below = outside.cumsum(1) - outside
    with np.errstate(invalid="ignore", divide="ignore"):
        result: np.ndarray = (inside * (below + outside / 2)).sum(1) / (inside.sum(1) * outside.sum(1))
    return result


def _ece(right: np.ndarray, confidence: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The sum over the bins of |sum of right - sum of confidence|."""
    member = np.zeros((len(right), BINS))
    member[np.arange(len(right)), _bin(confidence)] = right - confidence
    result: np.ndarray = np.abs(weights @ member).sum(1)
    return result


def _bin(confidence: np.ndarray) -> np.ndarray:
    """The bin of each confidence: bin b holds b / 15 < confidence <= (b + 1) / 15."""
    result: np.ndarray = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    return result
