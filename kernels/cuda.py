"""Loads the compiled CUDA library (ctypes, a plain C ABI) and says why it is idle.

A kernel takes one argument: a packed struct of 8-byte fields, the stream first; it launches and returns: nothing allocates, synchronises or copies.
The library loads without a driver, and serves where torch sees a GPU that it was compiled for. MEDSSM_CUDA_LIBRARY names another file. One
built with tests/emulation in place of the CUDA runtime runs the same kernels on tensors of the CPU, thread by thread, for tests without a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Callable
from pathlib import Path

import torch

from medssm.kernels import native

DTYPES = native.DTYPES


def path() -> Path:
    """Where the CUDA library is expected."""
    override = os.environ.get("MEDSSM_CUDA_LIBRARY")
    return Path(override) if override else native.path().with_name(f"libmedssm_cuda{native.SUFFIX}")


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or None and why not."""
    file = path()
    if not file.is_file():
        return None, f"no compiled library at {file}: install again where nvcc is, with MEDSSM_CUDA=1, {native.REINSTALL}"
    try:
        library = native.load(file, "cuda")
    except OSError as error:
        return None, f"{file} does not load: {error}"
    library.medssm_cuda_targets.restype = ctypes.c_char_p
    return library, None


def _idle() -> str | None:
    """Why the loaded library has nothing to run on, or None."""
    if EMULATED:
        return None
    if torch.version.cuda is None:
        return f"the library is there (for {targets()}); this torch is built for the CPU"
    if not torch.cuda.is_available():
        return f"the library is there (for {targets()}); torch finds no GPU or no driver"
    return None


def targets() -> str:
    """What the library was compiled for: "sm_80 sm_90 sm_100 compute_100", or "emulation"."""
    return "" if _LIBRARY is None else _LIBRARY.medssm_cuda_targets().decode()


# Loaded once, on import: a choice of backend that torch.compile traces then reads a constant.
_LIBRARY, _REASON = _load()
EMULATED = targets() == "emulation"
_REASON = _REASON or _idle()
DEVICE = "cpu" if EMULATED else "cuda"


def reason() -> str | None:
    """None where the CUDA library serves, else one line that says why not."""
    return _REASON


def refuse(*tensors: torch.Tensor | None) -> str | None:
    """Why these kernels cannot serve these tensors, or None."""
    for t in tensors:
        if t is not None and (t.device.type != DEVICE or t.dtype not in DTYPES):
            served = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            return f"it serves {served} on {DEVICE}, got {str(t.dtype).removeprefix('torch.')} on {t.device}"
    return None


@functools.cache
def _function(name: str, size: int) -> Callable[[bytes], bytes | None]:
    assert _LIBRARY is not None, _REASON
    return native.bind(_LIBRARY, name, "cuda", size, ctypes.c_char_p)


class Kernel:
    """A kernel of the CUDA library: `kernel(tensor, *values)` runs it on that tensor's device, on the stream that torch uses there.

    op, task: together its name in the library. layout: its struct behind the stream, from `native.fields`.
    RuntimeError where the launch fails or the library's struct has another size.
    """

    def __init__(self, op: str, task: str, layout: str):
        self._op, self._task, self._name, self._struct = op, task, f"{op}_{task}", struct.Struct("q" + layout)

    def __call__(self, tensor: torch.Tensor, *values) -> None:
        kernel, packed = _function(self._name, self._struct.size), self._struct.pack(_stream(tensor), *values)
        if EMULATED:
            error = kernel(packed)
        else:
            with torch.cuda.device(tensor.device):
                error = kernel(packed)
        if error:
            raise RuntimeError(f"{self._op} (cuda, {self._task}) on {tensor.device}: {error.decode()}")


# The structs Strided<dims> of csrc/include/medssm/device.h.
STRIDED = {dims: native.fields("data type", ("stride", "q" * dims)) for dims in range(1, 6)}


def strided(tensor: torch.Tensor | None, dims: int) -> tuple[int, ...]:
    """The values of Strided<dims>."""
    return (0,) * (2 + dims) if tensor is None else (tensor.data_ptr(), DTYPES[tensor.dtype], *tensor.stride())


def _stream(tensor: torch.Tensor) -> int:
    """The stream that torch uses on the tensor's device at the moment."""
    return 0 if EMULATED else torch.cuda.current_stream(tensor.device).cuda_stream
