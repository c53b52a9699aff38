"""What training chooses for a network of this package: strides by nnU-Net's rules, for a patch of a shape and a spacing, and deep supervision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medssm.models import list_models
from medssm.models.registry import model_options
from medssm.nn import UNet
from medssm.segment import networks

_SMALLEST = 4  # voxels along an axis of the coarsest map


def strides_and_kernels(patch: Sequence[int], spacing: Sequence[float], stages: int) -> tuple[list[list[int]], list[list[int]]]:
    """Per stage and axis: a stride of 2 and a kernel of 3 where the voxels, as the stage has them, are less than twice as long as the shortest.

    Elsewhere both are 1. A stride of 2 leaves 4 voxels at least; a kernel stays 3 once it is.
    """
    size, edge = np.array(patch), np.array(spacing, float)
    strides, kernels, wide = [[1] * len(patch)], [], np.zeros(len(patch), bool)
    for stage in range(stages):
        if stage:
            large = size >= 2 * _SMALLEST
            halved = large & (edge < 2 * edge[large].min()) if large.any() else large
            size, edge = np.where(halved, -(-size // 2), size), np.where(halved, 2 * edge, edge)
            strides.append(np.where(halved, 2, 1).tolist())
        wide |= edge < 2 * edge.min()
        kernels.append(np.where(wide, 3, 1).tolist())
    return strides, kernels


def open_stages(model: object, kwargs: Mapping[str, Any]) -> int | None:
    """The number of stages of a network whose strides may be chosen for the patch; None for any other network, or where `kwargs` has the strides."""
    if not isinstance(model, str) or model not in list_models() or "strides" not in model_options(model) or "strides" in kwargs:
        return None
    network = networks.build(model, **kwargs)
    return len(network.encoder.strides) if isinstance(network, UNet) else None


def supervised(model: object, kwargs: Mapping[str, Any]) -> dict[str, bool]:
    """Keywords for logits at every level, where the network has them, is one of this package, and `kwargs` says nothing of them."""
    ours = isinstance(model, str) and model in list_models() and not model.startswith("monai_")
    return {"deep_supervision": True} if ours and "deep_supervision" in set(model_options(str(model))) - set(kwargs) else {}


def patch_multiples(shape: Sequence[float], spacing: Sequence[float], stages: int) -> list[int]:
    """What each edge of a patch should be a multiple of: the product of the strides that a volume of this shape is given."""
    strides, _ = strides_and_kernels([math.ceil(length) for length in shape], spacing, stages)
    return np.prod(strides, axis=0).tolist()
