"""Arrays that live in memory, or in temporary files where they do not fit."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medssm.errors import UserError
from medssm.files import disk_error, make_folder

logger = logging.getLogger("medssm")

_SLAB = 2**22  # bytes of one piece of a store


class Store:
    """An array of numbers, zeros at first, cut along its first axis: in memory or in a file.

    `store[rows, ...]` and `store[rows, ...] = values` take slices. A file is mapped for the time of one access, a few rows after the other: it adds
    nothing to the memory of the process, and what is read is a copy.
    """

    def __init__(self, shape: tuple[int, ...], file: Any = None, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> None:
        self.shape, self.dtype, self._file = shape, dtype, file
        with torch.inference_mode(False):  # so that it may be changed in any mode
            self._tensor = torch.zeros(shape, dtype=dtype, device=device) if file is None else None

    @classmethod
    def of(cls, tensor: Tensor) -> Store:
        """A tensor in memory as a store; it is not copied."""
        made = cls.__new__(cls)
        made.shape, made.dtype, made._file, made._tensor = tuple(tensor.shape), tensor.dtype, None, tensor
        return made

    @property
    def in_file(self) -> bool:
        """Whether it is a file."""
        return self._file is not None

    @property
    def memory(self) -> int:
        """Bytes of memory that it takes: none where it is a file, or closed."""
        return 0 if self._tensor is None else self.dtype.itemsize * self._tensor.numel()

    def __getitem__(self, key: tuple[slice, ...] | slice) -> Tensor:
        rows, *rest = key if isinstance(key, tuple) else (key,)
        if self._tensor is not None:
            return self._tensor[(rows, *rest)]
        parts = [torch.from_numpy(mapped[(slice(None), *rest)].copy()) for _, mapped in self._mapped(rows)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __setitem__(self, key: tuple[slice, ...] | slice, values: Tensor) -> None:
        rows, *rest = key if isinstance(key, tuple) else (key,)
        if self._tensor is not None:
            self._tensor[(rows, *rest)] = values
        else:
            for part, mapped in self._mapped(rows):
                mapped[(slice(None), *rest)] = values[part].cpu().numpy()

    def add(self, key: tuple[slice, ...], values: Tensor) -> None:
        """Add `values`, on any device, to what is there."""
        if self._tensor is not None:
            self._tensor[key] += values.to(self._tensor.device)
        else:
            self[key] = self[key] + values.cpu()

    def slabs(self, size: int = _SLAB) -> Iterator[slice]:
        """Slices of the first axis that together are the whole, each of at most `size` bytes or one row."""
        return slabs(self.shape[0], self._row, size)

    def close(self) -> None:
        """Give its memory or its file back."""
        self._tensor = None
        if self._file is not None:
            self._file.close()

    @property
    def _row(self) -> int:
        """Bytes of a row."""
        return self.dtype.itemsize * math.prod(self.shape[1:])

    def _mapped(self, rows: slice) -> Iterator[tuple[slice, np.ndarray]]:
        """The rows of the file in slabs, each with its place among them; one without rows where none are asked for."""
        start, stop, _ = rows.indices(self.shape[0])
        kind = torch.empty(0, dtype=self.dtype).numpy().dtype
        if stop <= start:
            yield slice(0, 0), np.empty((0, *self.shape[1:]), kind)
        for part in slabs(stop - start, self._row):
            yield part, np.memmap(self._file, kind, "r+", self._row * (start + part.start), (part.stop - part.start, *self.shape[1:]))


class Scratch:
    """Room for stores: `memory` bytes, then temporary files in `folder`. All of it is given back at the end of the `with` block.

    Its first file is said in a warning, which begins with `name`.

    The files have no name where the system allows it, so that none is left behind by a process that was killed.
    """

    def __init__(self, memory: float, folder: Path, name: str) -> None:
        self.memory, self.folder, self.name = memory, folder, name
        self._stores: list[Store] = []

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for store in self._stores:
            store.close()

    def store(self, *shape: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Store:
        """A new store; one on another device than the CPU takes none of the room. UserError where neither memory nor the disk has room for it."""
        if device is not None and device.type != "cpu":
            return Store(shape, device=device, dtype=dtype)
        needed = dtype.itemsize * math.prod(shape)
        fits = needed + sum(store.memory for store in self._stores) <= self.memory
        made = Store(shape, None if fits else self._file(needed), dtype=dtype)
        self._stores.append(made)
        return made

    def check(self, size: int) -> None:
        """UserError where so many bytes fit neither into memory nor on the folder's disk."""
        if size > self.memory:
            self._check_disk(size)

    def _check_disk(self, size: int) -> None:
        make_folder(self.folder)
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise UserError(f"{self.folder}: expected {size} bytes free for temporary files, got {free}: name a folder on another disk (--scratch)")

    def _file(self, size: int) -> Any:
        """A temporary file of so many zeros, whose place on the disk is taken: a mapped file that has none ends the process."""
        if not any(store.in_file for store in self._stores):
            logger.warning("%s: what does not fit into memory goes to temporary files in %s", self.name, self.folder)
        self._check_disk(size)
        try:
            file = tempfile.TemporaryFile(dir=self.folder, prefix=".medssm-")  # noqa: SIM115  # the store closes it
            with contextlib.ExitStack() as failed:
                failed.callback(file.close)
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
                failed.pop_all()
        except OSError as error:
            raise disk_error(self.folder, error) from error
        return file


def slabs(length: int, row: int, size: int = _SLAB) -> Iterator[slice]:
    """Slices of `length` rows of `row` bytes, each of at most `size` bytes or one row."""
    step = max(1, size // max(1, row))
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
