"""The training cases ready for cropping: oriented and resampled once, then kept in memory or in a cache folder."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from monai.data import PersistentDataset
from monai.data.utils import json_hashing
from monai.transforms import Transform

import medssm
from medssm.errors import UserError
from medssm.files import disk_error, first_line, make_folder
from medssm.segment.cases import Case
from medssm.segment.data import Dataset
from medssm.segment.images import files_of
from medssm.segment.intensity import Scaling, scaling
from medssm.segment.preprocess import IGNORE, Fitted, load_image, load_label, pad

_CENTRES = 20_000  # voxels of each class that a patch may be centred on
Arrays: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"  # image (c, x, y, z) float32, not yet scaled; label (x, y, z) int16


@dataclass(frozen=True)
class Volume:
    """One case: image (c, x, y, z), not yet scaled, with the way to scale it, and label (x, y, z), both at least as large as a patch.

    `classes` holds voxels of each foreground class that the label has, as row-major positions. `labelled` holds voxels that have a label; it is
    None if all have.
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
    nan: float | None = None,
    show: Callable[[float, str], None] = lambda fraction, text: None,
) -> list[Arrays]:
    """Each case's image and label, oriented and resampled.

    Args:
        cases: the cases to read
        dataset: the data set they belong to
        spacing: millimetres along the RAS axes; 0 keeps an axis as it is
        cache: a folder that keeps the arrays for the next time; None reads the files
        nan: what takes the place of voxels that are not finite; None refuses them
        show: is called with the part that is done, 0 to 1, and the name of the case

    Raises:
        UserError: with one line for each case that cannot be read.
    """
    loaded: list[Arrays] = []
    errors: list[str] = []
    for i, case in enumerate(cases):
        try:
            loaded.append(_load_cached(case, dataset, spacing, Path(cache), nan) if cache else _load(case, dataset, spacing, nan))
        except UserError as error:
            errors.append(str(error))
        show((i + 1) / len(cases), case.name)
    if errors:
        raise UserError("\n".join(errors))
    return loaded


def prepare(name: str, image: torch.Tensor, label: torch.Tensor, fitted: Fitted, seed: int) -> Volume:
    """A case ready for cropping.

    Args:
        name: of the case
        image: (c, x, y, z), not yet scaled
        label: (x, y, z), positions of classes and IGNORE
        fitted: what was fitted to the training cases
        seed: of the choice of voxels, for a class that has very many
    """
    how = scaling(image, fitted.intensity)
    image = pad(image, fitted.volume_patch)[0]
    label = pad(label[None], fitted.volume_patch, value=0)[0][0]
    random, flat = np.random.default_rng(seed), label.numpy().reshape(-1)
    kept = flat != IGNORE
    labelled = None if kept.all() else _some(np.flatnonzero(kept), random)
    return Volume(name, image, label, how, _by_class(flat, random), labelled)


def _load(case: Case, dataset: Dataset, spacing: Sequence[float], nan: float | None) -> Arrays:
    return load_image(case, len(dataset.channels), spacing, nan).as_tensor(), load_label(case, dataset, spacing)


def _load_cached(case: Case, dataset: Dataset, spacing: Sequence[float], cache: Path, nan: float | None) -> Arrays:
    """The same from an entry of MONAI's PersistentDataset, which is named by all that it depends on and mapped into memory, not read.

    A damaged entry is made again. The entry is written in `cache` under another name first, so a second process never sees half of one.
    """
    paths = [path for file in (*case.images, case.label) if file for path in files_of(file)]
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    key = {
        "medssm": medssm.__version__,
        "files": files,
        "channels": len(dataset.channels),
        "spacing": list(spacing),
        "classes": list(dataset.classes.values()),
        "ignore": dataset.ignore,
        "nan": nan,
    }
    entry = cache / f"{json_hashing(key).decode()}.pt"
    try:
        arrays = _mapped(entry)
        if arrays is None:
            entry.unlink(missing_ok=True)
            with _temporary_files_in(cache):
                PersistentDataset([key], _Read(case, dataset, spacing, nan), cache, hash_func=json_hashing)[0]
            arrays = _mapped(entry)
    except RuntimeError as error:  # MONAI wraps what `_Read` raises; torch.save raises this one itself on a full disk
        raise error.__cause__ or UserError(f"cache: {cache}: cannot be written ({first_line(error)})") from error
    except OSError as error:
        raise disk_error(cache, error) from error
    if arrays is None:  # MONAI is silent about a folder that it may not write to
        raise UserError(f"cache: {cache}: cannot be written")
    return arrays


class _Read(Transform):
    """`_load` for PersistentDataset, which calls it with the key of an entry that does not exist yet."""

    def __init__(self, case: Case, dataset: Dataset, spacing: Sequence[float], nan: float | None):
        self.case, self.dataset, self.spacing, self.nan = case, dataset, spacing, nan

    def __call__(self, key: dict[str, Any]) -> dict[str, torch.Tensor]:
        image, label = _load(self.case, self.dataset, self.spacing, self.nan)
        return {"image": image, "label": label}


def _mapped(entry: Path) -> Arrays | None:
    """The arrays of an entry; None if there is none or it is damaged."""
    try:
        arrays = torch.load(entry, map_location="cpu", mmap=True, weights_only=True)
        return arrays["image"], arrays["label"]
    except Exception:  # a damaged file raises RuntimeError, EOFError, UnpicklingError, KeyError, ...
        return None


@contextlib.contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Python's temporary files in `folder`: MONAI renames one to its entry, which is atomic on one file system only."""
    make_folder(folder)
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def _by_class(flat: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, ...]:
    foreground = np.flatnonzero(flat > 0)
    order = np.argsort(flat[foreground], kind="stable")
    _, starts = np.unique(flat[foreground][order], return_index=True)
    return tuple(_some(part, random) for part in np.split(foreground[order], starts[1:]) if len(part))


def _some(positions: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return positions if len(positions) <= _CENTRES else random.choice(positions, _CENTRES, replace=False)
