"""What compiled GPU code takes: registers, stack and memory of each kernel, read by cuobjdump, which CUDA's toolkit and Triton bring."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple


class Usage(NamedTuple):
    target: str  # "sm_90"
    name: str
    registers: int
    stack: int
    shared: int
    local: int


def cuobjdump() -> str | None:
    """The program, or None."""
    nvcc = shutil.which("nvcc")
    beside = shutil.which("cuobjdump", path=str(Path(nvcc).resolve().parent)) if nvcc else None
    found = shutil.which("cuobjdump") or beside
    if found is None and importlib.util.find_spec("triton") is not None:
        packaged = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(packaged) if packaged.is_file() else None
    return found


def usage(file: Path) -> list[Usage]:
    """Of every kernel for every target in a library or a cubin."""
    done = subprocess.run([cuobjdump(), "--dump-resource-usage", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows, target = [], "?"
    for line in done.stdout.splitlines():
        arch = re.search(r"arch = (sm_\d+)", line)
        name = re.match(r"\s*Function (\S+):", line)
        numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line)
        if arch:
            target = arch[1]
        elif name:
            function = name[1]
        if numbers:
            rows.append(Usage(target, function, *map(int, numbers.groups())))
    return rows
