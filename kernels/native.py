"""Loads the compiled CPU library (ctypes, a plain C ABI) and says why when it cannot.

A kernel takes one argument: a packed block of 8-byte fields. `function(name)` binds `medssm_<name>_<isa>` for the best
instruction set of this processor (MEDSSM_CPU_ISA = base | v3 | v4 overrides). MEDSSM_CPU_LIBRARY names another library file
(a sanitizer build, say).
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

import torch

# Storage types as csrc/include/medssm/abi.h numbers them.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ISAS = ("base", "v3", "v4")
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")


def path() -> Path:
    """Where the CPU library is expected."""
    override = os.environ.get("MEDSSM_CPU_LIBRARY")
    if override:
        return Path(override)
    import medssm

    return Path(medssm.__file__).parent / "_lib" / f"libmedssm_cpu{SUFFIX}"


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or None and why not."""
    file = path()
    if not file.is_file():
        return None, f"no compiled library at {file}: install again with a C++ compiler (pip install --no-cache-dir --force-reinstall medssm)"
    try:
        library = ctypes.CDLL(str(file))
        library.medssm_cpu_isa.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        return None, f"{file} does not load: {error}"
    return library, None


# Loaded once, on import: a choice of backend that torch.compile traces then reads a constant.
_LIBRARY, _REASON = _load()


def reason() -> str | None:
    """None where the compiled library serves, else one line that says why not."""
    return _REASON


def _loaded() -> ctypes.CDLL:
    if _LIBRARY is None:
        raise RuntimeError(_REASON)
    return _LIBRARY


@functools.cache
def isa() -> str:
    """The instruction set in use: "base", "v3" (AVX2) or "v4" (AVX-512)."""
    best = _loaded().medssm_cpu_isa().decode()
    wanted = os.environ.get("MEDSSM_CPU_ISA", best)
    if wanted not in ISAS:
        raise ValueError(f"MEDSSM_CPU_ISA: expected one of {', '.join(ISAS)}, got {wanted!r}")
    if ISAS.index(wanted) > ISAS.index(best):
        raise ValueError(f"MEDSSM_CPU_ISA: this processor runs at most {best!r}, got {wanted!r}")
    return wanted


@functools.cache
def function(name: str):
    """The C function `medssm_<name>_<isa>`; call it with the packed argument block (bytes)."""
    bound = getattr(_loaded(), f"medssm_{name}_{isa()}")
    bound.argtypes, bound.restype = [ctypes.c_char_p], None
    return bound


def refuse(*tensors: torch.Tensor | None) -> str | None:
    """Why these kernels cannot serve these tensors, or None."""
    for t in tensors:
        if t is not None and t.device.type != "cpu":
            return f"it serves tensors on the CPU, got one on {t.device}"
    return None


def pointer(tensor: torch.Tensor | None) -> int:
    """A tensor's address for an argument block; 0, the null pointer, for None."""
    return 0 if tensor is None else tensor.data_ptr()


def wide(*tensors: torch.Tensor | None) -> bool:
    """Whether to compute in float64: if any input is; None is no input."""
    return torch.float64 in [tensor.dtype for tensor in tensors if tensor is not None]


def lanes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with adjacent channels (its last dimension), which fill the vector lanes: itself, or a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def like(tensor: torch.Tensor | None, dtype: torch.dtype | None = None) -> torch.Tensor | None:
    """An uninitialised contiguous plain tensor of this one's shape and, unless given, dtype; None for None."""
    return None if tensor is None else torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device)
