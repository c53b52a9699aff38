"""Whether a map says anything about the network: other weights must change it, and what it points at must matter more than what it does not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from medssm.segment.explain.attribution import integrated_gradients, occlusion
from medssm.segment.explain.maps import Maps, Scene, box_of
from medssm.segment.explain.score import ClassScore
from medssm.segment.explain.sight import Sight

PARTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)  # of the voxels, removed one after the other
_RANDOM = 3  # random orders


def shuffled(network: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a network that has learned nothing: the numbers of each weight in random order, so that their sizes stay what they were."""
    other = copy.deepcopy(network)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():
            weight.copy_(weight.flatten()[torch.randperm(weight.numel(), generator=random).to(weight.device)].view(weight.shape))
    return other


def rank_correlation(values: Tensor, others: Tensor, where: Tensor) -> float:
    """Spearman's correlation of two maps (c, *spatial) over the voxels in `where`: 1 where the ranks of all voxels are the same; 0 of a map that is
    the same everywhere.

    Adebayo et al., arXiv 1810.03292: a map that other weights do not change says nothing about the network.
    """
    first, second = (part[:, where].flatten().cpu().numpy() for part in (values, others))
    if not (np.ptp(first) and np.ptp(second)):  # there are no ranks
        return 0.0
    return float(spearmanr(first, second).statistic)


def deletion(
    probability: Callable[[Tensor], Tensor], x: Tensor, baseline: Tensor, values: Tensor, where: Tensor, box: Sequence[int], *, seed: int = 0
) -> dict[str, Any]:
    """How the class's probability falls while boxes of voxels become the baseline: those with the largest values first, and in random order.

    Args:
        probability: (b, c, *spatial) -> (b,)
        x, baseline: (c, *spatial)
        values: (c, *spatial), the map; a box counts by the mean of its channels' sum
        where: (*spatial), the voxels that there are
        box: voxels along each axis that are removed together

    Returns:
        {"parts": of the boxes that are removed; "first": the probabilities, with the largest values first; "random": the mean of three orders;
        "area" and "random_area": those under both, from 0 to 1, the smaller the faster the probability falls}.
    """
    number = _boxes(where, box)
    count = int(number.max()) + 1
    inside = number >= 0
    sizes = torch.bincount(number[inside], minlength=count)
    worth = torch.zeros(count, dtype=torch.float64).index_add_(0, number[inside], values.sum(0).cpu().double()[inside]) / sizes
    random = torch.Generator().manual_seed(seed)

    def fall(order: Tensor) -> np.ndarray:
        rank = torch.empty(count, dtype=torch.int64)
        rank[order] = torch.arange(count)
        ranks = torch.where(inside, rank[number.clamp(min=0)], count).to(x.device)
        cut = (torch.where(ranks < round(part * count), baseline, x) for part in PARTS)
        return np.array([float(probability(one[None])) for one in cut])

    first = fall(worth.argsort(descending=True, stable=True))
    by_chance = np.mean([fall(torch.randperm(count, generator=random)) for _ in range(_RANDOM)], axis=0)
    areas = (float(torch.trapezoid(torch.from_numpy(curve), torch.tensor(PARTS, dtype=torch.float64))) for curve in (first, by_chance))
    return {"parts": list(PARTS), "first": first.tolist(), "random": by_chance.tolist(), **dict(zip(("area", "random_area"), areas, strict=True))}


def _boxes(where: Tensor, box: Sequence[int]) -> Tensor:
    """(*spatial): the number of the box that each voxel lies in, from 0; -1 outside of `where`."""
    axes = torch.meshgrid(*[torch.arange(n) // size for n, size in zip(where.shape, box, strict=True)], indexing="ij")
    key = torch.zeros(where.shape, dtype=torch.int64)
    for axis in axes:
        key = key * (int(axis.max()) + 1) + axis
    inside = where.cpu()
    number = torch.full(where.shape, -1, dtype=torch.int64)
    number[inside] = key[inside].unique(return_inverse=True)[1]
    return number


def checked(scene: Scene, sight: Sight, maps: Mapping[str, Maps], batch: int) -> dict[str, Any]:
    """The checks of each method, in the scene of the first window.

    Returns:
        {"rank_correlation": {method: {"values", "sizes"}, both with the map of the shuffled network}, "deletion": {method: see `deletion`}}.
    """
    box = box_of(sight.run.fitted.patch, sight.spacing)
    score = scene.score
    other = ClassScore(shuffled(score.network), score.output, score.regions, score.mask, score.voxels)
    others = {
        "integrated gradients": integrated_gradients(other, scene.x, scene.baseline, batch=batch),
        "occlusion": occlusion(other, scene.x, scene.baseline, box, batch=batch),
    }
    correlations, falls = {}, {}
    for name, found in maps.items():
        assert found.first is not None
        own, other_map = found.first, others[name].values.cpu()
        correlations[name] = {
            "values": rank_correlation(own, other_map, scene.inside),
            "sizes": rank_correlation(own.abs(), other_map.abs(), scene.inside),
        }
        falls[name] = deletion(score.probability, scene.x, scene.baseline, found.first, scene.inside, box)
    return {"rank_correlation": correlations, "deletion": falls}
