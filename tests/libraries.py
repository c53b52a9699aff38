"""Compiled libraries that tests build for themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build(folder: Path, **environment: str) -> Path:
    """The library of kernels that setup.py builds into folder under these environment variables."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (library,) = (folder / "lib").glob("medssm/_lib/libmedssm_c*")  # not that of onnxruntime's operators
    return library
