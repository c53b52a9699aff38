"""The page and the JSON file of `medssm evaluate --uncertainty`."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from matplotlib.figure import Figure

from medssm.errors import UserError
from medssm.files import protect, read_json, write_json, write_text
from medssm.segment import pages
from medssm.segment.images import aligned, open_image, ras_grid
from medssm.segment.intensity import looks_like_ct
from medssm.segment.uncertainty.sums import ENTROPY
from medssm.segment.uncertainty.worth import Classes, Pair

PAGE, RESULT = "uncertainty.html", "uncertainty.json"
_GENERATOR = "medssm evaluate --uncertainty"
_PICTURES = 12  # of the worst cases
_PIXELS = 150  # of a slice's longer edge
_CLASSES, _BESIDE = 12, 3  # of a figure, and in a row of it; the tables have all
_NAMES = {"entropy": "entropy", "mutual-information": "mutual information", "boundary": "nearness to the surface of the prediction"}


def check(folder: Path, reads: Sequence[Path], overwrite: bool) -> None:
    """UserError where writing the page would lose a file of other origin."""
    protect(folder / PAGE, reads=reads, made=lambda path: pages.is_made_by(_GENERATOR, path), overwrite=overwrite, argument="uncertainty")
    protect(folder / RESULT, reads=reads, made=_is_result, overwrite=overwrite, argument="uncertainty")


def write(
    folder: Path,
    result: Mapping[str, Any],
    pairs: Mapping[str, tuple[Path, Path]],
    dice: Mapping[str, float | None],
    classes: Classes | None,
    ignore: int | None,
    scans: Mapping[str, Path],
) -> None:
    """Write the page and the result.

    Args:
        folder: for both
        result: what `worth.assess` gave
        pairs: {case: (prediction, reference)}
        dice: each case's mean Dice, None where it has no class
        classes: {class or region: its values}
        ignore: value in the references whose voxels count for nothing
        scans: {case: its scan}, for the pictures

    Raises:
        UserError: a file cannot be written.
    """
    worst = sorted(result["cases"], key=lambda name: 2.0 if (value := dice.get(name)) is None else value)
    rows = [{"name": name, "dice": dice.get(name), **result["cases"][name]} for name in worst]
    shown = [(name, _pictures(Pair.read(*pairs[name], ignore), classes, scans.get(name))) for name in worst[:_PICTURES]]
    page = pages.page(
        "uncertainty.html",
        _GENERATOR,
        result=result,
        rows=rows,
        kinds=_NAMES,
        shown=shown,
        without_scan=[name for name, _ in shown if name not in scans],
        ranges={"members": "range of the members", "conformal": "conformal bounds"},
        curves=_drawn(_curves, result),
        reliability=_drawn(_reliability, result) if result["reliability"] else None,
        volumes=_drawn(_volumes, result) if result["volumes"] else None,
    )
    write_text(folder / PAGE, page)
    write_json(folder / RESULT, result)


def _is_result(file: Path) -> bool:
    try:
        table = read_json(file)
    except UserError:
        return False
    return isinstance(table, dict) and {"cases", "kinds", "not_measured"} <= table.keys()


def _pictures(pair: Pair, classes: Classes | None, scan: Path | None) -> tuple[str, str]:
    """Slices where most voxels are wrong: the scan with prediction and reference, and the entropy with the wrong voxels."""
    wrong = pair.wrong(classes or {str(value): (value,) for value in np.union1d(pair.found, pair.truth).tolist()})
    grey = np.zeros(pair.found.shape, np.float32) if scan is None else aligned(open_image(scan), pair.image).voxels(np.float32)[0]
    low, high = np.percentile(grey.reshape(-1)[:: max(1, grey.size // 2**20)], (0.5, 99.5)).tolist()
    if looks_like_ct(torch.from_numpy(grey)):
        low, high = pages.CT_WINDOWS["soft tissue"]
    turn, arrays = nib.io_orientation(pair.image.affine), (grey, pair.found, np.where(pair.counted, pair.truth, 0), wrong, pair.beside(ENTROPY)[0])
    grey, found, truth, errors, entropy = (nib.orientations.apply_orientation(array, turn) for array in arrays)
    edges, at = ras_grid(pair.image)[0], pages.richest(errors if errors.any() else truth)
    return (
        pages.slices(grey, [found, truth], edges, (low, high), _PIXELS, at=at),
        pages.slices(entropy, [errors.astype(np.uint8)], edges, (0.0, float(entropy.max()) or 1.0), _PIXELS, at=at),
    )


def _drawn(draw: Callable[[Figure, Mapping[str, Any]], None], result: Mapping[str, Any]) -> str:
    """What `draw` draws, as the address of an image."""
    figure, buffer = Figure(figsize=(9, 3.6), dpi=110, layout="constrained"), io.BytesIO()
    draw(figure, result)
    figure.savefig(buffer, format="png")
    return pages.inline(buffer.getvalue())


def _curves(figure: Figure, result: Mapping[str, Any]) -> None:
    """Of the voxels of all cases: the wrong ones that are found by checking, and those left among what is kept."""
    found, kept = figure.subplots(1, 2)
    for (kind, name), style in zip(_NAMES.items(), ("-", "--", ":"), strict=True):
        curve = result["kinds"][kind]["curve"]
        if curve["found"][0] is None:
            continue
        found.plot([100 * (1 - share) for share in curve["kept"]], [100 * share for share in curve["found"]], style, label=name)
        kept.plot([100 * share for share in curve["kept"]], [100 * share for share in curve["wrong"]], style, label=name)
    found.set(xlim=(0, 10), ylim=(0, 100), xlabel="% of the voxels checked, the most uncertain ones", ylabel="% of the wrong voxels among them")
    found.axhline(50, color="grey", linewidth=0.5)
    kept.set(xlim=(0, 100), ylim=(0, None), xlabel="% of the voxels kept, the least uncertain ones", ylabel="% of them wrong")
    found.legend(loc="lower right", fontsize="small")


def _reliability(figure: Figure, result: Mapping[str, Any]) -> None:
    """The share of voxels that are of a class, for each probability that they are given."""
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.5)
    for name, row in list(result["reliability"].items())[:_CLASSES]:
        axes.plot([part["probability"] for part in row["bins"]], [part["share"] for part in row["bins"]], "o-", label=name, markersize=3)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability of the class", ylabel="share that is of the class")
    axes.legend(fontsize="small")


def _volumes(figure: Figure, result: Mapping[str, Any]) -> None:
    """For each class the references against the volumes found, with their conformal bounds, or else the members' range."""
    shown = list(result["volumes"].items())[:_CLASSES]
    columns, rows_of_axes = min(_BESIDE, len(shown)), math.ceil(len(shown) / _BESIDE)
    figure.set_size_inches(9, 3.6 * rows_of_axes)
    for i, (name, table) in enumerate(shown, 1):
        axes = figure.add_subplot(rows_of_axes, columns, i)
        kind = "conformal" if "conformal" in table else "members"
        rows = [row for row in table["cases"].values() if f"{kind}_low_ml" in row]
        for row in rows:
            low, high = row[f"{kind}_low_ml"], row[f"{kind}_high_ml"]
            inside = low <= row["reference_ml"] <= high
            axes.plot([row["reference_ml"]] * 2, [low, high], color="tab:blue" if inside else "tab:red", linewidth=1)
            axes.plot(row["reference_ml"], row["ml"], ".", color="black", markersize=3)
        ends = [min(row["reference_ml"] for row in rows), max(row["reference_ml"] for row in rows)]
        axes.plot(ends, ends, color="grey", linewidth=0.5)
        axes.set(title=f"{name}, {'conformal bounds' if kind == 'conformal' else 'range of the members'}", xlabel="reference, ml", ylabel="found, ml")
