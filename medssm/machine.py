"""The machine and the versions that a result was measured with."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import cpuinfo
import psutil
import torch

import medssm
from medssm.kernels import native

_PACKAGES = ("torch", "monai", "lightning", "nibabel", "numpy")


def describe() -> dict[str, str]:
    """Processor, memory, threads, kernels and versions, each as text."""
    kernels = native.reason() or f"compiled, instruction set {native.isa()}"
    table = {
        "processor": cpuinfo.get_cpu_info().get("brand_raw") or platform.machine(),
        "cores": str(cores()),
        "threads": str(torch.get_num_threads()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": platform.platform(),
        "medssm": f"{medssm.__version__} ({kernels})",
        "Python": platform.python_version(),
    }
    return table | {name: _version(name) for name in _PACKAGES}


def commit() -> str:
    """The checkout's commit, with "-dirty" if its code was changed since; the version if the package was installed."""
    root = Path(medssm.__file__).resolve().parent.parent
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    if found.returncode:
        return f"version {medssm.__version__}"
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "medssm", "kernels", "csrc"], cwd=root).returncode
    return found.stdout.strip() + "-dirty" * changed


def cores() -> int:
    """The number of cores that this process may run on; of all cores where the system has no such limit (macOS), or where OpenMP has bound this
    thread to one of them (OMP_PROC_BIND)."""
    process = psutil.Process()
    bound = os.environ.get("OMP_PROC_BIND", "false").lower() != "false"
    return psutil.cpu_count() or 1 if bound or not hasattr(process, "cpu_affinity") else len(process.cpu_affinity())


def has_bf16() -> bool:
    """Whether the processor has instructions that compute with bfloat16; without them each number is converted on its way."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & {*cpuinfo.get_cpu_info().get("flags", ())})


def free_memory() -> int:
    """Bytes of memory that can be had without swapping, also by the limits of this process and of its control group (a container, a job)."""
    return max(0, min([psutil.virtual_memory().available, *_limits_of_process(), *_limits_of_group(Path("/"))]))


def _limits_of_process() -> Iterator[int]:
    """What `ulimit -v` and `ulimit -d` leave."""
    if importlib.util.find_spec("resource"):  # not on Windows
        import resource

        used = psutil.Process().memory_info()
        for limit, taken in ((resource.RLIMIT_AS, used.vms), (resource.RLIMIT_DATA, getattr(used, "data", 0))):
            if resource.getrlimit(limit)[0] != resource.RLIM_INFINITY:
                yield resource.getrlimit(limit)[0] - taken


def _limits_of_group(root: Path) -> Iterator[int]:
    """What the control groups of this process leave, of both of Linux's versions; files that are only cached count as free."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                base, limit, usage, cached = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
            elif "memory" in controllers.split(","):
                base, limit, usage, cached = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            else:
                continue
            inside = Path(path.lstrip("/"))
            for folder in (root / base / part for part in (inside, *inside.parents)):
                with contextlib.suppress(OSError, ValueError, KeyError):  # no such file, "max", another system's
                    stat = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                    yield int((folder / limit).read_text()) - int((folder / usage).read_text()) + int(stat[cached])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
