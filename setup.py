"""Builds medssm/_lib/libmedssm_cpu.so and, where it can be used, libmedssm_cuda.so: a plain C ABI, no torch and no Python headers.

Beside the CPU library lies libmedssm_onnx.so, which gives its kernels to onnxruntime as custom operators. The CUDA library is built where nvcc is
and the torch of this environment has CUDA. Compiled objects stay in build/objects: a build compiles
again only what changed.

Environment variables: CXX, NVCC, CUDA_HOME; MEDSSM_CPU and MEDSSM_CUDA=auto|0|1 (0: do not build, 1: build, and fail where that fails);
MEDSSM_CPU_ISAS ("base v3 v4", or native: base and what this processor runs) and MEDSSM_CUDA_ARCHS ("80 90 100"): what to compile for;
MEDSSM_OBJECTS: another folder for objects, which several checkouts may share; MEDSSM_SANITIZE=address or address,undefined (the sanitizers' names);
MEDSSM_EMULATE=1 (the CUDA kernels for the CPU, see tests/emulation).
"""

import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OBJECTS = Path(os.environ.get("MEDSSM_OBJECTS") or ROOT / "build" / "objects")
LINUX = sys.platform.startswith("linux")
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
X86 = platform.machine().lower() in ("x86_64", "amd64")
# The libraries. Windows has no compiler that this build knows; onnxruntime's is found by POSIX means.
KINDS = ("cpu", "cuda", "onnx") if sys.platform != "win32" else ("cpu", "cuda")
# One object per kernel and instruction set; the library picks at run time. Other processors get the portable C++ alone.
ISAS = {"base": [], "v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}
# Never -ffast-math: at link time it makes the loader flip denormals for the whole process, torch included.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",
]
# What GPUs of a major version share; code for the last one is kept as PTX too, which the driver compiles for newer ones.
CUDA_ARCHS = os.environ.get("MEDSSM_CUDA_ARCHS", "80 90 100").split()
CUDA_FLAGS = ["-std=c++17", "-O3", "-DMEDSSM_DEVICE", "-Xcompiler=-fPIC,-fvisibility=hidden", "--expt-relaxed-constexpr"]
EMULATE = ["-x", "c++", *FLAGS, "-O1", "-DMEDSSM_DEVICE", "-Wno-unknown-pragmas", "-Itests/emulation"]
# Without optimisation: the checks are the same, and they compile in a fifth of the time.
SANITIZE = ["-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1", "-O0"]
REINSTALL = "pip install --no-cache-dir --force-reinstall --no-deps ."


def sanitize() -> list[str]:
    """The sanitizers' flags, where they are wanted."""
    wanted = os.environ.get("MEDSSM_SANITIZE")
    return [f"-fsanitize={wanted}", *SANITIZE] if wanted else []


def instruction_sets() -> list[str]:
    """The instruction sets to compile for: those of MEDSSM_CPU_ISAS. Where nobody can say what this processor runs, native is all of them."""
    wanted = os.environ.get("MEDSSM_CPU_ISAS", " ".join(ISAS)).split()
    if wanted == ["native"]:
        info = Path("/proc/cpuinfo")
        flags = set(info.read_text().split()) if info.is_file() else {"avx2", "avx512vl"}
        wanted = ["base", *(name for name, flag in (("v3", "avx2"), ("v4", "avx512vl")) if flag in flags)]
    if not wanted or not set(wanted) <= set(ISAS):
        raise SystemExit(f"MEDSSM_CPU_ISAS: expected native, or some of {' '.join(ISAS)}, got {' '.join(wanted)!r}")
    return [name for name in wanted if X86 or name == "base"]


def nvcc() -> str | None:
    """CUDA's compiler, if there is one."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))


def torch_has_cuda() -> bool:
    """Whether the torch of this environment is a CUDA build. Reads a file: pip's isolated builds cannot import torch."""
    spec = importlib.util.find_spec("torch")
    folders = [*(spec.submodule_search_locations if spec else []), *(f"{sysconfig.get_path(kind)}/torch" for kind in ("purelib", "platlib"))]
    file = next((file for folder in folders if (file := Path(folder) / "version.py").is_file()), None)
    return file is not None and re.search(r"^cuda\b[^=]*= *['\"]", file.read_text(), re.MULTILINE) is not None


