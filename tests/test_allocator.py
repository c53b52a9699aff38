"""What a process frees it gets back without the kernel's fresh pages."""

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, torch
from medssm.allocator import keep_freed_memory
keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**22).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
seen = [faults() for _ in range(60)]  # aligned blocks find their place after ten or so
print(seen[0], max(seen[-20:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_freed_memory_stays():
    first, last = map(int, subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout.split())
    assert last < first / 4
