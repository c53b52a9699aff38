"""Builds medssm/_lib/libmedssm_cpu.so and, where nvcc is, libmedssm_cuda.so: a plain C ABI, no torch and no Python headers.

Knobs (environment): CXX, NVCC, CUDA_HOME; MEDSSM_CPU and MEDSSM_CUDA=auto|0|1 (0: do not build, 1: fail where it does not build); MEDSSM_CPU_ISAS
("base v3 v4") and MEDSSM_CUDA_ARCHS ("80 90 100"): what to compile for; MEDSSM_SANITIZE=1 (AddressSanitizer and UBSan); MEDSSM_EMULATE=1 (the CUDA
kernels for the CPU, see tests/emulation).
"""

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
X86 = platform.machine().lower() in ("x86_64", "amd64")
# One object per kernel and instruction set; the loader picks at run time. Other processors get the portable C++ alone.
ISAS = {"base": [], "v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"]} if X86 else {"base": []}
ISAS = {name: flags for name, flags in ISAS.items() if name in os.environ.get("MEDSSM_CPU_ISAS", "base v3 v4").split()}
# Never -ffast-math: at link time it makes the loader flip denormals for the whole process, torch included.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fPIC",
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
EMULATE = ["-x", "c++", *FLAGS, "-O1", "-DMEDSSM_DEVICE", "-Wno-unknown-pragmas"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1", "-O1"]


def works(compiler: str, flags: list[str], scratch: Path) -> bool:
    """Whether the compiler takes these flags."""
    import subprocess

    source = scratch / "probe.cpp"
    source.write_text("int main() { return 0; }\n")
    return subprocess.run([compiler, *flags, str(source), "-o", str(scratch / "probe")], capture_output=True).returncode == 0


def nvcc() -> str | None:
    """CUDA's compiler, if there is one."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))


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
        scratch = Path(self.build_temp)
        for folder in (scratch, out.parent):
            folder.mkdir(parents=True, exist_ok=True)
        cuda = ext.name.endswith("_cuda")
        want = os.environ.get("MEDSSM_CUDA" if cuda else "MEDSSM_CPU", "auto")
        if want == "0" or (cuda and want == "auto" and nvcc() is None):
            return
        try:
            (self.build_cuda if cuda else self.build_cpu)(out, scratch)
        except Exception as error:
            if want == "1":
                raise
            lacks, tool = ("CUDA", "Install CUDA's compiler") if cuda else ("CPU", "Install a C++ compiler")
            self.warn(
                f"the {lacks} kernels were not built ({error}); medssm will use its {'Triton kernels' if cuda else 'PyTorch reference'}. "
                f"{tool}, then: pip install --no-cache-dir --force-reinstall medssm"
            )

    def compile_all(self, jobs: list[list[str]]):
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self.spawn, jobs))

    def build_cuda(self, out: Path, scratch: Path):
        sources = sorted((ROOT / "csrc").glob("**/*.cu"))
        objects = [scratch / f"{source.parent.name}_{source.stem}.cu.o" for source in sources]
        if os.environ.get("MEDSSM_EMULATE") == "1":
            command = [os.environ.get("CXX", "g++"), *EMULATE, f"-I{ROOT / 'tests/emulation'}"]
            link = [os.environ.get("CXX", "g++")]
        else:
            if nvcc() is None:
                raise RuntimeError("no nvcc found (NVCC, CUDA_HOME or PATH)")
            targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS]
            targets.append(f"-gencode=arch=compute_{CUDA_ARCHS[-1]},code=compute_{CUDA_ARCHS[-1]}")
            names = " ".join([*(f"sm_{arch}" for arch in CUDA_ARCHS), f"compute_{CUDA_ARCHS[-1]}"])
            command, link = [nvcc(), *CUDA_FLAGS, *targets, f'-DMEDSSM_TARGETS="{names}"'], [nvcc(), *targets]
        command.append(f"-I{ROOT / 'csrc/include'}")
        self.compile_all([[*command, "-c", str(source), "-o", str(obj)] for source, obj in zip(sources, objects, strict=True)])
        self.spawn([*link, "-shared", *map(str, objects), "-o", str(out)])

    def build_cpu(self, out: Path, scratch: Path):
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
        if compiler is None:
            raise RuntimeError("no C++ compiler found (g++, clang++ or CXX)")
        openmp = ["-fopenmp"] if works(compiler, ["-fopenmp"], scratch) else ["-pthread"]
        flags = [*FLAGS, *openmp, f"-I{ROOT / 'csrc/include'}"]
        link = [*openmp, "-Wl,--as-needed"] if sys.platform.startswith("linux") else openmp
        if os.environ.get("MEDSSM_SANITIZE") == "1":
            flags, link = [*flags, *SANITIZE], [*link, *SANITIZE]
        if X86:
            flags.append("-DMEDSSM_MULTI_ISA")
        jobs = [(source, scratch / f"{source.stem}.o", []) for source in sorted((ROOT / "csrc").glob("*.cpp"))]
        for source in sorted((ROOT / "csrc").glob("*/cpu*.cpp")):
            for isa, march in ISAS.items():
                jobs.append((source, scratch / f"{source.parent.name}_{source.stem}_{isa}.o", [*march, f"-DMEDSSM_ISA={isa}"]))
        self.compile_all([[compiler, *flags, *extra, "-c", str(source), "-o", str(obj)] for source, obj, extra in jobs])
        self.spawn([compiler, "-shared", *link, *[str(obj) for _, obj, _ in jobs], "-o", str(out)])


class Wheel(bdist_wheel):
    """One wheel per platform for every Python 3: the library has no Python ABI."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    packages=find_packages(include=["medssm", "medssm.*"]),
    ext_modules=[Extension("medssm._lib.libmedssm_cpu", []), Extension("medssm._lib.libmedssm_cuda", [])],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
