"""The network that is offered to MONAI passes its own tests, and says what is missing where medssm is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments, **environment):
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT / "contrib/monai",
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.thorough
def test_its_own_tests_pass():
    pytest.importorskip("parameterized")
    done = python("test_umamba.py")
    assert done.returncode == 0 and "OK" in done.stderr and "skipped" not in done.stderr, done.stderr


@pytest.mark.thorough
def test_without_medssm_it_names_what_is_missing():
    done = python("-c", "import sys; sys.modules['medssm'] = None; import umamba; umamba.UMamba(2, 1, 2)")
    assert "OptionalImportError" in done.stderr and "medssm" in done.stderr
