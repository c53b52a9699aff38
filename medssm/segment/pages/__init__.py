"""HTML pages, each one file that needs no other: the templates, and pictures of slices to put into them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")  # Okabe and Ito's, which colour-blind readers tell apart
CT_WINDOWS = {"soft tissue": (-160.0, 240.0), "lung": (-1350.0, 150.0), "bone": (-500.0, 1300.0), "brain": (0.0, 80.0)}  # black, white in HU
_WARM, _COLD = np.array([230.0, 40.0, 20.0]), np.array([30.0, 90.0, 240.0])  # of a heat of 1 and of -1
_HERE = Path(__file__).parent


def page(template: Path | str, generator: str, **values: Any) -> str:
    """A page's text: a template filled with `values`.

    Args:
        template: a file that extends base.html, or the name of one of this folder
        generator: the command that makes the page; `is_made_by` finds it there
        values: what the template names
    """
    template = _HERE / template
    environment = Environment(
        loader=FileSystemLoader([_HERE, template.parent]), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template.name).render(generator=generator, **values)


def is_made_by(generator: str, path: Path) -> bool:
    """Whether a file is a page that a command wrote."""
    try:
        with open(path, "rb") as file:
            return f'<meta name="generator" content="{generator}">'.encode() in file.read(4096)
    except OSError:
        return False


def inline(picture: bytes, kind: str = "png") -> str:
    """A picture as the address of an image in a page."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def slices(
    image: np.ndarray,
    labels: Sequence[np.ndarray],
    edges: np.ndarray,
    window: tuple[float, float],
    size: int,
    at: Sequence[int] | None = None,
    heat: np.ndarray | None = None,
) -> str:
    """Slices of a volume across its three axes, one beside the other, as the address of an image.

    Left is left: patients are seen from behind and from above. An axis of one voxel has the only slice that there is.

    Args:
        image: (x, y, z) along the RAS axes
        labels: label maps of the same shape; the first one is filled with colour, the outlines of the next one are white
        edges: of a voxel in millimetres
        window: the intensities shown as black and as white
        size: of a slice's longer edge in pixels
        at: a voxel that the slices go through (default: where the first label map has most)
        heat: a map of the same shape from -1 (blue) over 0 (the scan alone) to 1 (red); label maps are then outlines
    """
    at = richest(labels[0] if labels else np.zeros(image.shape, bool)) if at is None else at
    planar = [axis for axis in range(3) if image.shape[axis] == 1]
    views = [_slice(image, labels, edges, window, size, axis, at[axis], heat) for axis in (planar[:1] or (2, 1, 0))]
    strip = Image.new("RGB", (sum(view.width for view in views) + 2 * (len(views) - 1), max(view.height for view in views)))
    left = 0
    for view in views:
        strip.paste(view, (left, (strip.height - view.height) // 2))
        left += view.width + 2
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG", quality=85)
    return inline(buffer.getvalue(), "jpeg")


def richest(label: np.ndarray) -> tuple[int, ...]:
    """For each axis the slice that has most voxels of any class; the middle one where there are none."""
    inside = label > 0
    return tuple(
        int(np.argmax(counts)) if counts.any() else len(counts) // 2 for counts in (inside.sum(axis=tuple({0, 1, 2} - {axis})) for axis in range(3))
    )


def _slice(
    image: np.ndarray,
    labels: Sequence[np.ndarray],
    edges: np.ndarray,
    window: tuple[float, float],
    size: int,
    axis: int,
    index: int,
    heat: np.ndarray | None,
) -> Image.Image:
    cut, (low, high) = image.take(index, axis), window
    grey = np.clip((cut.astype(np.float32) - low) / max(high - low, 1e-12), 0, 1) * 255
    colour = np.repeat(grey[..., None], 3, axis=-1)
    drawn = [label.take(index, axis) for label in labels]
    if heat is not None:
        strength = np.clip(heat.take(index, axis), -1, 1)[..., None]
        colour += np.abs(strength) * (np.where(strength > 0, _WARM, _COLD) - colour)
    filled, outlined = (drawn[:1], drawn[1:2]) if heat is None else ([], drawn)
    for label in filled:
        for value in np.unique(label[label > 0]):
            rgb = [int(COLOURS[(int(value) - 1) % len(COLOURS)][i : i + 2], 16) for i in (1, 3, 5)]
            colour[label == value] = 0.5 * colour[label == value] + 0.5 * np.array(rgb)
    for label in outlined:
        colour[_outline(label)] = 255
    length = np.array(cut.shape) * np.delete(edges, axis)
    width, height = np.maximum(1, np.rint(size * length / length.max())).astype(int).tolist()
    return Image.fromarray(colour.astype(np.uint8).transpose(1, 0, 2)[::-1].copy()).resize((width, height), Image.Resampling.BILINEAR)


def _outline(label: np.ndarray) -> np.ndarray:
    """The voxels of a class beside voxels that are not of it."""
    found = np.zeros(label.shape, bool)
    for axis in range(2):
        differs = np.diff(label, axis=axis) != 0
        first = [slice(None)] * 2
        second = [slice(None)] * 2
        first[axis], second[axis] = slice(None, -1), slice(1, None)
        found[tuple(first)] |= differs
        found[tuple(second)] |= differs
    return found & (label > 0)
