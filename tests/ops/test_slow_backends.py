"""The contract suite on backends that need a GPU, without one: Triton's kernels in its interpreter, CUDA's emulated thread by thread.

Each op and backend in a process of its own, since both are chosen before anything is imported, with few drawn examples a test.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from medssm import backends
from tests.ops.cases import OPS

ROOT = Path(__file__).resolve().parent.parent.parent


def having(backend: str) -> list[str]:
    """The ops that have such kernels, on whatever machine."""
    return [op for op in OPS if "in this release" not in backends()[op][backend]]


def suite(backend: str, op: str, **environment: str) -> str:
    """Run an op's contract on one backend, strictly, and the tests of what is special about its kernels."""
    own = map(str, (ROOT / "tests" / "kernels").glob(f"test_{op}_{backend}*.py"))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/ops/test_contract.py",
            *own,
            "-k",
            f"[{op}-{backend} or test_{op}_{backend}",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTEST_ADDOPTS": "", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed >= 15, done.stdout[-500:]
    return done.stdout


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("op", having("triton"))
def test_in_tritons_interpreter(op):
    suite("triton", op, TRITON_INTERPRET="1", HYPOTHESIS_PROFILE="few")


@pytest.mark.parametrize("op", having("cuda"))
def test_cuda_emulated(op, emulated_library):
    suite("cuda", op, MEDSSM_CUDA_LIBRARY=str(emulated_library), HYPOTHESIS_PROFILE="brief")


@pytest.fixture(scope="module")
def emulated_library(tmp_path_factory) -> Path:
    """csrc's CUDA kernels compiled for the CPU, see tests/emulation."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    tmp = tmp_path_factory.mktemp("emulated")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp / "lib"), "--build-temp", str(tmp / "temp")],
        cwd=ROOT,
        env={**os.environ, "MEDSSM_CPU": "0", "MEDSSM_CUDA": "1", "MEDSSM_EMULATE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return next((tmp / "lib").glob("medssm/_lib/libmedssm_cuda*"))
