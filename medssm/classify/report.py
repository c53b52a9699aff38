"""The report of a classifier's training: one HTML page with its figures, confusion matrix, reliability plot, worst images, curves and settings."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image

from medssm.classify.figures import FIGURES, reliability
from medssm.classify.table import Sample
from medssm.files import write_text
from medssm.segment import pages
from medssm.segment.images import ras_grid, read_image

_PICTURES = 24
_SIZE = 150  # of a picture's longer edge in pixels
_TEMPLATE = Path(__file__).with_name("report.html")


def write(
    path: Path,
    result: Mapping[str, Any],
    chosen: Mapping[str, str],
    arguments: str,
    curves: Path,
    held_out: Sequence[Sample],
    raw: np.ndarray,
    calibrated: np.ndarray,
    nan: float | None,
) -> None:
    """Write the report.

    Args:
        path: the .html file
        result: what `train` returns
        chosen: what was found, fitted or chosen, {what: text}
        arguments: of `train`, as YAML
        curves: the PNG of the learning curves
        held_out: the held-out images
        raw: their probabilities (images, classes) at the temperature 1
        calibrated: those at the temperature of the other half
        nan: see `images.prepared`

    Raises:
        UserError: it cannot be written.
    """
    classes = result["classes"]
    labels = np.array([classes.index(sample.label) for sample in held_out], int)
    page = pages.page(
        _TEMPLATE,
        "medssm train",
        result=result,
        chosen=chosen,
        arguments=arguments,
        curves=pages.inline(curves.read_bytes()),
        names=FIGURES,
        reliability=_reliability(labels, {"at temperature 1": raw, "after temperature": calibrated}) if held_out else "",
        worst=_worst(held_out, labels, calibrated, classes, nan) if held_out else [],
    )
    write_text(path, page)


def _worst(
    held_out: Sequence[Sample], labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str], nan: float | None
) -> list[dict[str, Any]]:
    """The images whose own class got the smallest probability, with what was found and a picture."""
    own = probabilities[np.arange(len(labels)), labels]
    rows = []
    for i in np.argsort(own, kind="stable")[:_PICTURES]:
        sample, found = held_out[i], int(probabilities[i].argmax())
        rows.append(
            {
                "name": sample.name,
                "group": sample.group,
                "label": sample.label,
                "own": float(own[i]),
                "found": classes[found],
                "probability": float(probabilities[i, found]),
                "right": found == labels[i],
                "picture": picture(sample.path, nan),
            }
        )
    return rows


def picture(path: Path, nan: float | None) -> str:
    """An image as the address of a picture: a plane in its colours, a volume as its three middle slices."""
    data, file = read_image([path], None, nan)
    turned = np.moveaxis(nib.apply_orientation(np.moveaxis(data, 0, -1), nib.io_orientation(file.affine)), -1, 0)
    low, high = np.percentile(turned.reshape(-1)[:: max(1, turned.size // 2**20)], (0.5, 99.5)).tolist()
    if len(turned) != 3 or min(turned.shape[1:]) > 1:
        return pages.slices(turned[0], [], ras_grid(file)[0], (low, high), _SIZE)
    across = max(axis for axis, size in enumerate(turned.shape[1:]) if size == 1)
    plane = np.clip((turned.squeeze(1 + across) - low) / max(high - low, 1e-12), 0, 1) * 255
    image = Image.fromarray(plane.astype(np.uint8).transpose(2, 1, 0)[::-1].copy())
    factor = _SIZE / max(image.size)
    buffer = io.BytesIO()
    image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))), Image.Resampling.BILINEAR).save(
        buffer, "JPEG", quality=85
    )
    return pages.inline(buffer.getvalue(), "jpeg")


def _reliability(labels: np.ndarray, tables: Mapping[str, np.ndarray]) -> str:
    """Accuracy by confidence, and how many images each confidence has, as the address of a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="#8a97a4", linewidth=1)
    for (name, probabilities), colour, marker in zip(tables.items(), ("tab:orange", "tab:blue"), "so", strict=True):
        rows = reliability(labels, probabilities)
        upper.plot([row["confidence"] for row in rows], [row["accuracy"] for row in rows], f"{marker}-", color=colour, label=name, markersize=5)
        lower.step([row["low"] for row in rows] + [rows[-1]["high"]], [row["n"] for row in rows] + [rows[-1]["n"]], where="post", color=colour)
    upper.set_ylabel("share that is right")
    upper.legend(loc="upper left")
    upper.grid(alpha=0.3)
    lower.set_yscale("log")
    lower.set_ylabel("images")
    lower.set_xlabel("confidence: the largest probability")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return pages.inline(buffer.getvalue())
