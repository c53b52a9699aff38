"""Files written whole or not at all, and JSON: every command that writes does it through this module."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from medssm.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path`. When the block ends well, that file replaces `path`; when it fails, nothing is left of it.

    Two processes may write the same `path` at once: each has a temporary file of its own, and the last one wins. An error of the file system
    (a full disk, no permission) is a UserError.
    """
    path = Path(path)
    temporary = path.with_name(f".partial-{secrets.token_hex(4)}-{path.name}")  # same ending: nibabel and matplotlib choose the format by it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "r+b") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def protect(
    path: Path, *, reads: Iterable[Path] = (), made: Callable[[Path], bool] = lambda path: False, overwrite: bool = False, argument: str = "out"
) -> None:
    """Raise UserError where writing `path` would lose a file: one that the same call reads, or one that is there and is not of medssm's making.

    Also where no file can be made at `path`, so that nothing is computed that could not be kept.

    Args:
        path: what is to be written
        reads: what the call reads; no option allows to write over it
        made: whether a file that is there is one that this command wrote
        overwrite: the user allows to write over any other file
        argument: that gave the path, for the message
    """
    _check_place(path)
    try:
        there = os.stat(path)
    except OSError:
        return
    for file in reads:
        with contextlib.suppress(OSError):
            if os.path.samestat(there, os.stat(file)):
                raise UserError(f"{argument}: {path} is a file that is read; name another one")
    if not overwrite and not made(path):
        raise UserError(f"{argument}: {path} is there already, and this command did not write it: name another one, or pass --overwrite")


def _check_place(path: Path) -> None:
    """UserError if the folder of `path`, or the nearest above it that is there, takes no file."""
    folder = next(above for above in path.absolute().parents if os.path.lexists(above))
    code = None if os.access(folder, os.W_OK | os.X_OK) else errno.EACCES
    if not folder.is_dir():
        code = errno.ENOTDIR
    if code:
        raise disk_error(path, OSError(code, os.strerror(code)))


def begins_with(path: Path, text: str) -> bool:
    """Whether a file can be read and begins with a text, such as the heading that one of the commands writes."""
    try:
        with open(path, "rb") as file:
            wanted = text.encode()
            return file.read(len(wanted)) == wanted
    except OSError:
        return False


def write_bytes(path: Path | str, data: bytes) -> None:
    """`data` as the whole of the file `path`. Raises UserError when it cannot be written; an old file then stays as it was."""
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path | str, text: str) -> None:
    """`text` in UTF-8 as the whole of the file `path`. Raises UserError when it cannot be written."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: Any) -> None:
    """`value` as JSON. Raises ValueError for a number that is not finite (JSON has none), UserError when the file cannot be written."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """The value of a JSON file. Raises UserError when it cannot be read or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({first_line(error)})") from error


def read_json_lines(path: Path | str) -> list[Any]:
    """The values of a file with one JSON value in each line. Raises UserError when it cannot be read or a line is not JSON."""
    try:
        return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON lines ({first_line(error)})") from error


def write_at(path: Path, start: int, data: bytes) -> int:
    """Replace all that a file holds from the byte `start` on by `data`. Returns the file's new size.

    Raises UserError when that fails; the file then ends at `start`.
    """
    try:
        with open(path, "r+b" if path.exists() else "wb", buffering=0) as file:  # unbuffered: closing must not try to write again
            file.truncate(start)
            file.seek(start)
            try:
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(start)
                raise
    except OSError as error:
        raise disk_error(path, error) from error
    return start + len(data)


def make_folder(path: Path) -> None:
    """Make a folder and those above it. Raises UserError when it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(path, error) from error


def disk_error(path: Path, error: OSError) -> UserError:
    """The one line that says why `path` could not be written."""
    if error.errno in _FULL:
        return UserError(f"{path}: the disk is full ({error.strerror}); nothing half written is left")
    return UserError(f"{path}: cannot be written ({error.strerror or first_line(error)})")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type when it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
