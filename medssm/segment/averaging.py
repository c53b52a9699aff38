"""An exponential moving average of a network's weights while it is trained: what is then validated and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class WeightAverage(AveragedModel):
    """a_(t+1) = d_t a_t + (1 - d_t) w_(t+1) over the weights w_t after step t, with a_1 = w_1 and d_t = min(decay, (1 + t) / (10 + t)).

    The smaller d_t of the first steps let the average forget the random weights of the beginning. Buffers, such as the running means of a batch norm,
    are the network's own. `module` is the network with the averaged weights.

    Args:
        network: the network that is trained
        decay: more than 0 and less than 1; 0.999 averages over the last thousand steps or so
    """

    def __init__(self, network: nn.Module, decay: float):
        super().__init__(network, multi_avg_fn=_moving(decay))
        self.module.requires_grad_(False)


def _moving(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    @torch.no_grad()
    def average(averages: Sequence[Tensor], weights: Sequence[Tensor], steps: Tensor | int) -> None:
        kept = min(decay, (1 + int(steps)) / (10 + int(steps)))
        for mean, new in zip(averages, weights, strict=True):
            mean.lerp_(new, 1 - kept)

    return average
