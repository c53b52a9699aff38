"""Backends that need a GPU, without one: Triton's kernels in its interpreter, CUDA's emulated thread by thread.

`make test` runs the core of the contract, and what is special about each CUDA kernel; `make test-all` runs the whole contract, and what is special
about each Triton kernel. Each in a process of its
own, since the backend is chosen before anything is imported.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from medssm import backends
from tests.libraries import ROOT, build
from tests.ops.cases import OPS

triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
INTERPRETED = {"TRITON_INTERPRET": "1", "HYPOTHESIS_PROFILE": "few"}


def having(backend: str) -> list[str]:
    """The ops that have such kernels, on whatever machine."""
    return [op for op in OPS if "in this release" not in backends()[op][backend]]


def suite(chosen: list[str], *files: str, at_least: int, **environment: str) -> None:
    """pytest on these files, in a process of its own with these environment variables."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *chosen],
        cwd=ROOT,
        env={**os.environ, "PYTEST_ADDOPTS": "", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= at_least, done.stdout[-500:]


def special(backend: str) -> list[str]:
    """The files with tests of what is special about a backend's kernels, which skip themselves where they cannot run."""
    return [str(path) for path in sorted((ROOT / "tests" / "kernels").glob(f"test_*_{backend}*.py"))]


def core(backend: str, **environment: str) -> None:
    """The core of the contract of every op with such kernels, strictly on them."""
    suite(["-k", backend], "tests/ops/test_core.py", at_least=3 * len(having(backend)), **environment)


def whole(backend: str, op: str, **environment: str) -> None:
    """The whole contract of one op, packed sequences too."""
    suite(["-m", "", "-k", f"[{op}-{backend}"], "tests/ops/test_contract.py", "tests/ops/test_packed.py", at_least=15, **environment)


@triton
@pytest.mark.long
def test_the_core_in_tritons_interpreter():
    core("triton", **INTERPRETED)


@triton
@pytest.mark.thorough
@pytest.mark.parametrize("op", having("triton"))
def test_the_whole_contract_in_tritons_interpreter(op):
    whole("triton", op, **INTERPRETED)


@triton
@pytest.mark.thorough
@pytest.mark.parametrize("file", special("triton"), ids=lambda file: Path(file).stem)
def test_every_configuration_in_tritons_interpreter(file):
    suite(["-m", ""], file, at_least=3, **INTERPRETED)


def test_the_core_of_emulated_cuda(emulated):
    core("cuda", MEDSSM_CUDA_LIBRARY=str(emulated))


def test_what_is_special_in_emulated_cuda(emulated):
    suite([], *special("cuda"), at_least=10, MEDSSM_CUDA_LIBRARY=str(emulated))


@pytest.mark.thorough
@pytest.mark.parametrize("op", having("cuda"))
def test_the_whole_contract_of_emulated_cuda(op, emulated):
    whole("cuda", op, MEDSSM_CUDA_LIBRARY=str(emulated), HYPOTHESIS_PROFILE="brief")


@pytest.mark.thorough
def test_every_configuration_of_emulated_cuda(emulated):
    suite(["-m", ""], *special("cuda"), at_least=30, MEDSSM_CUDA_LIBRARY=str(emulated))


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> Path:
    """csrc's CUDA kernels compiled for the CPU (see tests/emulation), once for all of pytest's workers."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.getbasetemp().parent / "emulated" if "PYTEST_XDIST_WORKER" in os.environ else tmp_path_factory.mktemp("emulated")
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        made = list(folder.glob("lib/medssm/_lib/*"))
        return made[0] if made else build(folder, MEDSSM_CPU="0", MEDSSM_CUDA="1", MEDSSM_EMULATE="1")
