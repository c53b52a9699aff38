"""The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer: a library of its own, in a process of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LIBRARY = "libmedssm_cpu.so"

CODE = """
import hypothesis, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from tests.ops.cases import OPS, calls
for op in OPS:
    @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(call=calls(op), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), threads=st.sampled_from([1, 2]))
    def walk(call, dtype, threads):
        torch.set_num_threads(threads)
        call.to(dtype).results("native")
    walk()
print("clean", flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("g++") is None, reason="needs g++ and its sanitizer runtimes on Linux")
@pytest.mark.parametrize("isa", ["v4", "base"])
def test_kernels_are_clean(sanitized, isa):
    from medssm.kernels import native

    if native.ISAS.index(isa) > native.ISAS.index(native.isa()):
        pytest.skip(f"this processor does not run {isa}")
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip() for name in ("libasan.so", "libubsan.so")
    ]
    env = {
        **os.environ,
        "MEDSSM_CPU_LIBRARY": str(sanitized),
        "LD_PRELOAD": " ".join(runtimes),
        "MEDSSM_CPU_ISA": isa,
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "clean" in done.stdout, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """The library built with both sanitizers."""
    tmp = tmp_path_factory.mktemp("sanitized")
    env = {**os.environ, "MEDSSM_SANITIZE": "1", "MEDSSM_CPU": "1", "MEDSSM_CUDA": "0", "MEDSSM_CPU_ISAS": "base v4"}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp / "lib"), "--build-temp", str(tmp / "temp")],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return tmp / "lib" / "medssm" / "_lib" / LIBRARY
