"""Correctness on a GPU: each check returns what it saw in a line, and raises where something is wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import medssm
from gpu_parts.timing import DEVICE, peak_memory, synchronize
from medssm import ops
from medssm.ops.op import OPS as DECLARED

ROOT = Path(__file__).resolve().parent.parent.parent
BACKENDS = ("cuda", "triton")
OPS = tuple(DECLARED)

SMALL = """
import torch
from bench.gpu_parts.checks import BACKENDS, OPS, backward, example, served
for op in OPS:
    for backend in served(op):
        backward(op, example(op), backend)
torch.cuda.synchronize()
print("clean")
"""


class Skipped(Exception):
    """What a check needs is not here."""


def outcome(check: Callable[[bool], str], rehearse: bool) -> dict:
    try:
        return {"failed": False, "said": check(rehearse)}
    except Skipped as reason:
        return {"failed": False, "said": f"not run: {reason}"}
    except Exception as error:
        return {"failed": True, "said": f"FAILED: {type(error).__name__}: {error}"}


def served(op: str) -> list[str]:
    return [name for name in BACKENDS if medssm.backends()[op][name] == "ok"]


def example(op: str, scale: int = 1, dtype=torch.float32) -> dict:
    """The op's own example with 24 channels, the tensor that gives the output its type first; `scale` times as many tokens."""
    g, declared = torch.Generator(DEVICE).manual_seed(0), DECLARED[op]
    call = declared.example(lambda *shape: torch.randn(shape, generator=g, device=DEVICE).to(dtype), 150 * scale, 24)
    call.pop("initial_state", None)
    main = declared.names[declared.main]
    return {main: call.pop(main), **call}


def forward(op: str, call: dict, backend: str | None) -> torch.Tensor:
    return getattr(ops, op)(**call, backend=backend)


