"""The native kernels under AddressSanitizer: a library and a process for each instruction set. In `make test-all` UndefinedBehaviorSanitizer too,
which takes as long again to compile."""

import os
import shutil
import subprocess
import sys

import pytest

from medssm.kernels import native
from tests.libraries import ROOT, build

# Random calls of every op, as the contract draws them, and of packed sequences.
CODE = """
import sys
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from tests.ops.cases import OPS, calls
from tests.ops import packed
for op, draw in [*((op, calls) for op in OPS), *((op, packed.packed) for op in packed.OPS)]:
    @settings(max_examples=int(sys.argv[1]), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(call=draw(op), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), threads=st.sampled_from([1, 2]))
    def walk(call, dtype, threads):
        torch.set_num_threads(threads)
        call.to(dtype).results("native")
    walk()
print("clean", flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("g++") is None, reason="needs g++ and its sanitizer runtimes on Linux")
@pytest.mark.parametrize(
    "isa, sanitizers, examples", [pytest.param(isa, "address,undefined", 100, marks=pytest.mark.thorough) for isa in native.ISAS]
)
def test_kernels_are_clean(isa, sanitizers, examples, tmp_path):
    if native.ISAS.index(isa) > native.ISAS.index(native.isa()):
        pytest.skip(f"this processor does not run {isa}")
    library = build(tmp_path, MEDSSM_SANITIZE=sanitizers, MEDSSM_CPU="1", MEDSSM_CUDA="0", MEDSSM_CPU_ISAS=isa)
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip() for name in ("libasan.so", "libubsan.so")
    ]
    env = {
        **os.environ,
        "MEDSSM_CPU_LIBRARY": str(library),
        "LD_PRELOAD": " ".join(runtimes),
        "MEDSSM_CPU_ISA": isa,
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    done = subprocess.run([sys.executable, "-c", CODE, str(examples)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "clean" in done.stdout, done.stdout[-2000:] + done.stderr[-6000:]
