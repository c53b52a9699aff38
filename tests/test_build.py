"""The build: what the archive and the wheels hold, when something is compiled again, what a build without compiler or links gives."""

import ctypes
import email
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import medssm

ROOT = Path(__file__).resolve().parent.parent
SCAN = (
    "import torch, medssm; t = torch.ones(1, 2, 1); print(medssm.explain('selective_scan', t, t, -torch.ones(1, 1), t, t)['chosen'], medssm.__file__)"
)
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
compiled = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone shares torch's threads")


def repository() -> list[str]:
    """Every file of the checkout that git does not ignore."""
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")  # an unpacked archive: the files to copy are not known
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def checkout(folder: Path, *, links: bool = True, ops: str | None = None) -> Path:
    """A copy of the checkout; without links it is what git makes on Windows; ops: only this op's C++ and CUDA."""
    for name in repository():
        if ops and re.match(rf"csrc/(?!include/|onnxruntime/|{ops}/)\w+/", name):
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink() and not links:
            (folder / name).write_text(os.readlink(ROOT / name))
        else:
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def start(*command, cwd, **changes) -> subprocess.CompletedProcess:
    """A command in a clean environment. Builds share the objects of this checkout, and its instruction sets: they compile what is not there yet."""
    kept = {name: value for name, value in os.environ.items() if name == "MEDSSM_CPU_ISAS" or not name.startswith(("MEDSSM_", "PYTHONPATH"))}
    env = {**kept, "MEDSSM_CUDA": "0", "MEDSSM_OBJECTS": str(ROOT / "build" / "objects"), **changes}
    return subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)


def run(*command, cwd, **changes) -> str:
    done = start(*command, cwd=cwd, **changes)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def build(what: str, source: Path, **changes) -> tuple[Path, str]:
    """build_sdist or build_wheel, where torch cannot be imported, as in an isolated build: the file, and what was said."""
    code = f"import sys; sys.modules['torch'] = None; from setuptools import build_meta; build_meta.{what}('dist')"
    said = run(sys.executable, "-c", code, cwd=source, **changes)
    return next((source / "dist").iterdir()), said


def installed(wheel: Path, folder: Path) -> str:
    """The backend of a scan, and where medssm was imported from, with the unpacked wheel on the path."""
    zipfile.ZipFile(wheel).extractall(folder)
    return run(sys.executable, "-c", SCAN, cwd=folder, PYTHONPATH=str(folder), MEDSSM_CPU_ISA="base")


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    return build("build_sdist", checkout(tmp_path_factory.mktemp("checkout")))[0]


