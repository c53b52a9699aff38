"""The page of a case: the scan under each map, what the scans see, and whether the maps say anything."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from medssm.segment import pages
from medssm.segment.images import strip_ending
from medssm.segment.resample import Grid

GENERATOR = "medssm predict --explain"
_PIXELS = 330  # of a slice's longer edge
_STRONGEST = 99.5  # percentile of a map's sizes, where they are not 0, that has the full colour
_OPAQUE = 0.75  # of the full colour


def beside(target: Path) -> Path:
    """The page of the label map `target`."""
    return target.with_name(f"{strip_ending(target)}_explained.html")


def is_made_here(path: Path) -> bool:
    """Whether a file is such a page."""
    return pages.is_made_by(GENERATOR, path)


class View:
    """Pictures of an image (x, y, z) along the RAS axes, with the outline of a class, its `label`. pictures: {name: address}."""

    def __init__(self, image: np.ndarray, label: np.ndarray, grid: Grid) -> None:
        self.image, self.label, self.grid = image, label, grid
        self.edges = np.linalg.norm(grid.affine[:3, :3], axis=0)
        low, high = np.percentile(image.reshape(-1)[:: max(1, image.size // 2**20)], (0.5, 99.5)).tolist()
        self.window = (low, max(high, low + 1e-6))
        self.pictures: dict[str, str] = {}

    def add(self, name: str, values: np.ndarray, point: np.ndarray | None = None) -> None:
        """Add a picture of a map; `point` in millimetres is where its slices cross, by default where the class has most voxels."""
        sizes = np.abs(values[values != 0])
        strongest = float(np.percentile(sizes[:: max(1, sizes.size // 2**20)], _STRONGEST)) if sizes.size else 1.0
        at = pages.richest(self.label) if point is None else self._voxel(point)
        heat = _OPAQUE * np.clip(values / strongest, -1, 1)
        self.pictures[name] = pages.slices(self.image, [self.label], self.edges, self.window, _PIXELS, at, heat)

    def _voxel(self, point: np.ndarray) -> tuple[int, ...]:
        nearest = np.rint(np.linalg.solve(self.grid.affine, np.array([*point, 1.0]))[:3]).astype(int)
        return tuple(np.clip(nearest, 0, np.array(self.grid.shape) - 1).tolist())


def text(name: str, result: Mapping[str, Any], view: View, curves: Mapping[str, Mapping[str, Sequence[tuple[Tensor, Tensor]]]]) -> str:
    """The page.

    Args:
        name: of the case
        result: its figures
        view: with a picture of each map
        curves: {layer: what `reach.curves` gives}
    """
    return pages.page(
        "explain.html",
        GENERATOR,
        name=name,
        result=result,
        pictures=view.pictures,
        seen=pages.inline(_reach(curves)) if curves else None,
        fall=pages.inline(_fall(result["sanity"]["deletion"])),
    )


def _reach(curves: Mapping[str, Mapping[str, Sequence[tuple[Tensor, Tensor]]]]) -> bytes:
    """The share of the influence within a distance: for each layer the range over its orders and their mean."""
    from matplotlib.figure import Figure

    units = [unit for unit in ("mm", "steps") if any(layer[unit] for layer in curves.values())]
    figure = Figure(figsize=(4.6 * len(units), 3.4), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(units), squeeze=False)[0]
    for axes, unit in zip(panels, units, strict=True):
        for i, (name, layer) in enumerate(curves.items()):
            if not layer[unit]:
                continue
            grid = np.unique(np.concatenate([far.numpy() for far, _ in layer[unit]]))
            shares = np.stack([np.interp(grid, far.numpy(), share.numpy(), left=0) for far, share in layer[unit]])
            colour = pages.COLOURS[i % len(pages.COLOURS)]
            axes.plot(grid, shares.mean(0), color=colour, label=name)
            axes.fill_between(grid, shares.min(0), shares.max(0), color=colour, alpha=0.15, linewidth=0)
        axes.set_xlabel("mm from the target" if unit == "mm" else "steps of the walk from the target")
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
    if units[-1] == "steps":
        panels[-1].set_xscale("symlog", linthresh=1)
    panels[0].set_ylabel("share of the influence within")
    panels[0].legend(fontsize=7)
    return _png(figure)


def _fall(falls: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The class's probability while voxels are removed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for colour, (name, fall) in zip(pages.COLOURS, falls.items(), strict=False):
        axes.plot(np.array(fall["parts"]) * 100, fall["first"], "o-", markersize=3, color=colour, label=f"most attributed first: {name}")
        if "random" in fall and fall is next(iter(falls.values())):
            axes.plot(np.array(fall["parts"]) * 100, fall["random"], "k--", label="in random order")
    axes.set_xlabel("% of the window removed")
    axes.set_ylabel("probability of the class")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return _png(figure)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
