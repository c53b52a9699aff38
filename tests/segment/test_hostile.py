"""Damaged and invented files of every format: read as an image, or refused in one line. No other exception, no file changed, nothing half written."""

import collections
import gzip
import hashlib
import io
import struct
import zlib

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from medssm import cli
from medssm.errors import UserError
from medssm.segment.cases import cases_in
from medssm.segment.images import open_image, read_image, read_label, write_image
from medssm.segment.train import train
from tests.segment.dicom import series, slice_of, study
from tests.segment.synthetic import UNET, nnunet_folder

VOLUME = np.random.default_rng(0).integers(0, 9, (6, 5, 4)).astype(np.int16)
MANY = settings(max_examples=200, suppress_health_check=[*HealthCheck], deadline=None)  # quick ones; the profile says how many elsewhere


def valid(folder) -> dict[str, bytes]:
    """A good file of each format, small enough that most of it is header."""
    nifti = nib.Nifti1Image(VOLUME, np.diag([1, 2, 3, 1.0])).to_bytes()
    files = {"nii": nifti, "nii.gz": gzip.compress(nifti, mtime=0), "nii.zst": zstandard.compress(nifti)}
    for name in ("a.nrrd", "a.mha"):
        sitk.WriteImage(sitk.GetImageFromArray(VOLUME.T), str(folder / name))
        files[name[2:]] = (folder / name).read_bytes()
    colours = np.random.default_rng(1).integers(0, 9, (6, 5, 3)).astype(np.uint8)
    for kind, data in (("PNG", colours), ("JPEG", colours), ("PNG", colours[..., 0].astype(np.uint16))):
        stream = io.BytesIO()
        Pillow.fromarray(data).save(stream, format=kind)
        files[{"PNG": "png", "JPEG": "jpg"}[kind] if data is colours else "PNG"] = stream.getvalue()
    stream = io.BytesIO()
    tifffile.imwrite(stream, VOLUME.T, photometric="minisblack")
    files["tif"] = stream.getvalue()
    slice_of(VOLUME[..., 0], 0, study()).save_as(folder / "a.dcm", enforce_file_format=True)
    files["dcm"] = (folder / "a.dcm").read_bytes()
    write_image(folder / "seg.dcm", (VOLUME > 4).astype(np.uint8), open_image(series(folder / "ct", VOLUME.T)), {"background": 0, "ball": 1})
    files["DCM"] = (folder / "seg.dcm").read_bytes()
    return files


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    return valid(tmp_path_factory.mktemp("seeds"))


def check(path) -> bool:
    """Read a file as image and as label map; whether it is one. Every refusal is one line that names the file."""
    before, read = hashlib.sha256(path.read_bytes()).digest(), False
    for attempt in (
        lambda: open_image(path),
        lambda: collections.deque(open_image(path).pieces(10), maxlen=0),
        lambda: read_image([path], nan=0.0),
        lambda: read_label(path),
        lambda: cases_in(path, 2),
    ):
        try:
            attempt()
            read = True
        except UserError as error:
            text = str(error)
            assert "\n" not in text and text.startswith(f"{path}: ") and len(text) < 500, text
    assert hashlib.sha256(path.read_bytes()).digest() == before and [file.name for file in path.parent.iterdir()] == [path.name]
    return read


def write(tmp_path_factory, name, content):
    path = tmp_path_factory.mktemp("hostile") / name
    path.write_bytes(content)
    return path


@given(st.data())
@MANY
def test_a_damaged_file_of_any_format(seeds, tmp_path_factory, data):
    """Bytes of the header changed, cut out or put in; or the end missing."""
    ending = data.draw(st.sampled_from(sorted(seeds)))
    content = bytearray(seeds[ending])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(content), 700)))
        new = data.draw(st.binary(max_size=4) | st.sampled_from([b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"9" * 6, b"-1", b"nan"]))
        content[at : at + data.draw(st.sampled_from([len(new), len(new), 0, 8]))] = new
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    check(write(tmp_path_factory, f"a.{ending}", bytes(content)))


NUMBERS = st.sampled_from([0, -1, 1, 2, 3, 5, 7, 32767, -32768, 1000])
FLOATS = st.sampled_from([0.0, -1.0, 1.0, 1e-30, 1e30, float("nan"), float("inf"), 0.5])