@pytest.fixture(scope="module")
def wheel(archive, tmp_path_factory) -> Path:
    """Built from the source archive, as pip and the release do."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return build("build_wheel", next(folder.iterdir()))[0]


def test_the_archive_holds_the_repository(archive):
    """Every file once: medssm/kernels is a link to kernels. What CI runs on one host is no part of it."""
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name and not tar.getmember(name).isdir()}
    generated = {name for name in names if name in ("PKG-INFO", "setup.cfg") or name.startswith("medssm.egg-info/")}
    assert names - generated == {name for name in repository() if name != "medssm/kernels" and not name.startswith(".ci/")}


@compiled
def test_the_wheel_serves_every_python(wheel):
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert all(any(name.startswith(f"medssm/_lib/libmedssm_{kind}") for name in names) for kind in ("cpu", "onnx"))
    assert {"medssm/py.typed", "medssm/models/measured.json", "medssm/kernels/selective_scan/reference.py"} <= set(names)
    assert {name.split("/")[0] for name in names} == {"medssm", "medssm_runtime", f"medssm-{medssm.__version__}.dist-info"}


@compiled
def test_the_installed_wheel_runs_its_kernel(wheel, tmp_path):
    assert installed(wheel, tmp_path).split() == ["native", str(tmp_path / "medssm" / "__init__.py")]


def test_the_metadata_is_complete(wheel):
    names = zipfile.ZipFile(wheel)
    about = email.message_from_bytes(names.read(f"medssm-{medssm.__version__}.dist-info/METADATA"))
    assert about["Version"] == medssm.__version__
    assert (about["Author"], about["License-Expression"], about["Requires-Python"]) == ("medssm developers", "Apache-2.0", ">=3.10")
    assert about["Summary"] and about["Keywords"] and "Typing :: Typed" in about.get_all("Classifier")
    assert {line.split(",")[0] for line in about.get_all("Project-URL")} >= {"Homepage", "Documentation", "Source", "Issues", "Changelog"}
    assert set(about.get_all("Provides-Extra")) >= {"segment", "nnunet", "docs", "dev"}
    assert about["Description-Content-Type"] == "text/markdown"


def test_the_version_stands_in_one_place():
    """medssm/__init__.py has it. The metadata is made from it (above), and so are the libraries."""
    written = re.escape(medssm.__version__)
    for name in ("pyproject.toml", "setup.py", "CITATION.cff"):
        assert not re.search(rf"version['\"]?\s*[:=]\s*['\"]?{written}", (ROOT / name).read_text(), re.IGNORECASE), name


def test_without_compiler_and_links_the_wheel_is_pure_and_the_reference_serves(tmp_path):
    """As on Windows, where git makes medssm/kernels a text file."""
    source, nothing = checkout(tmp_path / "checkout", links=False), tmp_path / "bin"
    nothing.mkdir()
    wheel, said = build("build_wheel", source, PATH=str(nothing), CXX="")
    assert wheel.name == f"medssm-{medssm.__version__}-py3-none-any.whl"
    assert "no C++ compiler found" in said and "--force-reinstall" in said
    assert "medssm/kernels/selective_scan/reference.py" in zipfile.ZipFile(wheel).namelist()
    said = installed(wheel, tmp_path / "site").splitlines()
    assert said[0].split() == ["reference", str(tmp_path / "site" / "medssm" / "__init__.py")]
    assert "the compiled CPU kernels are not used" in said[1] and len(said) == 2  # once


def test_a_checkout_without_links_imports(tmp_path):
    source = checkout(tmp_path, links=False)
    assert run(sys.executable, "-c", SCAN, cwd=source).splitlines()[0].split() == ["reference", str(source / "medssm" / "__init__.py")]


def test_a_demanded_build_fails_loudly(tmp_path):
    done = start(sys.executable, "setup.py", "build_ext", cwd=checkout(tmp_path), MEDSSM_CPU="1", CXX="no-such-compiler")
    assert done.returncode != 0 and "no-such-compiler" in done.stderr


def program(file: Path, text: str) -> str:
    """An executable file with this shell script."""
    file.write_text("#!/bin/sh\n" + text)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler is a shell script")
@pytest.mark.parametrize("cuda, tried", [("None", False), ("'13.0'", True)])
def test_the_cuda_library_is_built_where_torch_has_cuda(cuda, tried, tmp_path):
    """The compiler of this test fails: the build goes on, with a warning."""
    torch = tmp_path / "site" / "torch"
    torch.mkdir(parents=True)
    (torch / "__init__.py").write_text("raise RuntimeError('the build does not import torch')")
    (torch / "version.py").write_text(f"from typing import Optional\ncuda: Optional[str] = {cuda}\nhip: Optional[str] = None\n")
    nvcc = program(tmp_path / "nvcc", "exit 1\n")
    settings = {
        "MEDSSM_CPU": "0",
        "MEDSSM_CUDA": "auto",
        "NVCC": nvcc,
        "PYTHONPATH": str(tmp_path / "site"),
        "MEDSSM_OBJECTS": str(tmp_path / "objects"),
    }
    said = run(sys.executable, "setup.py", "build_ext", cwd=checkout(tmp_path / "checkout", ops="causal_conv1d"), **settings)
    assert ("the CUDA kernels were not built" in said) == tried


@compiled
@pytest.mark.skipif(sys.platform == "win32", reason="the compiler is a shell script")
def test_only_what_changed_is_compiled_again(tmp_path):
    """In a library with one op for one instruction set, which it then names on every processor."""
    source = checkout(tmp_path / "checkout", ops="causal_conv1d")
    quick = program(tmp_path / "compiler", f'exec {COMPILER} "$@" -O0\n')

    def made(source: Path = source) -> list[str]:
        settings = {"MEDSSM_CPU": "1", "MEDSSM_CPU_ISAS": "base", "MEDSSM_OBJECTS": str(tmp_path / "objects"), "CXX": quick}
        said = run(sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "lib", cwd=source, **settings)
        return sorted(re.findall(r"^compiling (\S+)", said, re.MULTILINE))

    others = [f"{file.parent.name}_{file.stem}" for folder in ("", "onnxruntime") for file in (source / "csrc" / folder).glob("*.cpp")]
    assert made() == sorted(["causal_conv1d_cpu_base", *others])
    assert made() == []
    assert made(shutil.copytree(source, tmp_path / "another", symlinks=True)) == []
    with (source / "csrc" / "causal_conv1d" / "tile.h").open("a") as header:
        header.write("// A change.\n")
    assert made() == ["causal_conv1d_cpu_base"]
    assert made() == []

    library = ctypes.CDLL(str(next((tmp_path / "lib").rglob("libmedssm_cpu*"))))
    library.medssm_cpu_isa.restype = ctypes.c_char_p
    assert library.medssm_cpu_isa() == b"base" and library.medssm_causal_conv1d_forward_base


COMPILES_NOTHING = 'while [ $# -gt 0 ]; do case $1 in -o) : > "$2";; -MF) echo "object: " > "$2";; esac; shift; done\n'


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler is a shell script")
def test_kernels_are_compiled_for_the_instruction_sets_that_are_asked_for(tmp_path):
    source, compiler = checkout(tmp_path / "checkout", ops="causal_conv1d"), program(tmp_path / "compiler", COMPILES_NOTHING)

    def made(isas: str) -> list[str]:
        settings = {"MEDSSM_CPU": "1", "CXX": compiler, "MEDSSM_CPU_ISAS": isas, "MEDSSM_OBJECTS": str(tmp_path / isas)}
        return re.findall(r"compiling causal_conv1d_cpu_(\w+)", run(sys.executable, "setup.py", "build_ext", cwd=source, **settings))

    from medssm.kernels import native

    here = made("native")
    assert "base" in here and (native.reason() or native.isa() in here)
    assert made("base") == ["base"]
    done = start(sys.executable, "setup.py", "build_ext", cwd=source, MEDSSM_CPU="auto", CXX=compiler, MEDSSM_CPU_ISAS="v3 v5")
    assert done.returncode != 0 and "MEDSSM_CPU_ISAS: expected native, or some of base v3 v4, got 'v3 v5'" in done.stderr


@compiled
@pytest.mark.parametrize("compiler", ["g++", "clang++", "clang++-14", "clang++-16"])
def test_every_compiler_takes_the_choice_of_instruction_set(compiler, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    settings = ["-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Werror", "-DMEDSSM_HAS_v3", "-DMEDSSM_HAS_v4", "-Icsrc/include"]
    run(compiler, *settings, "-c", "csrc/isa.cpp", "-o", tmp_path / "isa.o", cwd=ROOT)


THREADS = (
    "import ctypes; library = ctypes.CDLL({!r}); library.medssm_cpu_threads.restype = ctypes.c_char_p; print(library.medssm_cpu_threads().decode())"
)


@linux
def test_threads_are_those_of_torch():
    """One pool: the library names no OpenMP library of its own, and takes the one that torch has loaded."""
    from medssm.kernels import native

    if native.reason():
        pytest.skip(native.reason())
    assert not re.search(rb"lib\w*omp\d?[-.\w]*\.so", native.path().read_bytes())
    library = ctypes.CDLL(str(native.path()))
    library.medssm_cpu_threads.restype = ctypes.c_char_p
    assert library.medssm_cpu_threads() == b"OpenMP"
    assert run(sys.executable, "-c", THREADS.format(str(native.path())), cwd=ROOT).strip() == "std::thread"


TEAM = """
#include <cstdio>
#include <vector>
#include "medssm/parallel.h"
// In each round every thread adds one to its neighbour's number: a round may begin only when the last one has ended for all.
int main() {
  std::vector<int> number;
  const auto body = [](void* context, int64_t rank, int64_t size, void* gate) {
    std::vector<int>& number = *static_cast<std::vector<int>*>(context);
    for (int round = 0; round < 200; ++round) {
      const int mine = number[rank];
      medssm::team_barrier(gate);
      number[(rank + 1) % size] = mine + 1;
      medssm::team_barrier(gate);
    }
  };
  for (int threads = 2; threads <= 7; ++threads) {
    number.assign(threads, 0);
    medssm::run_team(threads, body, &number);
    if (number != std::vector<int>(threads, 200)) std::printf("%d threads: wrong\\n", threads);
  }
  std::puts("done");
}
"""


@compiled
@pytest.mark.skipif(sys.platform == "win32", reason="not compiled there")
def test_threads_without_torch_wait_for_each_other(tmp_path):
    (tmp_path / "team.cpp").write_text(TEAM)
    libraries = ["-ldl"] if sys.platform.startswith("linux") else []
    sources = [tmp_path / "team.cpp", "csrc/threads.cpp"]
    run(COMPILER, "-std=c++17", "-O1", "-pthread", "-Icsrc/include", *sources, "-o", tmp_path / "team", *libraries, cwd=ROOT)
    assert run(tmp_path / "team", cwd=tmp_path).strip() == "done"


def test_the_library_does_not_flip_denormals():
    """Linked with -ffast-math, a library makes the loader flush denormals for the whole process."""
    code = "import torch; from medssm.kernels import native; native.isa(); print((torch.full((4,), 1e-40) * 1.0).tolist()[0] > 0)"
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "True"


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
