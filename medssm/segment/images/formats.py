"""What a file is, by its first bytes: for a file that is not what its name says, or whose name says nothing."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from medssm.segment.images.image import needed

GZIP, ZSTANDARD, NIFTI, DICOM = "gzip", "zstandard", "NIfTI", "DICOM"
PACKED = (GZIP, ZSTANDARD)
_ELSEWHERE = {344: ((b"n+1\0", NIFTI), (b"ni1\0", "the header of a NIfTI pair (.hdr, .img)")), 4: ((b"n+2\0", NIFTI),), 128: ((b"DICM", DICOM),)}
_FIRST = (
    (b"\x1f\x8b", GZIP),
    (b"\x28\xb5\x2f\xfd", ZSTANDARD),
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
_LAYERS = 4  # of compression, at most


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
    while found[-1] in PACKED and len(found) < _LAYERS:
        try:
            data = _begin(path, data, found[-1])
        except Exception:  # damaged: zlib.error or zstandard's own
            break
        found.append(kind_of(data))
    return found


def unpacked(path: Path) -> bytes:
    """The content of a file, without as many layers of compression as it has. Raises OSError, EOFError or the library's error where it is damaged."""
    data = path.read_bytes()
    for _ in range(_LAYERS):
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        elif data[:4] == b"\x28\xb5\x2f\xfd":
            data = _zstandard(path).decompressobj().decompress(data)
    return data


def _begin(path: Path, data: bytes, packed: str | None) -> bytes:
    """The first bytes inside of the first bytes of a compressed file."""
    return zlib.decompressobj(wbits=31).decompress(data) if packed == GZIP else _zstandard(path).decompressobj().decompress(data)


def _zstandard(path: Path):
    return needed("zstandard", path, "zstandard").ZstdDecompressor()
