"""Calls kernels that fail (boundary.cpp) and prints what came back, as JSON: python -m tests.kernels.failing LIBRARY."""

from __future__ import annotations

import ctypes
import json
import sys

import torch  # noqa: F401  its OpenMP is the one that threads.cpp looks for

TEAMS = (1, 2, 3)
THROWING = {"throw_at_once": 1, "throw_between_barriers": 3}  # phases
TOO_MUCH = 1 << 60


def call(library: ctypes.CDLL, name: str, *values: int) -> int:
    kernel = getattr(library, f"medssm_{name}_base")
    kernel.argtypes, kernel.restype = [ctypes.c_char_p], ctypes.c_int64
    return kernel(b"".join(value.to_bytes(8, "little", signed=True) for value in values))


def main(file: str) -> None:
    library = ctypes.CDLL(file)
    library.medssm_cpu_error.restype = library.medssm_cpu_threads.restype = ctypes.c_char_p
    found: dict[str, object] = {"threads": library.medssm_cpu_threads().decode()}
    for threads in TEAMS:
        for name, phases in THROWING.items():
            for rank, phase in [(-1, -1), *((rank, phase) for rank in range(threads + 1) for phase in range(phases))]:
                done = (ctypes.c_int64 * phases)()
                status = call(library, name, threads, rank, phase, ctypes.addressof(done))
                found[f"{name} {threads} {rank} {phase}"] = status, library.medssm_cpu_error().decode(), list(done)
        for rank in range(-1, threads):
            for size in (TOO_MUCH, 1024):
                found[f"take_memory {size} {threads} {rank}"] = (call(library, "take_memory", size, threads, rank),)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
