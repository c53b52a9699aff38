"""Weights from files and from upstream: read without running code, renamed, and fitted with a readable account of what does not fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Map(NamedTuple):
    """How upstream's state dict becomes ours: drop keys that repeat another tensor, transpose the matrices of keys that match a pattern, then rename
    (pattern, replacement) in turn, as re.sub."""

    drop: Sequence[str] = ()
    rename: Sequence[tuple[str, str | Callable[[re.Match[str]], str]]] = ()
    transpose: Sequence[str] = ()

    def __call__(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = {}
        for key, tensor in state.items():
            if any(re.search(pattern, key) for pattern in self.drop):
                continue
            if any(re.search(pattern, key) for pattern in self.transpose):
                tensor = tensor.mT
            for pattern, replacement in self.rename:
                key = re.sub(pattern, replacement, key)
            kept[key] = tensor
        return kept


def read(path: Path | str) -> dict[str, Tensor]:
    """A state dict from model.safetensors, a folder that holds it, or a PyTorch file: tensors, plain Python values and NumPy's numbers (which
    nnU-Net's checkpoints log), nothing else; nothing in a file is run.

    Checkpoints that keep the state dict under "state_dict", "model" or "network_weights" are opened. Raises ValueError.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"pretrained: no file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_numpys_numbers()):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"pretrained: {path} cannot be read as weights: {error}") from error
    for key in ("network_weights", "state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"pretrained: {path} holds no state dict")
    return dict(state)


def _numpys_numbers() -> list[Any]:
    """What unpickles NumPy's scalars and their types, under the names of NumPy 1 and 2."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(code)) for code in np.typecodes["All"] if code != "O"}
    return [np.dtype, (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), *kinds]


def fit(model: M, state: Mapping[str, Tensor]) -> M:
    """Load a state dict whole; raises ValueError that lists missing, unexpected and wrongly shaped keys."""
    own = model.state_dict()
    missing = [f"missing    {k} {tuple(t.shape)}" for k, t in own.items() if k not in state]
    unexpected = [f"unexpected {k} {tuple(t.shape)}" for k, t in state.items() if k not in own]
    shaped = [
        f"shape      {k}: expected {tuple(own[k].shape)}, got {tuple(t.shape)}" for k, t in state.items() if k in own and own[k].shape != t.shape
    ]
    lines = shaped + missing + unexpected
    if lines:
        shown = "\n  ".join(lines[:30]) + (f"\n  … and {len(lines) - 30} more" if len(lines) > 30 else "")
        raise ValueError(f"state_dict: does not fit: {len(shaped)} wrongly shaped, {len(missing)} missing, {len(unexpected)} unexpected:\n  {shown}")
    model.load_state_dict(state)
    return model
