"""Maps at a network's spacing as NIfTI files in the geometry of the image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medssm.files import protect
from medssm.scratch import Scratch, Store, slabs
from medssm.segment.images import Image, is_made_here, nifti, strip_ending
from medssm.segment.resample import Grid, resampled
from medssm.segment.stored import OnFile


def beside(target: Path, name: str) -> Path:
    """The file of a map beside the label map `target`."""
    return target.with_name(f"{strip_ending(target)}_{name.replace(' of ', '-').replace(' ', '-')}.nii.gz")


class Writer:
    """Writes maps beside a label map.

    Args:
        file: the image
        onto: its grid along the RAS axes
        target: the label map
        reads: files that are never written over
        overwrite: write over other files of other origin
        stores: room for a map

    files: {name of a map: its file} of what was written.
    """

    def __init__(self, file: Image, onto: Grid, target: Path, reads: Sequence[Path], overwrite: bool, stores: Scratch) -> None:
        self.file, self.onto, self.target, self.reads, self.overwrite, self.stores = file, onto, target, reads, overwrite, stores
        self.files: dict[str, str] = {}

    def __call__(self, name: str, maps: Sequence[tuple[Grid, Store]]) -> np.ndarray:
        """Write the mean of maps (x, c, y, z), each on its grid, float32; of one channel as a volume, of several with the channels on the last axis.

        Returns the sum over the channels, (x, y, z) along the RAS axes. Raises UserError where another file would be lost.
        """
        path, shape, channels = beside(self.target, name), self.onto.shape, maps[0][1].shape[1]
        protect(path, reads=self.reads, made=is_made_here, overwrite=self.overwrite)
        kept, total = self.stores.store(*shape, *((channels,) if channels > 1 else ())), np.empty(shape, np.float32)
        for rows in slabs(shape[0], 4 * channels * math.prod(shape[1:])):
            part = sum((resampled(_reader(store), grid, self.onto, rows) for grid, store in maps), torch.zeros(())) / len(maps)
            kept[rows] = part.movedim(0, -1) if channels > 1 else part[0]
            total[rows] = part.sum(0).numpy()
        nifti.write(path, OnFile(kept, self.file), self.file)
        kept.close()
        self.files[name] = str(path)
        return total


def _reader(store: Store) -> Callable[[slice], Tensor]:
    return lambda rows: store[rows].movedim(1, 0)
