"""What a file is, by its first bytes: for the line about a file that is not what its name says."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

GZIP, NIFTI = "gzip", "NIfTI"
_ELSEWHERE = {344: ((b"n+1\0", NIFTI), (b"ni1\0", "the header of a NIfTI pair (.hdr, .img)")), 4: ((b"n+2\0", NIFTI),), 128: ((b"DICM", "DICOM"),)}
_FIRST = (
    (b"\x1f\x8b", GZIP),
    (b"\x28\xb5\x2f\xfd", "zstandard"),
    (b"PK\x03\x04", "zip"),
    (b"NRRD", "NRRD"),
    (b"ObjectType", "MetaImage"),
    (b"\x89PNG", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\x89HDF", "HDF5"),
    (b"\x93NUMPY", "NumPy"),
    (b"BM", "BMP"),
    (b"<", "XML or HTML"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself"),
)


def kind_of(data: bytes) -> str | None:
    """The format of a file that begins with `data`, 400 bytes or more where it has them; None for an unknown one."""
    for at, marks in _ELSEWHERE.items():
        for mark, name in marks:
            if data[at : at + len(mark)] == mark:
                return name
    return next((name for mark, name in _FIRST if data.startswith(mark)), None)


def layers(path: Path) -> list[str | None]:
    """The formats of a file from the outside in: ["gzip", "NIfTI"] of a .nii.gz. Raises OSError where it cannot be read."""
    with open(path, "rb") as file:
        data = file.read(4096)
    found = [kind_of(data)]
    while found[-1] == GZIP and len(found) < 4:
        try:
            data = zlib.decompressobj(wbits=31).decompress(data)
        except zlib.error:
            break
        found.append(kind_of(data))
    return found


def unpacked(path: Path) -> bytes:
    """The content of a file, without as many layers of gzip as it has. Raises OSError or EOFError where it is damaged."""
    data = path.read_bytes()
    while data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    return data
