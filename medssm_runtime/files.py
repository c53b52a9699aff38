"""A file that is written as a whole or, with one clear error, not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from medssm_runtime.errors import UserError, first_line


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """The name to write to in this block; its end puts the file in the place of `path`. Raises UserError where it cannot be written."""
    temporary = path.with_name(f".partial-{secrets.token_hex(4)}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "r+b") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or first_line(error)}); nothing half written is left") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
