"""Loads the compiled CPU library (ctypes, a plain C ABI) and says why it cannot, and calls its kernels.

A kernel takes one argument: a struct of 8-byte fields, packed from a declaration beside the code that fills it (`fields`, `Kernel`). It returns a
status, which becomes a Python exception. Of each kernel the library has one version per instruction set; the best that this processor runs is taken
(MEDSSM_CPU_ISA = base | v3 | v4 overrides). MEDSSM_CPU_LIBRARY names another library file (a sanitizer build, say).
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from medssm.kernels.walks import Sequences

logger = logging.getLogger("medssm")

# Storage types as csrc/include/medssm/abi.h numbers them.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ISAS = ("base", "v3", "v4")
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
_PACKAGE = sys.modules[__name__.partition(".")[0]]  # medssm, which this module is part of
REINSTALL = "from the source: pip install --no-cache-dir --force-reinstall --no-deps . in its folder"


def path() -> Path:
    """Where the CPU library is expected."""
    override = os.environ.get("MEDSSM_CPU_LIBRARY")
    return Path(override) if override else Path(str(_PACKAGE.__file__)).parent / "_lib" / f"libmedssm_cpu{SUFFIX}"


def load(file: Path, name: str) -> ctypes.CDLL:
    """The library at `file`, which calls itself medssm_<name>. OSError where it does not load or belongs to another version of the package."""
    version = _PACKAGE.__version__
    library = ctypes.CDLL(str(file))
    try:
        says = getattr(library, f"medssm_{name}_version")
    except AttributeError:
        raise OSError(f"it is no library of medssm {version}: install again {REINSTALL}") from None
    says.restype = ctypes.c_char_p
    if says().decode() != version:
        raise OSError(f"it was built for medssm {says().decode()}, this is medssm {version}: install again {REINSTALL}")
    return library


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or None and why not."""
    file = path()
    if not file.is_file():
        return None, f"no compiled library at {file}: install again with a C++ compiler, {REINSTALL}"
    try:
        library = load(file, "cpu")
    except OSError as error:
        return None, f"{file} does not load: {error}"
    library.medssm_cpu_isa.restype = library.medssm_cpu_error.restype = ctypes.c_char_p
    return library, None


# Loaded once, on import: a choice of backend that torch.compile traces then reads a constant.
_LIBRARY, _REASON = _load()


@functools.cache
def _warn(reason: str) -> None:
    logger.warning("the compiled CPU kernels are not used, and PyTorch computes in their place, more slowly: %s", reason)


def reason() -> str | None:
    """None where the compiled library serves, else one line that says why not; logged as a warning at the first call."""
    if _REASON is not None and not torch.compiler.is_compiling():
        _warn(_REASON)
    return _REASON


def _loaded() -> ctypes.CDLL:
    if _LIBRARY is None:
        raise RuntimeError(_REASON)
    return _LIBRARY


@functools.cache
def isa() -> str:
    """The instruction set in use: "base", "v3" (AVX2) or "v4" (AVX-512)."""
    best = _loaded().medssm_cpu_isa().decode()  # of those that were compiled and that this processor runs
    wanted = os.environ.get("MEDSSM_CPU_ISA", best)
    if wanted not in ISAS:
        raise ValueError(f"MEDSSM_CPU_ISA: expected one of {', '.join(ISAS)}, got {wanted!r}")
    if ISAS.index(wanted) > ISAS.index(best) or not hasattr(_LIBRARY, f"medssm_selective_scan_forward_{wanted}"):
        raise ValueError(f"MEDSSM_CPU_ISA: the best that this processor runs and {path()} has is {best!r}, got {wanted!r}")
    return wanted


def fields(*groups: str | tuple[str, str]) -> str:
    """How struct.pack writes a C struct: each group is the names of 8-byte integers and pointers, or names and the format of each of them.

    >>> fields("data type", ("low high", "d"))
    'qqdd'
    """
    return "".join("q" * len(group.split()) if isinstance(group, str) else group[1] * len(group[0].split()) for group in groups)


