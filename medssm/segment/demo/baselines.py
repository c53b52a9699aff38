"""Two answers without a network, to compare the networks with: the other side's labels mirrored, and intensity alone."""

from __future__ import annotations

import numpy as np

from medssm.segment.demo.data import Brain

_BINS = 256


def mirrored_labels(brain: Brain) -> np.ndarray:
    """The trained side's labels reflected at the template's midline, x = 0, as labels of the tested side.

    It shows how good an answer is that knows where structures lie and never looks at the image. Each voxel takes the label nearest to its
    mirror point.
    """
    axis, x = brain.left_right
    known = np.zeros_like(brain.labels)
    known[brain.trained.box] = brain.labels[brain.trained.box]
    mirror = np.rint((-x - x[0]) / (x[1] - x[0])).astype(int)
    reflected = np.take(known, mirror.clip(0, len(x) - 1), axis)
    np.moveaxis(reflected, axis, 0)[(mirror < 0) | (mirror >= len(x))] = 0
    return reflected[brain.tested.box]


def looked_up_labels(brain: Brain) -> np.ndarray:
    """The tested side's labels by a table from intensity to class, fitted on the trained side.

    It shows how good an answer is that looks at each voxel alone. The table is fitted for the metric itself: starting from background, each of
    256 intensity bins in turn takes the class with which the mean Dice of the trained side is largest, until none changes. (The most frequent
    class of each bin would be background nearly everywhere, because the structures are small.)
    """
    image = brain.voxels
    trained, labels = image[brain.trained.box], brain.labels[brain.trained.box]
    edges = np.linspace(trained.min(), trained.max(), _BINS + 1)[1:-1]
    counts = np.zeros((len(brain.classes), _BINS))
    np.add.at(counts, (labels, np.digitize(trained, edges)), 1)
    return fit_table(counts)[np.digitize(image[brain.tested.box], edges)]


def fit_table(counts: np.ndarray) -> np.ndarray:
    """The class of each bin, (bins,) uint8, from the number of voxels of each class in each bin, (classes, bins), background first."""
    table = np.zeros(counts.shape[1], np.uint8)
    before = None
    while before is None or (table != before).any():
        before = table.copy()
        for i in np.flatnonzero(counts.any(0)):
            trials = np.repeat(table[None], len(counts), 0)
            trials[:, i] = np.arange(len(counts))
            scores = [_mean_dice(counts, trial) for trial in trials]
            if max(scores) > scores[table[i]]:
                table[i] = np.argmax(scores)
    return table


def _mean_dice(counts: np.ndarray, table: np.ndarray) -> float:
    """Mean over the classes of 2 |found and true| / (|found| + |true|)."""
    given = table == np.arange(1, len(counts))[:, None]
    both, found = (counts[1:] * given).sum(1), (counts.sum(0) * given).sum(1)
    return float((2 * both / np.maximum(found + counts[1:].sum(1), 1)).mean())
