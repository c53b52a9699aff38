"""medssm doctor: what this machine has, what is missing and how to get it, and whether every kernel here computes the right numbers."""

from __future__ import annotations

import importlib.util
import platform
import shutil

import torch
from torch.nn import functional

import medssm
from medssm import dispatch, ops, orders
from medssm.kernels import cuda, native, triton

REINSTALL = "pip install --no-cache-dir --force-reinstall --no-deps medssm"
EXTRAS = {"monai": "segment", "nibabel": "segment", "lightning": "segment", "scipy": "segment", "rich": "segment", "matplotlib": "segment"}


def add_arguments(parser) -> None:
    """No options of its own."""


def run(args) -> dict:
    """Print the machine, the backends of every op and the result of each small case; `failed` is true where a kernel is wrong."""
    report = {
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
    if not (args.json or args.quiet):
        _print(report)
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
        lines.append(f"for train, predict, evaluate and demo ({', '.join(absent)}): pip install 'medssm[segment]'")
    return lines


def _cases() -> dict:
    """One small call of every op: (function, arguments)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    A = -torch.rand(6, 8, generator=generator)
    return {
        "selective_scan": (
            ops.selective_scan,
            (draw(2, 21, 6), draw(2, 21, 6), A, draw(2, 21, 8), draw(2, 21, 8), draw(6), draw(2, 21, 6), draw(6), True),
            {},
        ),
        "selective_scan_nd": (
            ops.selective_scan_nd,
            (
                draw(1, 3, 4, 5, 6),
                draw(1, 3, 4, 5, 6, 2),
                -torch.rand(6, 6, 8, generator=generator),
                draw(1, 3, 4, 5, 6, 8),
                draw(1, 3, 4, 5, 6, 8),
                draw(6, 6),
                draw(1, 3, 4, 5, 6),
                draw(6, 6),
                True,
            ),
            {"delta_proj": draw(6, 6, 2), "orders": orders.axes3d()},
        ),
        "causal_conv1d": (ops.causal_conv1d, (draw(2, 21, 6), draw(6, 4), draw(6), "silu"), {}),
        "gated_linear_attention": (
            ops.gated_linear_attention,
            (draw(2, 21, 3, 5), draw(2, 21, 3, 5), draw(2, 21, 3, 6), -torch.rand(2, 21, 3, 5, generator=generator)),
            {},
        ),
        "depthwise_conv": (ops.depthwise_conv, (draw(1, 5, 6, 7, 6), draw(6, 3, 3, 3), draw(6), "silu"), {}),
        "bi_wkv": (ops.bi_wkv, (0.1 * draw(6), draw(6), draw(2, 21, 6), draw(2, 21, 6)), {}),
        "delta_rule": (
            ops.delta_rule,
            (draw(2, 21, 2, 6), functional.normalize(draw(2, 21, 2, 6), dim=-1), draw(2, 21, 2, 5), torch.sigmoid(draw(2, 21, 2))),
            {"g": -draw(2, 21, 2).abs()},
        ),
        "linear_attention": (ops.linear_attention, (draw(2, 21, 2, 6), draw(2, 21, 2, 6), draw(2, 21, 2, 5)), {}),
        "ssd": (
            ops.ssd,
            (draw(2, 21, 4, 6), draw(2, 21, 4), A[:4, 0], draw(2, 21, 2, 8), draw(2, 21, 2, 8), draw(4), draw(2, 21, 4, 6), draw(4), True),
            {},
        ),
    }


def _examine(op: str, table: dict[str, str]) -> dict[str, str]:
    """Run the op's small case, output and gradients, on every backend that the machine has."""
    function, args, kwargs = _cases()[op]
    wanted = _outputs(
        function,
        [a.double() if isinstance(a, torch.Tensor) else a for a in args],
        {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()},
        "reference",
    )
    lines = {}
    for name, why in table.items():
        if why != "ok":
            lines[name] = why
            continue
        got = _outputs(function, args, kwargs, name)
        error = max(float((g.double() - w).abs().max() / w.abs().max().clamp_min(1e-30)) for g, w in zip(got, wanted, strict=True))
        lines[name] = f"ok (error {error:.1e})" if error < 1e-4 else f"wrong: error {error:.1e} against the float64 reference; please report it"
    return lines


def _outputs(function, args, kwargs, backend: str) -> list[torch.Tensor]:
    """The output and the gradient of every floating-point argument, worked out on the device that the backend serves."""
    device = {"triton": triton.DEVICE, "cuda": cuda.DEVICE}.get(backend, "cpu")

    def leaf(value):
        return value.detach().clone().to(device).requires_grad_() if isinstance(value, torch.Tensor) else value

    args, kwargs = [leaf(a) for a in args], {k: leaf(v) for k, v in kwargs.items()}
    out = function(*args, **kwargs, backend=backend)
    leaves = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).to(device)
    return [t.cpu() for t in (out.detach(), *torch.autograd.grad(out, leaves, weight))]


def _print(report: dict) -> None:
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