@functools.cache
def identity(compiler: str) -> str:
    """What a compiler says of its version."""
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout


def dependencies(file: Path) -> list[Path]:
    """The source and headers that a compiler's dependency file (of -MMD) names: "object: source header \\<newline> header ..."."""
    names = re.findall(r"(?:\\[ #]|[^\s\\])+", file.read_text().split(": ", 1)[1])
    return [ROOT / name.replace("\\", "") for name in names]


def digest(files: list[Path]) -> str:
    """Of the files' contents."""
    if not all(file.is_file() for file in files):
        return "a file is missing"
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def compile_object(command: list[str], source: Path, name: str) -> str:
    """The object file of a source; compiled only where command, compiler, source or a header changed. Paths are relative to the root."""
    relative = source.relative_to(ROOT).as_posix()
    key = hashlib.sha256("\0".join([identity(command[0]), *command, relative]).encode()).hexdigest()[:16]
    target, known, state = (OBJECTS / f"{name}-{key}{suffix}" for suffix in (".o", ".d", ".state"))
    if target.is_file() and state.is_file() and known.is_file() and state.read_text() == digest(dependencies(known)):
        return str(target)
    OBJECTS.mkdir(parents=True, exist_ok=True)
    made, found = (OBJECTS / f"{name}-{key}.{os.getpid()}{suffix}" for suffix in (".o", ".d"))
    print(f"compiling {name}\n", end="", flush=True)  # one write: several threads print
    begin = time.time()
    subprocess.run([*command, "-MMD", "-MF", str(found), "-c", relative, "-o", str(made)], cwd=ROOT, check=True)
    read = dependencies(found)
    os.replace(made, target)
    os.replace(found, known)
    # A file saved since then may hold something else than what was compiled.
    state.write_text(digest(read) if all(file.stat().st_mtime < begin for file in read) else "compile again")
    return str(target)


