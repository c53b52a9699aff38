"""What of an input a score depends on: integrated gradients and occlusion, by captum, of any function from inputs to scores."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from medssm.errors import UserError, install_command

Score: TypeAlias = Callable[[Tensor], Tensor]  # (b, c, *spatial) -> (b,)

STEPS = 32  # points on the way from the baseline to the input


class Attribution(NamedTuple):
    """values (c, *spatial); difference: the score of the input less that of the baseline."""

    values: Tensor
    difference: float


def check_installed() -> None:
    """UserError where captum is missing."""
    if importlib.util.find_spec("captum") is None:
        raise UserError(f"explain: needs the package captum: {install_command('explain')}")


def integrated_gradients(score: Score, x: Tensor, baseline: Tensor, *, steps: int = STEPS, batch: int = 1) -> Attribution:
    """Integrated gradients (Sundararajan et al., arXiv 1703.01365): the gradients on the straight way from the baseline to the input, averaged, times
    the way. Their sum is the difference of the two scores, up to the error of the `steps` points (Gauss-Legendre).

        values = (x - baseline) * mean over a in [0, 1] of the gradient of the score at baseline + a (x - baseline)

    Args:
        score: scores (b,) of inputs (b, c, *spatial)
        x: (c, *spatial)
        baseline: the input without any information, of x's shape
        steps: points on the way
        batch: of them at a time, which bounds the memory
    """
    from captum.attr import IntegratedGradients

    given, start = x[None], baseline[None]
    values = IntegratedGradients(score).attribute(given, start, n_steps=steps, internal_batch_size=batch)
    with torch.no_grad():
        difference = float(score(given)) - float(score(start))
    return Attribution(values.detach()[0].float(), difference)


def occlusion(
    score: Score, x: Tensor, baseline: Tensor, box: Sequence[int], *, batch: int = 1, show: Callable[[float], None] = lambda fraction: None
) -> Attribution:
    """Occlusion (Zeiler and Fergus, arXiv 1311.2901): by how much the score falls when a box of voxels of one channel becomes the baseline. Each
    voxel of the box gets that number. Boxes lie side by side.

    Args:
        score, x, baseline, batch: as in `integrated_gradients`
        box: voxels along each spatial axis
        show: is called with the part that is done, 0 to 1
    """
    from captum.attr import Occlusion

    done, boxes = 0, len(x) * _count(x.shape[1:], box) + 1  # the first call is of x itself

    def counted(inputs: Tensor) -> Tensor:
        nonlocal done
        found = score(inputs)
        done += len(inputs)
        show(min(1.0, done / boxes))
        return found

    with torch.no_grad():
        values = Occlusion(counted).attribute(
            x[None], sliding_window_shapes=(1, *box), strides=(1, *box), baselines=baseline[None], perturbations_per_eval=batch
        )
        difference = float(score(x[None])) - float(score(baseline[None]))
    return Attribution(values[0].float(), difference)


def _count(shape: Sequence[int], box: Sequence[int]) -> int:
    count = 1
    for n, size in zip(shape, box, strict=True):
        count *= -(-n // size)
    return count
