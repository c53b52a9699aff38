"""Packaging: an isolated wheel, an sdist, an install without a compiler, and the link that became a text file."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCAN = (
    "import torch, medssm; t = torch.ones(1, 2, 1); print(medssm.explain('selective_scan', t, t, -torch.ones(1, 1), t, t)['chosen'], medssm.__file__)"
)


def checkout(tmp_path) -> Path:
    """A copy of what is in the repository, without anything that was built."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")  # an unpacked sdist: the files to copy are not known
    for name in listed.stdout.split("\n"):
        source = ROOT / name
        if name and (source.is_file() or source.is_symlink()):
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    return copy


def environment(**changes) -> dict:
    """No settings of this process; builds share the objects of this checkout, so that they compile what is not there yet."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MEDSSM_", "PYTHONPATH"))}
    return {**kept, "MEDSSM_CUDA": "0", "MEDSSM_OBJECTS": str(ROOT / "build" / "objects"), **changes}


def run(*command, cwd, **changes):
    env = environment(**changes)
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built in isolation: no torch where the build runs."""
    tmp = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "-w", tmp / "dist", cwd=checkout(tmp))
    return next((tmp / "dist").glob("*.whl"))


def test_the_wheel_serves_every_python(wheel):
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(n.startswith("medssm/_lib/libmedssm_cpu") for n in names)
    assert "medssm/kernels/selective_scan/reference.py" in names
    assert not [n for n in names if n.startswith(("kernels/", "tests/", "bench/"))]


def test_the_installed_wheel_runs_its_kernel(wheel, tmp_path):
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path / "site", wheel, cwd=tmp_path)
    shown = run(sys.executable, "-c", SCAN, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"), MEDSSM_CPU_ISA="base")
    assert shown.startswith("native") and "site" in shown


def test_the_library_does_not_flip_denormals(wheel):
    """Linked with -ffast-math, a library makes the loader flush denormals for the whole process."""
    code = "import torch, medssm; medssm.kernels.native.isa(); x = torch.full((4,), 1e-40); print((x * 1.0).tolist()[0] > 0)"
    assert run(sys.executable, "-c", "import medssm.kernels.native;" + code, cwd=ROOT).strip() == "True"


def test_the_sdist_builds(tmp_path):
    copy = checkout(tmp_path)
    run(sys.executable, "-m", "pip", "install", "--quiet", "--target", tmp_path / "tools", "setuptools>=77", cwd=tmp_path)
    run(
        sys.executable, "-c", "from setuptools import build_meta; print(build_meta.build_sdist('dist'))", cwd=copy, PYTHONPATH=str(tmp_path / "tools")
    )
    archive = next((copy / "dist").glob("*.tar.gz"))
    with tarfile.open(archive) as tar:
        names = {n.split("/", 1)[1] for n in tar.getnames() if "/" in n}
        assert "csrc/selective_scan/cuda_forward.cu" in names
        assert {"csrc/isa.cpp", "csrc/include/medssm/abi.h", "csrc/selective_scan/cpu_forward.cpp", "kernels/native.py", "LICENSE"} <= names
        tar.extractall(tmp_path / "unpacked", filter="data")
    source = next((tmp_path / "unpacked").iterdir())
    run(sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "-w", tmp_path / "again", cwd=source, MEDSSM_CPU="0")
    assert list((tmp_path / "again").glob("*.whl"))


def test_without_a_compiler_it_installs_and_the_reference_serves(tmp_path):
    copy = checkout(tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    shown = run(sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--target", tmp_path / "site", ".", cwd=copy, PATH=str(tools), CXX="")
    assert "no C++ compiler found" in shown and "--force-reinstall" in shown
    shown = run(sys.executable, "-c", SCAN, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert shown.startswith("reference")


def test_a_demanded_build_fails_loudly(tmp_path):
    copy = checkout(tmp_path)
    env = environment(MEDSSM_CPU="1", CXX="no-such-compiler")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "-w", str(tmp_path / "dist")], cwd=copy, env=env, capture_output=True, text=True
    )
    assert done.returncode != 0


def test_a_link_that_became_a_text_file_still_imports(tmp_path):
    copy = checkout(tmp_path)
    link = copy / "medssm" / "kernels"
    link.unlink()
    link.write_text("../kernels")
    shown = run(sys.executable, "-c", SCAN, cwd=copy)
    assert shown.startswith("reference") and str(copy) in shown


@pytest.mark.parametrize("isa", ["base", "v3"])
def test_other_instruction_sets_give_the_same_numbers(isa):
    code = (
        "import torch, medssm; from medssm.kernels import native; g = torch.Generator().manual_seed(0);"
        "a = [torch.randn(2, 33, 19, generator=g), torch.rand(2, 33, 19, generator=g), -torch.rand(19, 16, generator=g),"
        "torch.randn(2, 33, 16, generator=g), torch.randn(2, 33, 16, generator=g)];"
        "y = medssm.ops.selective_scan(*a, backend='native'); r = medssm.ops.selective_scan(*(t.double() for t in a), backend='reference');"
        "print(native.isa(), float((y - r).abs().max() / r.abs().max()) < 1e-6)"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT, MEDSSM_CPU_ISA=isa).split() == [isa, "True"]
