"""A file's voxels in a store along RAS axes, and back: part after part, so that a file larger than memory can be read and written."""

from __future__ import annotations

from collections.abc import Sequence

import nibabel as nib
import numpy as np
import torch

from medssm.errors import UserError
from medssm.scratch import Scratch, Store
from medssm.segment.images import Image, not_finite
from medssm.segment.images.image import turned, turned_place
from medssm.segment.resample import ras

_PIECE = (2**20, 2**26)  # the fewest and the most voxels that are read together


def read_stored(files: Sequence[Image], nan: float | None, scratch: Scratch) -> Store:
    """The channels of one case, (x, c, y, z) along RAS axes, from the files that `open_channels` gave; `nan` takes the place of what is not finite.

    Raises UserError if a file cannot be read, all voxels are equal, or some are not finite and `nan` is None.
    """
    first, before, bad = files[0], 0, 0
    turn, (_, (x, y, z)) = nib.io_orientation(first.affine), ras(first.affine, first.shape)
    store = scratch.store(x, sum(file.channels for file in files), y, z)
    low, high = np.inf, -np.inf
    for file in files:
        for place, values in file.pieces(int(min(max(scratch.memory / 64, _PIECE[0]), _PIECE[1]))):
            wrong = ~np.isfinite(values)
            bad += int(wrong.sum())
            if nan is not None:
                values[wrong] = nan
            low, high = min(low, values.min()), max(high, values.max())
            channels, rows, *others = turned_place(place, turn, first.shape)
            channels = slice(before + channels.start, before + channels.stop)
            store[(rows, channels, *others)] = torch.from_numpy(np.ascontiguousarray(turned(values, turn).swapaxes(0, 1)))
        before += file.channels
    if bad and nan is None:
        raise UserError(not_finite(first.path, bad))
    if low == high:
        raise UserError(f"{first.path}: every voxel of the image is {low:g}")
    return store


class OnFile:
    """A store along RAS axes, (x, y, z) or (x, y, z, c), as an array with the axes of a file: `view[:, :, z]` and `view[:, :, z, c]` read that part.

    Args:
        store: the store
        image: the file
        values: what stands for each number of the store, as for the positions of classes; None takes them as they are
    """

    def __init__(self, store: Store, image: Image, values: np.ndarray | None = None):
        self.store, self.values = store, values
        self.turn = nib.io_orientation(image.affine)
        self.back = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), self.turn)
        self.shape = (*image.shape, *store.shape[3:])
        self.dtype = torch.empty(0, dtype=store.dtype).numpy().dtype if values is None else values.dtype

    def __getitem__(self, key: tuple[slice | int, ...]) -> np.ndarray:
        place = [slice(*part.indices(size)[:2]) for part, size in zip(key[:3], self.shape, strict=False) if isinstance(part, slice)]
        rows, *others = turned_place((slice(0), place[0], place[1], place[2]), self.turn, self.shape[:3])[1:]
        found = nib.apply_orientation(self.store[(rows, *others)].numpy(), self.back)[(..., *key[3:])]
        return np.asarray(found if self.values is None else self.values[found])

    def __array__(self) -> np.ndarray:
        return self[:, :, :]
