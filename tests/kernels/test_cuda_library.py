"""The compiled CUDA library without a GPU: what it holds, that it loads without a driver, and that it says why it is idle."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medssm.kernels import cuda
from tests.kernels import resources

ROOT = Path(__file__).resolve().parent.parent.parent
KERNELS = {
    "local": 6,
    "apply": 6,
    "local_adjoint": 6,
    "apply_adjoint": 6,
    "carry": 4,
    "forward": 4,
    "backward": 2,
    "backward_any": 2,
    "initial_gradients": 2,
    "convolve": 4,
    "weights": 4,
}


def ask(expression: str, **environment: str) -> str:
    code = f"from medssm.kernels import cuda; import medssm; print({expression})"
    env = {**{k: v for k, v in os.environ.items() if not k.startswith("MEDSSM_")}, **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The library of this checkout; where torch has no CUDA there is none, and nvcc builds it for these tests: minutes."""
    if cuda.path().is_file() and not cuda.EMULATED:
        return cuda.path()
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc here")
    folder = tmp_path_factory.mktemp("cuda")
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder, "--build-temp", folder]
    env = {**os.environ, "MEDSSM_CUDA": "1", "MEDSSM_CPU": "0", "MEDSSM_CUDA_ARCHS": "80 90 100"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "medssm" / "_lib" / cuda.path().name


@pytest.mark.thorough
def test_it_says_what_it_was_compiled_for(library):
    assert ask("cuda.targets()", MEDSSM_CUDA_LIBRARY=str(library)) == "sm_80 sm_90 sm_100 compute_100"


@pytest.mark.thorough
@pytest.mark.skipif(resources.cuobjdump() is None, reason="neither the toolkit's cuobjdump nor Triton's is here")
def test_no_kernel_spills_on_any_target(library):
    """A stack or local memory would hold what the registers had no room for."""
    rows = resources.usage(library)
    for target in ("sm_80", "sm_90", "sm_100"):
        names = [row.name for row in rows if row.target == target]
        for kernel, count in KERNELS.items():
            found = [name for name in names if re.search(rf"\d{kernel}I", name)]
            assert len(found) == count, f"{kernel} on {target}: {len(found)} of {count}"
    spilled = [f"{row.name} on {row.target}: stack {row.stack}, local {row.local}" for row in rows if row.stack or row.local]
    assert not spilled, "\n".join(spilled)


@pytest.mark.thorough
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_loads_without_a_driver_and_says_why_it_is_idle(library):
    environment = {"MEDSSM_CUDA_LIBRARY": str(library)}
    assert "the library is there (for sm_80 sm_90 sm_100 compute_100)" in ask("cuda.reason()", **environment)
    for op in ("selective_scan", "selective_scan_nd", "causal_conv1d", "depthwise_conv"):
        assert "the library is there" in ask(f"medssm.backends()['{op}']['cuda']", **environment)


def test_a_missing_library_and_a_broken_one_are_one_line_each(tmp_path):
    missing = ask("cuda.reason()", MEDSSM_CUDA_LIBRARY=str(tmp_path / "none.so"))
    assert "no compiled library at" in missing and "install again where nvcc is" in missing and "\n" not in missing
    broken = tmp_path / "broken.so"
    broken.write_text("not a library")
    assert "does not load" in ask("cuda.reason()", MEDSSM_CUDA_LIBRARY=str(broken))
    other = next((Path(torch.__file__).parent / "lib").glob("libc10.*"))
    assert "does not load" in ask("cuda.reason()", MEDSSM_CUDA_LIBRARY=str(other))
