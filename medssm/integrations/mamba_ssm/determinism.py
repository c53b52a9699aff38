"""mamba_ssm.utils.determinism: whether sums of a fork's own Triton kernels must not depend on the order of their programs, and the memory for that.

medssm's ops follow torch.use_deterministic_algorithms alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_stated: bool | None = None


def set_deterministic_mode(value: bool | None) -> None:
    """State it; None leaves it to MAMBA_DETERMINISTIC=0 or 1 and then to torch.use_deterministic_algorithms."""
    global _stated
    _stated = value


def use_deterministic_mode() -> bool:
    """Whether it is so now."""
    if _stated is not None:
        return _stated
    said = os.environ.get("MAMBA_DETERMINISTIC")
    return said.startswith("1") if said else torch.are_deterministic_algorithms_enabled()


def autotune_configs(configs: Sequence[Any]) -> Sequence[Any]:
    """The Triton configurations to choose among; in deterministic mode only that with the smallest blocks times stages."""
    return [min(configs, key=cost)] if configs and use_deterministic_mode() else configs


def alloc_tile_workspace(
    base_shape: Sequence[int] | None, tile_dim: int, dtype: torch.dtype, device: torch.device, deterministic: bool, *, zero_init: bool = True
) -> tuple[Tensor | None, int]:
    """(memory for a sum over tiles, the distance of two tiles in it): base_shape, if deterministic with a last axis of tile_dim.

    Without a shape (None, 0).
    """
    if base_shape is None:
        return None, 0
    if not deterministic:
        return torch.empty(*base_shape, dtype=dtype, device=device), 0
    memory = (torch.zeros if zero_init else torch.empty)(*base_shape, tile_dim, dtype=dtype, device=device)
    return memory, memory.stride(-1)


def finalize_tile_workspace(tensor: Tensor | None, deterministic: bool) -> Tensor | None:
    """The sum over the tiles of what alloc_tile_workspace gave."""
    return tensor.sum(-1) if tensor is not None and deterministic else tensor


def cost(config: Any) -> int:
    cost = getattr(config, "num_stages", 1) or 1
    for name, size in config.kwargs.items():
        cost *= size if name.startswith("BLOCK_SIZE_") else 1
    return cost
