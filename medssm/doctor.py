"""medssm doctor: what this machine has, what is missing and how to get it, and whether every kernel here computes the right numbers."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from collections.abc import Mapping
from typing import Any

import torch

import medssm
from medssm import dispatch, ops
from medssm.errors import install_command
from medssm.kernels import cuda, native, triton
from medssm.ops.op import OPS

REINSTALL = install_command(again=True)
IO = ("SimpleITK", "pydicom", "highdicom", "tifffile", "PIL", "zstandard")
EXTRAS = {"monai": "segment", "nibabel": "segment", "lightning": "segment", "scipy": "segment", "rich": "segment", "matplotlib": "segment"}


def doctor() -> dict[str, Any]:
    """What this machine has, and one small case of every op on every backend against the reference.

    Returns:
        The machine, the backends of every op and the result of each small case; `failed` is true where a kernel is wrong.
    """
    report: dict[str, Any] = {
        "medssm": medssm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_available(),
        "library": str(native.path()),
        "instruction_set": None if native.reason() else native.isa(),
        "compiler": _compiler(),
        "cuda_library": {"file": str(cuda.path()), "targets": cuda.targets() or None, "idle": cuda.reason()},
        "triton": triton.reason() or "ok",
        "missing": _missing(),
        "ops": {op: _examine(op, table) for op, table in dispatch.backends().items()},
    }
    report["failed"] = any(line.startswith("wrong") for table in report["ops"].values() for line in table.values())
    return report


def _compiler() -> str | None:
    return next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)


def _missing() -> list[str]:
    """One line for each thing that is not here, with the command that brings it."""
    lines = []
    if native.reason():
        lines.append(f"compiled kernels: {native.reason()}")
        lines.append(
            f"a C++ compiler is here ({_compiler()}); build the kernels with: {REINSTALL}"
            if _compiler()
            else "install a C++ compiler (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install), "
            f"then: {REINSTALL}"
        )
    absent = sorted({name for name in EXTRAS if importlib.util.find_spec(name) is None})
    if absent:
        lines.append(f"for train, predict, evaluate and demo ({', '.join(absent)}): {install_command('segment')}")
    absent = [name for name in IO if importlib.util.find_spec(name) is None]
    if absent:
        lines.append(f"for DICOM, NRRD, MetaImage and pictures ({', '.join(absent)}): {install_command('io')}")
    return lines


def _examine(op: str, table: dict[str, str]) -> dict[str, str]:
    """Run the op's example, output and gradients, on every backend that the machine has."""
    generator = torch.Generator().manual_seed(0)
    call = OPS[op].example(lambda *shape: torch.randn(shape, generator=generator), 21, 6)
    call.pop("initial_state", None)
    wanted = _outputs(op, {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in call.items()}, "reference")
    lines = {}
    for name, why in table.items():
        if why != "ok":
            lines[name] = why
            continue
        got = _outputs(op, call, name)
        error = max(float((g.double() - w).abs().max() / w.abs().max().clamp_min(1e-30)) for g, w in zip(got, wanted, strict=True))
        lines[name] = f"ok (error {error:.1e})" if error < 1e-4 else f"wrong: error {error:.1e} against the float64 reference; please report it"
    return lines


def _outputs(op: str, call: dict[str, Any], backend: str) -> list[torch.Tensor]:
    """The output and the gradient of every tensor, worked out on the device that the backend serves."""
    device = {"triton": triton.DEVICE, "cuda": cuda.DEVICE}.get(backend, "cpu")
    leaves = {name: value.detach().clone().to(device).requires_grad_() for name, value in call.items() if isinstance(value, torch.Tensor)}
    out = getattr(ops, op)(**{**call, **leaves}, backend=backend)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).to(device)
    return [t.cpu() for t in (out.detach(), *torch.autograd.grad(out, list(leaves.values()), weight, materialize_grads=True))]


def show(report: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Print the report."""
    print(
        f"medssm {report['medssm']}, torch {report['torch']}, Python {report['python']}, {report['machine']}, "
        f"{report['threads']} threads, CUDA {'available' if report['cuda'] else 'not available'}"
    )
    print(
        f"compiled kernels: {report['library'] if report['instruction_set'] else 'none'}"
        + (f" ({report['instruction_set']})" if report["instruction_set"] else "")
    )
    library = report["cuda_library"]
    print(f"CUDA kernels: {library['idle'] or library['file']}")
    print(f"Triton: {report['triton']}")
    for op, table in report["ops"].items():
        print(op)
        for name, line in table.items():
            print(f"  {name:<10} {line}")
    for line in report["missing"]:
        print(f"missing: {line}")
