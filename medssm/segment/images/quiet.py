"""Silence of the libraries that read files, while any thread reads."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator

_LIBRARIES = ("nibabel", "pydicom", "tifffile")
_lock = threading.Lock()
_silenced: list[logging.Logger] = []
_filters = contextlib.ExitStack()
_readers = 0


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the warnings of the libraries that read files: what matters is in our own lines.

    Loggers and filters of warnings belong to the process. Files are read in several threads, so the first reader silences the libraries, and the
    last one that leaves restores what was there before the first.
    """
    global _readers
    with _lock:
        if not _readers:
            _filters.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        _readers += 1
        for name, logger in list(logging.root.manager.loggerDict.items()):
            if name.startswith(_LIBRARIES) and isinstance(logger, logging.Logger) and not logger.disabled:
                logger.disabled = True  # a level that changes empties the cache of every logger in the process, which takes longer than a small file
                _silenced.append(logger)
    try:
        yield
    finally:
        with _lock:
            _readers -= 1
            if not _readers:
                while _silenced:
                    _silenced.pop().disabled = False
                _filters.close()
