"""Memory between the steps of a long computation on the CPU."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Let glibc's malloc keep the memory that this process frees and give it out again; without effect on other systems.

    By default malloc returns large blocks to the system at once, and the system clears each page before it gives it out again. With feature maps
    of a volume this takes a fifth of a training step. It is meant for commands: a library must not change its caller's allocator.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_TOP_PAD, 2**26)


def give_memory_back() -> None:
    """Return to the system what glibc's malloc keeps of freed memory; without effect on other systems."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