def compile_all(jobs: list[tuple[list[str], Path, str]]) -> list[str]:
    """The objects of all jobs. The first failure ends it."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(compile_object, *job) for job in jobs]
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class Build(build_ext):
    """Compiles csrc/**/*.cpp with a C++ compiler and csrc/**/*.cu with nvcc; where one is missing it warns, and other backends serve."""

    def get_ext_filename(self, name):
        return name.replace(".", "/") + SUFFIX

    def copy_extensions_to_source(self):
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            if built.is_file():
                target = ROOT / self.get_ext_filename(ext.name)
                target.parent.mkdir(exist_ok=True)
                # A new file, not new bytes in the old one: a process may have the old one mapped.
                shutil.copy2(built, target.with_suffix(".new"))
                os.replace(target.with_suffix(".new"), target)

    def build_extension(self, ext):
        out = Path(self.build_lib) / self.get_ext_filename(ext.name)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.unlink(missing_ok=True)  # an earlier build's library is not this one's
        cuda, onnx = (ext.name.endswith(f"_{kind}") for kind in ("cuda", "onnx"))
        want = os.environ.get("MEDSSM_CUDA" if cuda else "MEDSSM_CPU", "auto")
        if want == "0" or (cuda and want == "auto" and not (nvcc() and torch_has_cuda())):
            return
        try:
            (self.build_cuda if cuda else self.build_onnx if onnx else self.build_cpu)(out)
        except Exception as error:
            if want == "1":
                raise
            tool = "CUDA's compiler" if cuda else "a C++ compiler"
            lacks = "CUDA kernels" if cuda else "custom operators for onnxruntime" if onnx else "CPU kernels"
            then = f"medssm will use its {'Triton kernels' if cuda else 'PyTorch reference'}" if not onnx else "exported files with them do not run"
            self.warn(f"the {lacks} were not built ({error}); {then}. Install {tool}, then: {REINSTALL}")

    def named(self, source: Path) -> list[str]:
        """What the files right under csrc/, and those of csrc/onnxruntime, are told about the build."""
        return [f'-DMEDSSM_VERSION="{self.distribution.get_version()}"'] if source.parent.name in ("csrc", "onnxruntime") else []

    def build_cuda(self, out: Path):
        if os.environ.get("MEDSSM_EMULATE") == "1":
            compiler, flags, link, about = os.environ.get("CXX", "g++"), EMULATE, [], []
        else:
            if nvcc() is None:
                raise RuntimeError("no nvcc found (NVCC, CUDA_HOME or PATH)")
            last = f"compute_{CUDA_ARCHS[-1]}"
            link = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS] + [f"-gencode=arch={last},code={last}"]
            about = [f'-DMEDSSM_TARGETS="{" ".join([*(f"sm_{arch}" for arch in CUDA_ARCHS), last])}"']
            compiler, flags = nvcc(), [*CUDA_FLAGS, *link]
        jobs = []
        for source in sorted((ROOT / "csrc").glob("**/*.cu")):
            told = [*self.named(source), *about] if source.parent.name == "csrc" else []
            jobs.append(([compiler, *flags, *told, "-Icsrc/include"], source, f"{source.parent.name}_{source.stem}_cu"))
        subprocess.run([compiler, *link, "-shared", *compile_all(jobs), "-o", str(out)], check=True)

    def build_cpu(self, out: Path):
        command = self.cpu_command()
        isas = instruction_sets()
        compiled = [f"-DMEDSSM_HAS_{isa}" for isa in isas]
        jobs = [([*command, *compiled, *self.named(source)], source, f"csrc_{source.stem}") for source in sorted((ROOT / "csrc").glob("*.cpp"))]
        for source in sorted((ROOT / "csrc").glob("*/cpu*.cpp")):
            for isa in isas:
                jobs.append(([*command, *ISAS[isa], f"-DMEDSSM_ISA={isa}"], source, f"{source.parent.name}_{source.stem}_{isa}"))
        self.link(command, jobs, out)

    def build_onnx(self, out: Path):
        command = self.cpu_command()
        sources = sorted((ROOT / "csrc" / "onnxruntime").glob("*.cpp"))
        self.link(command, [([*command, *self.named(source)], source, f"onnxruntime_{source.stem}") for source in sources], out)

    def cpu_command(self) -> list[str]:
        """The C++ compiler with its flags."""
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
        if compiler is None:
            raise RuntimeError("no C++ compiler found (g++, clang++ or CXX)")
        clang = ["-Wno-unknown-warning-option"] if "clang" in identity(compiler) else []  # it does not know all warnings that g++ gives
        return [compiler, *FLAGS, *clang, *sanitize(), "-Icsrc/include"]

    def link(self, command: list[str], jobs: list[tuple[list[str], Path, str]], out: Path):
        """A shared library of the jobs' objects."""
        # Every symbol is found at link time, but for the sanitizers' own, which are loaded first.
        system = ["-Wl,--as-needed", "-ldl", *([] if sanitize() else ["-Wl,--no-undefined"])] if LINUX else []
        subprocess.run([command[0], "-shared", "-pthread", *sanitize(), *compile_all(jobs), *system, "-o", str(out)], check=True)


class Wheel(bdist_wheel):
    """One wheel per platform for every Python 3, since the libraries have no Python ABI; for every platform where none was built."""

    def run(self):
        self.run_command("build")
        if not list(Path(self.get_finalized_command("build").build_lib).glob("medssm/_lib/*")):
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()

    def get_tag(self):
        return ("py3", "none", "any" if self.root_is_pure else super().get_tag()[2])


def layout() -> dict:
    """The packages. medssm/kernels links to kernels/; a checkout or archive without links takes that folder by name."""
    packages = find_packages(include=["medssm", "medssm.*", "medssm_runtime"])
    if "medssm.kernels" in packages:
        return {"packages": packages}
    kernels = [f"medssm.{name}" for name in find_packages(include=["kernels", "kernels.*"])]
    return {"packages": [*packages, *kernels], "package_dir": {"medssm.kernels": "kernels"}}


setup(**layout(), ext_modules=[Extension(f"medssm._lib.libmedssm_{kind}", []) for kind in KINDS], cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
