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
    torch.zeros(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_freed_memory_stays():
    first, second = map(int, subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout.split())
    assert second < first / 4
