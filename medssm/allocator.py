"""Memory between the steps of a long computation on the CPU."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what this process frees for what it asks for next; without effect on other systems.

    By default large blocks go back to the kernel at once and come back as pages that it has to clear: with feature maps of a volume, a
    fifth of a training step. For a process that is a command, not for a library to do to its caller.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_TOP_PAD, 2**26)
