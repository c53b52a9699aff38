"""What is said of the machine is what the system says."""

import os
import sys
from pathlib import Path

import numpy
import pytest
import torch

from medssm import machine


def test_the_description_names_processor_memory_and_versions():
    table = machine.describe()
    assert all(isinstance(value, str) and value for value in table.values())
    assert table["torch"] == torch.__version__ and table["numpy"] == numpy.__version__ and table["threads"] == str(torch.get_num_threads())
    assert float(table["memory"].removesuffix(" GiB")) > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_numbers_are_those_of_linux():
    rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert machine.describe()["memory"] == f"{int(rows['MemTotal'].split()[0]) / 2**20:.0f} GiB"
    assert 0 < machine.free_memory() <= int(rows["MemTotal"].split()[0]) * 1024
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    assert machine.describe()["processor"] in names or not names


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")
def test_cores_are_those_the_process_may_use(monkeypatch):
    monkeypatch.delenv("OMP_PROC_BIND", raising=False)
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert machine.cores() == 1
        monkeypatch.setenv("OMP_PROC_BIND", "true")  # then this thread's core is OpenMP's choice and says nothing of the process
        assert machine.cores() == os.cpu_count()
        monkeypatch.delenv("OMP_PROC_BIND")
    finally:
        os.sched_setaffinity(0, allowed)
    assert machine.cores() == len(allowed)


@pytest.mark.parametrize(("flags", "found"), [(["avx2", "avx512f"], False), (["avx512f", "avx512_bf16"], True), (["amx_bf16"], True), (None, False)])
def test_arithmetic_in_bfloat16_is_read_from_the_processor(monkeypatch, flags, found):
    monkeypatch.setattr("cpuinfo.get_cpu_info", lambda: {} if flags is None else {"flags": flags})
    assert machine.has_bf16() is found


def test_a_package_that_is_missing_is_said():
    assert machine._version("no-such-package-here") == "not installed"


def test_the_core_does_not_need_what_describes_the_machine():
    import subprocess

    code = "import sys, medssm; sys.exit(bool({'psutil', 'cpuinfo', 'jinja2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/jobs/a", "sys/fs/cgroup/jobs/a", ("memory.max", "memory.current", "inactive_file")),
        ("0::/jobs/a", "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")),
        ("4:cpu,memory:/b", "sys/fs/cgroup/memory/b", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ],
)
def test_a_control_group_limits_the_free_memory(tmp_path, line, folder, names):
    for path in ("proc/self", folder):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"7:cpu:/x\n{line}\n")
    for name, text in ((names[0], "1000"), (names[1], "900"), ("memory.stat", f"anon 5\n{names[2]} 300\n")):
        (tmp_path / folder / name).write_text(text)
    assert list(machine._limits_of_group(tmp_path)) == [400]
    (tmp_path / folder / names[0]).write_text("max")
    assert not list(machine._limits_of_group(tmp_path))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_a_limit_of_the_process_limits_the_free_memory():
    import resource

    import psutil

    limits = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**28, limits[1]))
        assert 2**27 < machine.free_memory() <= 2**28
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
