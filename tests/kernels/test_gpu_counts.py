"""No GPU kernel has more instructions than the committed count says, plus 5 percent: what makes one slower is seen without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import resources

if importlib.util.find_spec("triton") is None or resources.cuobjdump() is None:
    pytest.skip("needs Triton and cuobjdump", allow_module_level=True)

import triton

from bench import gpu_kernels

ROOT = Path(__file__).resolve().parent.parent.parent
COUNTED = json.loads((ROOT / "bench/results/gpu-predicted/results.json").read_text())


def instructions(rows: list[dict], case: str) -> dict[tuple, float]:
    found: dict[tuple, float] = {}
    for row in rows:
        if row["case"] == case:
            key = row["target"], row["direction"], row["kernel"]
            found[key] = found.get(key, 0) + row["cycles"]["issue"]
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("case", [case for case in gpu_kernels.CASES if any(row["case"] == case for row in COUNTED["rows"])])
def test_no_more_instructions_than_counted(case, tmp_path):
    if triton.__version__ != COUNTED["versions"]["Triton"]:
        pytest.skip(f"counted with Triton {COUNTED['versions']['Triton']}, here is {triton.__version__}")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "bench/gpu_kernels.py", case, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    expected, found = instructions(COUNTED["rows"], case), instructions(rows, case)
    assert found.keys() == expected.keys()
    assert not any(row["spilled"] for row in rows)
    assert not {key: (found[key], n) for key, n in expected.items() if found[key] > 1.05 * n + 0.01}