def bind(library: ctypes.CDLL, name: str, variant: str, size: int, result: type) -> Callable[[bytes], Any]:
    """A kernel of a library, its struct's size compared with what the library was compiled with."""
    kernel, bytes_of = getattr(library, f"medssm_{name}_{variant}"), getattr(library, f"medssm_{name}_bytes_{variant}")
    bytes_of.restype = ctypes.c_int64
    if bytes_of() != size:
        raise RuntimeError(
            f"{name}: its argument struct has {bytes_of()} bytes in the compiled library and {size} in this package's Python code. "
            f"They are of different builds: install again {REINSTALL}"
        )
    kernel.argtypes, kernel.restype = [ctypes.c_char_p], result
    return kernel


_bound: dict[str, Callable[[bytes], int]] = {}  # the C functions that were called so far, by name


class Kernel:
    """A kernel of the CPU library: `kernel(*values)` packs its struct's fields and runs it.

    op, task: what errors call it, "ssd" and "forward"; together its name in the library. layout: the struct, from `fields`.
    MemoryError where it lacks memory, RuntimeError where it fails otherwise or the library's struct has another size.
    """

    def __init__(self, op: str, task: str, layout: str):
        self._op, self._task, self._name = op, task, f"{op}_{task}"
        packer = struct.Struct(layout)
        self.pack, self.size = packer.pack, packer.size

    def __call__(self, *values) -> None:
        self.run(self.pack(*values))

    def run(self, packed: bytes) -> None:
        """The same, of a struct that `pack` made."""
        status = (_bound.get(self._name) or self._bind())(packed)
        if status:
            raise self._error(status)

    def _bind(self) -> Callable[[bytes], int]:
        kernel = bind(_loaded(), self._name, isa(), self.size, ctypes.c_int64)
        return _bound.setdefault(self._name, kernel)

    def _error(self, status: int) -> Exception:
        """A status of csrc/include/medssm/failure.h as an exception."""
        who = f"{self._op} (native, {self._task.replace('_', ' ')})"
        if status > 0:
            return MemoryError(f"{who}: could not allocate {status:,} bytes of scratch memory")
        return RuntimeError(f"{who}: {_loaded().medssm_cpu_error().decode(errors='replace')}")


def refuse(*tensors: torch.Tensor | None) -> str | None:
    """Why the CPU kernels cannot serve these tensors, or None. None stands for an input that was not given."""
    for t in tensors:
        if t is not None and not (t.is_cpu and t.dtype in DTYPES):
            served = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            return f"it serves {served} on the CPU, got {str(t.dtype).removeprefix('torch.')} on {t.device}"
    return None


def pointer(tensor: torch.Tensor | None) -> int:
    """A tensor's address for an argument block; 0, the null pointer, for None."""
    return 0 if tensor is None else tensor.data_ptr()


# A walk's fields of an argument block, and their values: csrc/include/medssm/walk.h.
WALK = fields("index starts sequences start_count reverse")


def walk(index: torch.Tensor | None, starts: torch.Tensor | None, sequences: Sequences | None, reverse: bool) -> tuple[int, ...]:
    """The values of WALK."""
    of_segments = 0 if sequences is None else sequences.of_segments.data_ptr()
    return pointer(index), pointer(starts), of_segments, 0 if starts is None else starts.shape[0], reverse


def new_state(
    tokens: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, before: torch.Tensor | None, sequences: Sequences | None
) -> torch.Tensor:
    """A state (b, *shape), or (n, *shape) of n packed sequences, for a kernel to fill: the final one, or the gradient of the initial one.

    tokens (b, l, …). Kernels leave out empty sequences: their state is the one before, zero for None.
    """
    batch, length = tokens.shape[:2]
    if sequences is None and length:
        return torch.empty((batch, *shape), dtype=dtype, device=tokens.device)
    state = torch.zeros((batch if sequences is None else sequences.count, *shape), dtype=dtype, device=tokens.device)
    return state if before is None else state.copy_(before)


def lanes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with adjacent channels (its last dimension), which fill the vector lanes: itself, or a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def contiguous(tensor: torch.Tensor | None, dtype: torch.dtype | None = None) -> torch.Tensor | None:
    """The tensor, contiguous and, if given, in a dtype: itself, or a copy that the caller holds until its kernel is done; None for None."""
    return None if tensor is None else tensor.to(dtype or tensor.dtype).contiguous()


def like(tensor: torch.Tensor | None, dtype: torch.dtype | None = None) -> torch.Tensor | None:
    """An uninitialised contiguous plain tensor of this one's shape and, unless given, dtype; None for None."""
    return None if tensor is None else torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device)
