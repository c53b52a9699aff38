"""The training loss of a classification."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WeightedEntropy(nn.Module):
    """loss = mean over the images of -sum_c w_c t_c log softmax(z)_c, where t = (1 - smoothing) y + smoothing / classes.

    Call it with the logits z (b, classes) and the shares y (b, classes) of the classes, which sum to one.

    Args:
        weights: w, one for each class; None weighs all alike
        smoothing: of the labels, 0 to less than 1
    """

    def __init__(self, weights: Sequence[float] | None, smoothing: float):
        super().__init__()
        self.weights, self.smoothing = None if weights is None else torch.tensor(weights, dtype=torch.float32), smoothing

    def forward(self, logits: Tensor, shares: Tensor) -> Tensor:
        """The loss, a scalar; see the class for the shapes."""
        weights = None if self.weights is None else self.weights.to(logits.device)
        return F.cross_entropy(logits.float(), shares, weights, label_smoothing=self.smoothing)


def balanced_weights(labels: Sequence[int], classes: int) -> list[float]:
    """w_c = images / (classes * images of c): all classes together count alike, and the mean weight of an image is one."""
    counts = np.bincount(labels, minlength=classes)
    return [len(labels) / (classes * int(count)) for count in counts]