@given(
    st.lists(NUMBERS, min_size=8, max_size=8),
    st.lists(FLOATS, min_size=8, max_size=8),
    st.sampled_from([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304, 9999]),
    st.lists(FLOATS, min_size=12, max_size=12),
    st.tuples(FLOATS, FLOATS, FLOATS),
    st.tuples(NUMBERS, NUMBERS, st.integers(0, 255)),
)
@MANY
def test_an_invented_nifti_header(tmp_path_factory, dim, pixdim, datatype, rows, scale, codes):
    header = bytearray(nib.Nifti1Image(VOLUME, np.eye(4)).to_bytes())
    struct.pack_into("<8h", header, 40, *dim)
    struct.pack_into("<h", header, 70, datatype)
    struct.pack_into("<8f", header, 76, *pixdim)
    struct.pack_into("<3f", header, 108, scale[0] * 352, *scale[1:])
    struct.pack_into("<B", header, 123, codes[2])
    struct.pack_into("<2h", header, 252, *codes[:2])
    struct.pack_into("<12f", header, 280, *rows)
    check(write(tmp_path_factory, "a.nii", bytes(header)))


@given(
    st.tuples(st.integers(0, 9), st.integers(0, 9)) | st.just((2**31 - 1, 2**31 - 1)) | st.just((70000, 70000)),
    st.sampled_from([1, 2, 4, 8, 16, 3]),
    st.sampled_from([0, 2, 3, 4, 6, 7]),
    st.binary(max_size=200),
    st.booleans(),
)
@MANY
def test_an_invented_png(tmp_path_factory, size, depth, kind, pixels, palette):
    """Chunks with right checksums, and what they say drawn: sizes, bits and colours that no writer makes, and pixels that do not fit them."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0))
    content += chunk(b"PLTE", bytes(range(12))) * palette + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    check(write(tmp_path_factory, "a.png", content))


@given(
    st.sampled_from(["NRRD0004", "NRRD0005", "NRRD9999", "NRRD"]),
    st.sampled_from(["short", "float", "block", "int128", "unsigned char"]),
    st.sampled_from(["1", "2", "3", "4", "-1", "99", "x"]),
    st.lists(st.sampled_from(["0", "1", "2", "5", "-3", "99999999", "1e9", "x"]), max_size=5),
    st.sampled_from(["raw", "gzip", "ascii", "hex", "magic"]),
    st.sampled_from(["", "space: left-posterior-superior\n", "space: 3D-right-handed\n", "space: nowhere\n", "spacings: 0 nan 1\n"]),
    st.sampled_from(["", "space directions: (0,0,0) (0,1,0) (0,0,1)\n", "space directions: none (1,0,0) (0,1,0)\n", "data file: /dev/null\n"]),
    st.binary(max_size=300),
)
@MANY
def test_an_invented_nrrd(tmp_path_factory, magic, kind, dimension, sizes, encoding, space, directions, pixels):
    header = f"{magic}\ntype: {kind}\ndimension: {dimension}\n{space}sizes: {' '.join(sizes)}\n{directions}endian: little\nencoding: {encoding}\n\n"
    check(write(tmp_path_factory, "a.nrrd", header.encode() + pixels))


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    out = tmp_path_factory.mktemp("network")
    options = {"model": "monai.networks.nets.UNet", "model_kwargs": UNET, "patch": (16, 16, 16), "max_steps": 1, "device": "cpu", "quiet": True}
    train(nnunet_folder(out / "data", cases=1, shape=(16, 16, 16)), out / "run", **options)
    return out / "run"


@given(st.data())
@settings(suppress_health_check=[*HealthCheck], deadline=None)
def test_predict_of_a_damaged_file_writes_all_or_nothing(seeds, network, tmp_path_factory, data):
    ending = data.draw(st.sampled_from(sorted(set(seeds) - {"jpg", "DCM"})))
    content = bytearray(seeds[ending])
    at = data.draw(st.integers(0, 400))
    content[at : at + 2] = data.draw(st.binary(min_size=2, max_size=2))
    path = write(tmp_path_factory, f"a.{ending}", bytes(content))
    status = cli.main(["predict", str(network), str(path), str(path.parent / "out"), "--device", "cpu", "--quiet"])
    assert path.read_bytes() == bytes(content)
    written = [file for file in (path.parent / "out").rglob("*") if file.is_file()]
    assert status in (0, 2) and (status == 0) == (len(written) == 2)  # the label map and the volumes
    if status == 0:
        read_label(next(file for file in written if file.name != "volumes.csv"), open_image(path))
