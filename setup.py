"""Builds medssm/_lib/libmedssm_cpu.so (and, where nvcc is, libmedssm_cuda.so): a plain C ABI, no torch and no Python headers.

Knobs (environment): CXX; MEDSSM_CPU=auto|0|1 (0: do not build, 1: fail where it does not build); MEDSSM_SANITIZE=1 (AddressSanitizer and
UBSan).
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
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1", "-O1"]


def works(compiler: str, flags: list[str], scratch: Path) -> bool:
    """Whether the compiler takes these flags."""
    import subprocess

    source = scratch / "probe.cpp"
    source.write_text("int main() { return 0; }\n")
    return subprocess.run([compiler, *flags, str(source), "-o", str(scratch / "probe")], capture_output=True).returncode == 0


class Build(build_ext):
    """Compiles csrc/*.cpp and csrc/<op>/cpu.cpp; without a compiler it warns and the pure-PyTorch reference serves."""

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
        want = os.environ.get("MEDSSM_CPU", "auto")
        if want == "0":
            return
        try:
            self.build_cpu(Path(self.build_lib) / self.get_ext_filename(ext.name))
        except Exception as error:
            if want == "1":
                raise
            self.warn(
                f"the CPU kernels were not built ({error}); medssm will use its PyTorch reference. "
                "Install a C++ compiler, then: pip install --no-cache-dir --force-reinstall medssm"
            )

    def build_cpu(self, out: Path):
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
        if compiler is None:
            raise RuntimeError("no C++ compiler found (g++, clang++ or CXX)")
        scratch = Path(self.build_temp)
        scratch.mkdir(parents=True, exist_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
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
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job: self.spawn([compiler, *flags, *job[2], "-c", str(job[0]), "-o", str(job[1])]), jobs))
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
    ext_modules=[Extension("medssm._lib.libmedssm_cpu", [])],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
