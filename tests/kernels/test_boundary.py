"""The edge between Python and the compiled kernels: failures become exceptions, and a library that does not fit is refused by name."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import medssm
from medssm.kernels import native
from tests.kernels.failing import TEAMS, THROWING, TOO_MUCH
from tests.kernels.out_of_memory import CALLS

ROOT = Path(__file__).resolve().parent.parent.parent
compiles = pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("g++") is None, reason="needs g++ on Linux")


def python(*command: str, **changes: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **changes}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def build(target: Path, *arguments: str | Path, version: str = medssm.__version__) -> Path:
    flags = ["-std=c++17", "-O0", "-fPIC", "-shared", "-pthread", "-I", ROOT / "csrc/include", f'-DMEDSSM_VERSION="{version}"']
    done = subprocess.run(["g++", *flags, *arguments, "-o", target], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


# -- memory --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[1, 2], ids=["one thread", "two threads"])
def failures(request):
    """What happened to each op in a process that may take little memory."""
    done = python("-m", "tests.kernels.out_of_memory", str(request.param))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc", reason="limits memory by means of Linux and glibc")
@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("task", ["forward", "backward"])
def test_memory_that_cannot_be_had_is_a_memory_error(failures, op, task):
    seen = failures[op][task]
    name = {"selective_scan_nd": "selective_scan", "causal_linear_attention": "linear_attention"}.get(op, op)
    pattern = rf"{name} \(native, (causal )?{task}\): could not allocate [\d,]+ bytes of scratch memory"
    assert seen["messages"], "every limit was enough, or none was"
    assert all(re.fullmatch(pattern, message) for message in seen["messages"]), seen["messages"]
    assert seen["small"], "a small call after the failure gives other numbers"
    assert seen["large"], "the same call with enough memory gives other numbers"


# -- failures of threads -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["OpenMP", "std::thread"])
def failing(request, tmp_path_factory):
    """What came back from kernels that fail, on either kind of threads: {call: [status, error, how many threads got through each phase]}.

    They run in a process of their own. If a thread waited for one that has left, that process would not end, and the test would fail for it.
    """
    threads = [] if request.param == "OpenMP" else ["-U__linux__"]  # threads.cpp then does not look for torch's OpenMP
    sources = [ROOT / name for name in ("csrc/library.cpp", "csrc/threads.cpp", "tests/kernels/boundary.cpp")]
    file = build(tmp_path_factory.mktemp("failing") / "failing.so", *threads, *sources)
    done = python("-m", "tests.kernels.failing", str(file))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found.pop("threads") == request.param
    return found


@compiles
@pytest.mark.parametrize("threads", TEAMS)
@pytest.mark.parametrize("name, phases", THROWING.items())
def test_a_thread_that_throws_ends_the_call_and_leaves_nobody_waiting(failing, name, phases, threads):
    for phase in range(phases):
        for rank in range(threads + 1):  # the last: all of them
            status, error, done = failing[f"{name} {threads} {rank} {phase}"]
            assert status == -1 and error == "thrown on purpose"
            assert done[:phase] == [threads] * phase and not any(done[phase + 1 :])
    status, _, done = failing[f"{name} {threads} -1 -1"]
    assert status == 0 and done == [threads] * phases


@compiles
@pytest.mark.parametrize("threads", TEAMS)
def test_the_status_says_how_many_bytes_were_asked_for(failing, threads):
    """By the caller, or by any thread of the team."""
    for rank in range(-1, threads):
        assert failing[f"take_memory {TOO_MUCH} {threads} {rank}"][0] == TOO_MUCH
        assert failing[f"take_memory 1024 {threads} {rank}"][0] == 0


def test_any_other_failure_names_the_op(monkeypatch):
    monkeypatch.setitem(native._bound, "ssd_backward", lambda packed: -1)
    with pytest.raises(RuntimeError, match=r"ssd \(native, backward\): "):
        native.Kernel("ssd", "backward", "q")(0)


# -- what fits -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [-1, 1])
def test_a_struct_of_another_size_is_refused_before_it_is_read(more):
    from medssm.kernels.ssd import native as ssd

    fields = ssd._forward.size // 8
    with pytest.raises(RuntimeError, match=rf"ssd_forward: its argument struct has {8 * fields} bytes in the .*library and {8 * (fields + more)} in"):
        native.Kernel("ssd", "forward", "q" * (fields + more))._bind()


def test_every_kernel_is_exported_with_its_guard_and_its_size():
    """Only these files may name what they export without MEDSSM_EXPORT or MEDSSM_CUDA_EXPORT."""
    own = {file.name for file in (ROOT / "csrc").rglob("*") if file.is_file() and "MEDSSM_VISIBLE" in file.read_text()}
    assert own <= {"abi.h", "device.h", "isa.cpp", "library.cpp", "targets.cu", "threads.cpp"}


@pytest.mark.skipif(native.reason() is not None, reason="no compiled library")
def test_fields_are_counted_as_c_counts_them():
    assert native.fields("data type", ("low high", "d"), ("q k", native.fields("data type"))) == "qqddqqqq"


CHOSEN = (
    "import torch, medssm; from medssm.kernels import native; t = torch.ones(1, 2, 1);"
    "call = lambda: medssm.ops.selective_scan(t, t, -torch.ones(1, 1), t, t, backend=None);"
    "call(), call(); print(medssm.explain('selective_scan', t, t, -torch.ones(1, 1), t, t)['chosen'], native.reason())"
)


@compiles
def test_a_library_of_another_version_is_refused_by_name(tmp_path):
    file = build(tmp_path / "old.so", ROOT / "csrc/library.cpp", version="0.0.1")
    done = python("-c", CHOSEN, MEDSSM_CPU_LIBRARY=str(file))
    assert done.stdout.startswith("reference"), done.stdout + done.stderr
    for text in (f"built for medssm 0.0.1, this is medssm {medssm.__version__}", "pip install --no-cache-dir --force-reinstall", "from the source"):
        assert text in done.stdout and text in done.stderr
    assert done.stderr.count("PyTorch computes in their place") == 1


def test_a_library_that_is_not_medssms_is_refused():
    other = next((Path(torch.__file__).parent / "lib").glob("libc10.*"))
    done = python("-c", CHOSEN, MEDSSM_CPU_LIBRARY=str(other))
    assert done.stdout.startswith("reference") and "no library of medssm" in done.stdout, done.stdout + done.stderr


@pytest.fixture(scope="module")
def base_alone(tmp_path_factory):
    """A library with the forward scan for the instruction set `base` and nothing else."""
    sources = [ROOT / "csrc" / name for name in ("library.cpp", "isa.cpp", "threads.cpp", "selective_scan/cpu_forward.cpp")]
    return build(tmp_path_factory.mktemp("base") / "base.so", "-DMEDSSM_HAS_base", *sources)


@compiles
def test_a_library_for_base_alone_serves_on_every_processor(base_alone):
    code = (
        "import torch, medssm; from medssm.kernels import native; g = torch.Generator().manual_seed(0);"
        "u, B, C = (torch.randn(2, 33, 5, generator=g) for _ in range(3)); A = -torch.rand(5, 5, generator=g);"
        "y, r = (medssm.ops.selective_scan(u, u.abs(), A, B, C, backend=b) for b in ('native', 'reference'));"
        "print(native.isa(), bool((y - r).abs().max() < 1e-5))"
    )
    done = python("-c", code, MEDSSM_CPU_LIBRARY=str(base_alone))
    assert done.stdout.split() == ["base", "True"], done.stdout + done.stderr
    done = python("-c", code, MEDSSM_CPU_LIBRARY=str(base_alone), MEDSSM_CPU_ISA="v4")
    assert "has is 'base', got 'v4'" in done.stderr
