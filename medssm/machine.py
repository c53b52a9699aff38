"""The machine and the versions that a result was measured with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

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


def cores() -> int:
    """The number of cores that this process may run on; of all cores where the system has no such limit (macOS)."""
    process = psutil.Process()
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count() or 1


def free_memory() -> int:
    """Bytes of memory that can be had without swapping."""
    return psutil.virtual_memory().available


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
