"""The metadata of an ONNX file, read from its bytes: an engine opens a file only once it has the operators that the metadata say it needs.

An ONNX file is a protobuf message of the type ModelProto. Its fields with the number 14 are pairs of texts, {1: key, 2: value}.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from medssm_runtime.errors import UserError, first_line

_METADATA, _KEY, _VALUE = 14, 1, 2


def metadata(path: Path, key: str) -> str | None:
    """The text under `key`, or None. Raises UserError for a file that cannot be read or is no ONNX file."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for number, start, stop in _fields(data, 0, len(data)):
                if number == _METADATA:
                    pair = {one: data[a:b].decode() for one, a, b in _fields(data, start, stop) if one in (_KEY, _VALUE)}
                    if pair.get(_KEY) == key:
                        return pair.get(_VALUE)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, IndexError) as error:  # an empty file cannot be mapped
        raise UserError(f"{path}: not an ONNX file, or cut short ({first_line(error)})") from error
    return None


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, stop) of each field whose content is bytes; other fields are passed over."""
    while at < end:
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(data, at)
            continue
        size = {1: 8, 5: 4}.get(kind, 0)
        if kind == 2:
            size, at = _varint(data, at)
        elif not size:
            raise ValueError(f"unknown type {kind} of a field")
        if at + size > end:
            raise ValueError("a field ends behind the end of the file")
        if kind == 2:
            yield tag >> 3, at, at + size
        at += size


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """A number of variable length, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")
