"""The training cases ready for cropping: oriented and resampled once, then kept in memory or as arrays in a cache folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from medssm.errors import UserError
from medssm.files import atomic
from medssm.segment.data import Case, Dataset
from medssm.segment.preprocess import IGNORE, Fitted, Scaling, load_image, load_label, pad, scaling

_CENTRES = 20_000  # voxels of each class that a patch may be centred on


@dataclass(frozen=True)
class Volume:
    """One case: image (c, x, y, z), not yet scaled, with the way to scale it, and label (x, y, z), both at least as large as a patch.

    `classes` holds for each foreground class in the label some of its voxels, as row-major positions; `labelled` the same for all that
    is not ignored, None where nothing is.
    """

    name: str
    image: torch.Tensor
    label: torch.Tensor
    scaling: Scaling
    classes: tuple[np.ndarray, ...]
    labelled: np.ndarray | None


def load(
    cases: Sequence[Case],
    dataset: Dataset,
    spacing: Sequence[float],
    cache: Path | str | None,
    show: Callable[[float, str], None] = lambda fraction, text: None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each case's image (c, x, y, z) and label (x, y, z), from `cache` where it has been there before.

    Raises UserError with one line for each case that cannot be read.
    """
    loaded, errors = [], []
    for i, case in enumerate(cases):
        try:
            loaded.append(_load_cached(case, dataset, spacing, Path(cache)) if cache else _load(case, dataset, spacing))
        except UserError as error:
            errors.append(str(error))
        show((i + 1) / len(cases), case.name)
    if errors:
        raise UserError("\n".join(errors))
    return loaded


def prepare(name: str, image: torch.Tensor, label: torch.Tensor, fitted: Fitted, seed: int) -> Volume:
    """A loaded case with what cropping needs."""
    how = scaling(image, fitted.intensity)
    image = pad(image, fitted.volume_patch)[0]
    label = pad(label[None], fitted.volume_patch, value=0)[0][0]
    random, flat = np.random.default_rng(seed), label.numpy().reshape(-1)
    kept = flat != IGNORE
    labelled = None if kept.all() else _some(np.flatnonzero(kept), random)
    return Volume(name, image, label, how, _by_class(flat, random), labelled)


def _load(case: Case, dataset: Dataset, spacing: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    return load_image(case, len(dataset.channels), spacing).as_tensor(), load_label(case, dataset, spacing)


def _load_cached(case: Case, dataset: Dataset, spacing: Sequence[float], cache: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The same through two .npy files, named by all that they depend on and mapped into memory, not read."""
    key = (
        case.name,
        list(spacing),
        list(dataset.classes.values()),
        dataset.ignore,
        [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in (*case.images, case.label)],
    )
    stem = cache / f"{case.name}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}"
    files = stem.with_name(stem.name + "-image.npy"), stem.with_name(stem.name + "-label.npy")
    if not all(file.exists() for file in files):
        for file, array in zip(files, _load(case, dataset, spacing), strict=True):
            with atomic(file) as temporary:
                np.save(temporary, array.numpy())
    return tuple(torch.from_numpy(np.load(file, mmap_mode="c")) for file in files)


def _by_class(flat: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, ...]:
    foreground = np.flatnonzero(flat > 0)
    order = np.argsort(flat[foreground], kind="stable")
    _, starts = np.unique(flat[foreground][order], return_index=True)
    return tuple(_some(part, random) for part in np.split(foreground[order], starts[1:]) if len(part))


def _some(positions: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return positions if len(positions) <= _CENTRES else random.choice(positions, _CENTRES, replace=False)
