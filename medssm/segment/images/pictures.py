"""Pictures: PNG and JPEG by Pillow, TIFF by tifffile. Several pages of a TIFF are a volume.

A picture does not say where it lies. Its columns go to the left, its rows to the back and its pages up, as ITK has it. How large a pixel is stands
in NAME.json beside it, {"spacing": [z, y, x]} in millimetres, as nnU-Net has it; without that file a pixel counts as 1 mm, which is said.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from medssm.errors import UserError
from medssm.files import atomic, read_json
from medssm.segment.images import itk
from medssm.segment.images.image import LPS, MADE_BY, NO_SIZE, PICTURES, Image, needed, reason
from medssm.segment.images.quiet import quiet_libraries

TIFF = (".tif", ".tiff")
LOSSY = (".jpg", ".jpeg")
ENDINGS = (".png", *LOSSY, *TIFF)
_MODES = {"1": 1, "L": 1, "I;16": 1, "I": 1, "LA": 1, "RGB": 3, "RGBA": 3}  # Pillow's, with the channels that are not alpha


def open_file(path: Path) -> Image:
    """The picture at `path`. Raises UserError if it is none, has colours that are no channels, or several times or places."""
    with quiet_libraries():
        try:
            return _open_tiff(path) if path.suffix.lower() in TIFF else _open_picture(path)
        except UserError:
            raise
        except Exception as error:  # the libraries raise what their parsers raise: SyntaxError, struct.error, DecompressionBombError, ...
            raise UserError(f"{path}: not a readable picture ({reason(error)})") from error


def write(path: Path, data: np.ndarray, like: Image, classes: Mapping[str, int]) -> None:
    """Write a label map (x, y, z) as a picture of grey values, 8 bit where they fit, else 16 bit.

    Raises UserError if they do not, or the file cannot be written; nothing half written is left.
    """
    if data.min() < 0 or data.max() > 65535:
        raise UserError(f"{path}: expected labels from 0 to 65535, got {data.min()} to {data.max()}: name a file that ends in .nii.gz")
    pages = np.ascontiguousarray(data.T.astype(np.uint8 if data.max() < 256 else np.uint16))
    with atomic(path) as temporary:
        if path.suffix.lower() in TIFF:
            pages = pages[0] if len(pages) == 1 else pages
            needed("tifffile", path, "TIFF").imwrite(temporary, pages, photometric="minisblack", compression="zlib", software=MADE_BY)
        else:
            pillow = needed("PIL.Image", path, "PNG")
            text = needed("PIL.PngImagePlugin", path, "PNG").PngInfo()
            text.add_text("Software", MADE_BY)
            pillow.fromarray(pages[0]).save(temporary, format="PNG", pnginfo=text)


def beside(path: Path) -> list[Path]:
    """The JSON files that may say how large a pixel is."""
    return [file for file in _tables(path) if file.is_file()]


def check_output(path: Path, like: Image) -> None:
    """UserError for JPEG, for a geometry that a picture has no place for, and for the slices of a volume in PNG."""
    if path.suffix.lower() in LOSSY:
        raise UserError(f"{path}: JPEG changes values, so it cannot hold labels: name a file that ends in .png")
    if like.format not in PICTURES:
        raise UserError(f"{path}: a picture cannot say where {like.path} lies: name a file that ends in .nii.gz")
    if path.suffix.lower() not in TIFF and like.shape[2] > 1:
        raise UserError(f"{path}: PNG holds one slice, {like.path} has {like.shape[2]}: name a file that ends in .tif")


def made_here(path: Path) -> bool:
    """Whether a file was written by `write`."""
    with contextlib.suppress(Exception), quiet_libraries():  # of the libraries, for whatever is no such file
        if path.suffix.lower() in TIFF:
            with needed("tifffile", path, "TIFF").TiffFile(path) as file:
                return str(file.pages[0].software).startswith("medssm ")
        with needed("PIL.Image", path, "PNG").open(path) as file:
            return str(file.info.get("Software")).startswith("medssm ")
    return False


def _open_picture(path: Path) -> Image:
    pillow, turn = needed("PIL.Image", path, "PNG and JPEG"), needed("PIL.ImageOps", path, "PNG and JPEG").exif_transpose
    with pillow.open(path, formats=("PNG", "JPEG")) as file:
        mode, name, (columns, rows) = file.mode, file.format, file.size
        if getattr(file, "n_frames", 1) > 1:
            raise UserError(f"{path}: expected one picture, got {file.n_frames}")
        turned = file.getexif().get(0x0112, 1)
        palette = mode in ("P", "PA")
        grey = palette and _is_grey(file)
    deep = _depth(path) == 16 and mode in ("RGB", "RGBA", "LA")  # Pillow would leave out half of the bits
    if deep and turned != 1:
        raise UserError(f"{path}: colours of 16 bit that are turned by EXIF are not read")
    if mode not in _MODES and not palette:
        raise UserError(f"{path}: expected grey values or red, green and blue, got colours of the kind {mode}")
    channels = 1 if grey else 3 if palette else _MODES[mode]
    if turned in (5, 6, 7, 8):
        columns, rows = rows, columns
    shape = (columns, rows, 1)
    alpha = mode in ("LA", "RGBA", "PA")

    def pixels(colours: bool) -> np.ndarray:
        with pillow.open(path) as file:
            whole = turn(file)
            if colours and palette:
                whole = whole.convert("L" if grey else "RGB")
            data = np.asarray(whole).reshape(rows, columns, -1)
        return np.ascontiguousarray(data[:, :, : channels if colours else 1].transpose(2, 1, 0)[..., None])

    def load(dtype: DTypeLike | None) -> np.ndarray:
        return itk.decode(path, shape, channels + alpha)[:channels] if deep else pixels(colours=True)

    def indices() -> np.ndarray:
        return pixels(colours=False) if palette else _one_channel(path, load(None))

    notes = ["the alpha channel is left out"] * alpha + ["turned as its EXIF says"] * (turned != 1)
    return _placed(path, name, shape, load, channels, indices, notes)


def _open_tiff(path: Path) -> Image:
    with needed("tifffile", path, "TIFF").TiffFile(path) as file:
        if len(file.series) != 1:
            raise UserError(f"{path}: expected pages of one kind, got {len(file.series)} kinds")
        series, page = file.series[0], file.pages[0]
        if page.tags.valueof(274, 1) != 1 or page.photometric not in (1, 2, 3):
            raise UserError(f"{path}: expected rows from the top, and black as 0, RGB or a palette, got {page.photometric.name}")
        sizes = {axis: size for axis, size in zip(series.axes, series.shape, strict=True) if size > 1 or axis in "YXS"}
        palette = page.colormap if page.photometric == 3 else None
    stacks = [axis for axis in sizes if axis not in "YXSC"]
    if not {"Y", "X"} <= sizes.keys() or len(stacks) > 1 or "T" in stacks or {"S", "C"} <= sizes.keys() or (palette is not None and len(sizes) > 2):
        raise UserError(f"{path}: expected rows and columns, and at most pages and channels, got the axes {series.axes} of {series.shape}")
    colour = next((axis for axis in "SC" if axis in sizes), None)
    kept = sizes.get(colour, 1) if colour else 1
    alpha = colour == "S" and kept in (2, 4)
    channels = 3 if palette is not None else kept - alpha
    stored = tuple(sizes.values())
    order = [axis for axis in (colour, "X", "Y", *stacks) if axis]
    shape = (sizes["X"], sizes["Y"], sizes[stacks[0]] if stacks else 1)

    def pixels() -> np.ndarray:
        try:
            with needed("tifffile", path, "TIFF").TiffFile(path) as file:
                data = file.series[0].asarray().reshape(stored)
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            return itk.decode(path, shape, kept)[: kept - alpha]
        data = data.transpose([list(sizes).index(axis) for axis in order]).reshape(kept, *shape)
        return np.ascontiguousarray(data[: kept - alpha])

    def load(dtype: DTypeLike | None) -> np.ndarray:
        return pixels() if palette is None else (palette[:, pixels()[0]] >> 8).astype(np.uint8)

    def indices() -> np.ndarray:
        return pixels() if palette is not None else _one_channel(path, pixels())

    return _placed(path, "TIFF", shape, load, channels, indices, ["the alpha channel is left out"] * alpha)


def _placed(
    path: Path,
    name: str,
    shape: tuple[int, int, int],
    load: Callable[[DTypeLike | None], np.ndarray],
    channels: int,
    indices: Callable[[], np.ndarray],
    notes: list[str],
) -> Image:
    spacing = _spacing(path)
    affine = LPS @ np.diag([*(spacing or (1.0, 1.0, 1.0)), 1.0])
    return Image(path, name, shape, affine, load, channels, indices, spacing is not None, (*notes, *([] if spacing else [NO_SIZE])))


def _spacing(path: Path) -> tuple[float, float, float] | None:
    """(x, y, z) in millimetres from the JSON file beside a picture, of the same name or of that without the channel's number."""
    for file in _tables(path):
        table: Any = read_json(file) if file.is_file() else None
        if isinstance(table, dict) and "spacing" in table:
            found = table["spacing"]
            if not isinstance(found, list) or len(found) not in (2, 3) or not all(isinstance(v, (int, float)) and 0 < v < math.inf for v in found):
                raise UserError(f"{file}: spacing: expected 2 or 3 lengths in millimetres, z y x, got {found!r}")
            x, y, z = (*map(float, reversed(found)), 1.0)[:3]
            return x, y, z
    return None


def _tables(path: Path) -> list[Path]:
    return [path.with_name(f"{stem}.json") for stem in dict.fromkeys((path.stem, re.sub(r"_\d{4}$", "", path.stem)))]


def _one_channel(path: Path, data: np.ndarray) -> np.ndarray:
    """A label map that was saved as red, green and blue of one value."""
    if len(data) == 3 and (data == data[:1]).all():
        return data[:1]
    if len(data) > 1:
        raise UserError(f"{path}: expected one label map, got {len(data)} channels: colours are no labels")
    return data


def _is_grey(file: Any) -> bool:
    """Whether all colours of a palette are grey."""
    colours = np.array(file.getpalette("RGB")).reshape(-1, 3)
    return bool((colours == colours[:, :1]).all())


def _depth(path: Path) -> int:
    """The bits of a PNG's sample; 8 for another file."""
    with open(path, "rb") as file:
        begin = file.read(25)
    return begin[24] if begin[:4] == b"\x89PNG" and len(begin) == 25 else 8
