"""The wheel of medssm_runtime by itself, as `make runtime-wheel` builds it: for one platform, with the libraries of medssm's operators inside."""

import email
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import medssm_runtime
from medssm_runtime.engines import LIBRARY

PACKAGE = Path(medssm_runtime.__file__).parent
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1], {'--build-option': sys.argv[2:]}))"


def test_it_holds_the_package_and_its_libraries_alone(tmp_path):
    source = tmp_path / "medssm_runtime"
    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("__pycache__", "_lib", "build", "*.egg-info"))
    shutil.copy(PACKAGE.parent / "LICENSE", source)
    (source / "_lib").mkdir()
    (source / "_lib" / LIBRARY).write_bytes(b"library")
    platform = f"--plat-name={sysconfig.get_platform()}"
    done = subprocess.run([sys.executable, "-c", BUILD, tmp_path, platform], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel = zipfile.ZipFile(tmp_path / done.stdout.splitlines()[-1])
    about = f"medssm_runtime-{medssm_runtime.__version__}"
    assert Path(wheel.filename).name.startswith(f"{about}-py3-none-") and not wheel.filename.endswith("-any.whl")
    names = {name for name in wheel.namelist() if not name.startswith(f"{about}.dist-info/")}
    assert names == {f"medssm_runtime/{path.name}" for path in PACKAGE.glob("*.py")} | {f"medssm_runtime/_lib/{LIBRARY}"}
    assert f"{about}.dist-info/licenses/LICENSE" in wheel.namelist()
    needs = email.message_from_bytes(wheel.read(f"{about}.dist-info/METADATA")).get_all("Requires-Dist")
    assert not any("torch" in line or "monai" in line for line in needs) and any("numpy" in line for line in needs)