def backward(op: str, call: dict, backend: str | None) -> list[torch.Tensor]:
    """The output and the gradient of every tensor."""
    leaves = {k: v.detach().clone().requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    out = forward(op, leaves, backend)
    return [
        out.detach(),
        *torch.autograd.grad(out, [v for v in leaves.values() if isinstance(v, torch.Tensor)], torch.ones_like(out), materialize_grads=True),
    ]


def pairs() -> list[tuple[str, str]]:
    """Every op and backend of this machine."""
    found = [(op, backend) for op in OPS for backend in served(op)]
    if not found:
        raise Skipped("; ".join(f"{name}: {medssm.backends()[OPS[0]][name]}" for name in BACKENDS))
    return found


def _each(check: Callable[[str, str], None]) -> str:
    ran = pairs()
    for op, backend in ran:
        try:
            check(op, backend)
        except Exception as error:
            raise AssertionError(f"{op}, {backend}: {type(error).__name__}: {error}") from error
    return f"{len(ran)} pairs of op and backend"


def _close(got, want, tolerance=2e-5) -> None:
    for g, w in zip(got, want, strict=True):
        error = float((g.double() - w.double()).abs().max() / w.double().abs().max().clamp_min(1e-6))
        assert error <= tolerance, f"error {error:.1e} above {tolerance:.0e}"


def contract(rehearse: bool) -> str:
    """The whole contract suite on tensors of the GPU, for both backends."""
    select = " or ".join(sorted({backend for _, backend in pairs()}))
    if rehearse:
        select = f"a_wrong_shape and ({select})"
    env = {**os.environ, "MEDSSM_TEST_DEVICE": DEVICE, "HYPOTHESIS_PROFILE": "brief"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--maxfail=5",
            "--no-header",
            "-m",
            "",
            "-p",
            "no:warnings",
            "tests/ops/test_contract.py",
            *([] if rehearse else ["tests/kernels/test_selective_scan_cuda.py"]),
            "-k",
            select,
        ],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr.strip()[-300:]
    assert done.returncode == 0, last + "\n" + done.stdout[-2000:]
    return last


def sanitizer(rehearse: bool) -> str:
    """compute-sanitizer's memcheck and racecheck on a small case of each kernel."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None or DEVICE == "cpu":
        raise Skipped("no compute-sanitizer" if tool is None else "no GPU")
    said = []
    for kind in ("memcheck", "racecheck"):
        done = subprocess.run(
            [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, "-c", SMALL],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'bench'}"},
        )
        assert done.returncode == 0 and "clean" in done.stdout, f"{kind}: {(done.stdout + done.stderr)[-1500:]}"
        said.append(f"{kind} clean")
    return ", ".join(said)


def agreement(rehearse: bool) -> str:
    """Outputs and gradients against the float64 reference on the same device."""

    def check(op, backend):
        call = example(op)
        wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
        _close(backward(op, call, backend), backward(op, wide, "reference"))

    return _each(check)


def beyond_31_bits(rehearse: bool) -> str:
    """A scan of more than 2**31 elements equals its two halves, joined by the state."""
    length, channels = (300, 16) if rehearse else (2**21 + 192, 1040)

    def check(op, backend):
        if op != "selective_scan":
            return
        g = torch.Generator(DEVICE).manual_seed(0)
        u = torch.empty(1, length, channels, dtype=torch.bfloat16, device=DEVICE).normal_(generator=g)
        B = torch.empty(1, length, 4, dtype=torch.bfloat16, device=DEVICE).normal_(generator=g)
        A = -torch.rand(channels, 4, device=DEVICE, generator=g)
        half = length // 2 // 64 * 64

        def scanned(part, **options):
            return ops.selective_scan(u[:, part], u[:, part], A, B[:, part], B[:, part], delta_softplus=True, backend=backend, **options)

        out = scanned(slice(None))
        _, state = scanned(slice(half), return_final_state=True)
        rest = scanned(slice(half, None), initial_state=state)
        _close([out[:, half:][:, -4096:].float()], [rest[:, -4096:].float()], 1e-2)
        _close([out[:, half : half + 4096].float()], [rest[:, :4096].float()], 1e-2)

    return f"{length * channels / 2**31:.2f} x 2^31 elements, {_each(check)}"


def streams(rehearse: bool) -> str:
    """On a second stream, with inputs made there."""
    if DEVICE == "cpu":
        raise Skipped("no GPU")
    side = torch.cuda.Stream()

    def check(op, backend):
        want = backward(op, example(op), backend)
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)  # what the inputs wait for: a launch on another stream would read them too early
            got = backward(op, example(op), backend)
        side.synchronize()
        _close(got, want, 0.0)

    return _each(check)


def graphs(rehearse: bool) -> str:
    """Captured once, replayed on other inputs."""
    if DEVICE == "cpu":
        raise Skipped("no GPU")

    def check(op, backend):
        call = example(op)
        for _ in range(2):
            backward(op, call, backend)
        synchronize()
        held = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = backward(op, held, backend)
        first = next(iter(held))
        held[first].mul_(-0.5)
        graph.replay()
        synchronize()
        _close(got, backward(op, {**call, first: -0.5 * call[first]}, backend), 0.0)

    return _each(check)


def compiled(rehearse: bool) -> str:
    """torch.compile(fullgraph=True) with gradients, and under autocast, equals eager."""

    def check(op, backend):
        call = example(op)
        name = next(iter(call))
        weights = {k: v for k, v in call.items() if k != name}
        run = torch.compile(lambda x: forward(op, {name: x, **weights}, backend), fullgraph=True, backend="aot_eager" if rehearse else "inductor")
        x = call[name].clone().requires_grad_()
        out = run(x)
        want = forward(op, call, backend)
        _close([out.detach()], [want], 1e-6)
        torch.autograd.grad(out.sum(), x)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert torch.equal(forward(op, call, backend), want), "autocast reached the recurrence"

    return _each(check)


def bits(rehearse: bool) -> str:
    """Repeated calls give the same bits."""

    def check(op, backend):
        call = example(op, scale=1 if rehearse else 40, dtype=torch.bfloat16)
        first = backward(op, call, backend)
        for _ in range(1 if rehearse else 5):
            assert all(torch.equal(a, b) for a, b in zip(first, backward(op, call, backend), strict=True))

    return _each(check)


def memory(rehearse: bool) -> str:
    """128^3 tokens of 96 channels, forward and backward, inputs included, within 8 GB."""
    if DEVICE == "cpu":
        raise Skipped("no GPU")
    said = []
    for backend in served("selective_scan"):
        torch.cuda.empty_cache()

        def whole(_, backend=backend):
            l, d = 128**3, 96
            u, delta = (torch.randn(1, l, d, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
            B, C = (torch.randn(1, l, 16, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
            A = -torch.rand(d, 16, device=DEVICE).requires_grad_()
            out = ops.selective_scan(u, delta, A, B, C, delta_softplus=True, backend=backend)
            torch.autograd.grad(out, [u, delta, A, B, C], out.detach())

        taken = peak_memory(whole)
        said.append(f"{backend} {taken / 1e9:.2f} GB")
        assert taken <= 8e9, f"{backend} took {taken / 1e9:.2f} GB"
    if not said:
        raise Skipped("no backend")
    return ", ".join(said)


CHECKS = {
    "agreement": agreement,
    "contract": contract,
    "sanitizer": sanitizer,
    "beyond 2^31": beyond_31_bits,
    "second stream": streams,
    "graph capture": graphs,
    "compile and autocast": compiled,
    "equal bits": bits,
    "memory": memory,
}
