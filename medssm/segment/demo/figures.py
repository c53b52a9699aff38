"""The demo's pictures: labels on the brain, the split, Dice by class and the learning curves, as PNG files."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from medssm.files import atomic, read_json_lines
from medssm.segment.demo.data import Brain, whole
from medssm.segment.pages import COLOURS

MARKERS = ("o", "s", "^", "D", "v", "P", "x")
NETWORKS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")  # of curves and marks; the first is ours
_INK, _DARK = "#1c2733", "#0b0f14"
_MARGIN_MM = 16
_VIEWS = {"axial": 2, "coronal": 1, "sagittal": 0}  # by the RAS axis that the slice is cut across
_LETTERS = {"axial": "LRPA", "coronal": "LRIS", "sagittal": "PAIS"}  # at the left, right, bottom and top of a slice


def draw_overlays(brain: Brain, drawn: np.ndarray, found: Mapping[str, np.ndarray], path: Path) -> None:
    """The tested side in three views: a row for the drawn structures, then a row for each of `found`, with the outlines of the drawn ones.

    Args:
        brain: the volume
        drawn: the tested half's label map
        found: {title: label map of the tested half}
        path: the PNG file to write
    """
    image, truth = _ras(brain, brain.voxels), _ras(brain, whole(brain, drawn, brain.tested))
    rows = {"drawn": truth, **{title: _ras(brain, whole(brain, labels, brain.tested)) for title, labels in found.items()}}
    edges = _edges(brain)
    window = _window(truth, edges)
    figure, grid = _panels(window, _VIEWS, edges, rows=len(rows), height=2.8, left=0.5)
    for panels, (title, labels) in zip(grid, rows.items(), strict=True):
        for axes, (view, axis) in zip(panels, _VIEWS.items(), strict=True):
            cut = _cut(window, axis, _richest_slice(truth, axis))
            _draw_slice(axes, image[cut], labels[cut], _aspect(edges, axis), _white(image), None if labels is truth else truth[cut])
            if labels is truth:
                axes.set_title(view, color="white", fontsize=11, pad=6)
                _letter(axes, view)
        panels[0].set_ylabel(title, color="white", fontsize=10, labelpad=6)
    _legend(figure, brain)
    _save(figure, path)


def draw_found(brain: Brain, labels: np.ndarray, path: Path) -> None:
    """`labels`, what a network found on the tested half, in three views of the brain, and nothing of what was drawn."""
    image, labels = _ras(brain, brain.voxels), _ras(brain, whole(brain, labels, brain.tested))
    edges = _edges(brain)
    window = _window(labels if labels.any() else image, edges)
    figure, grid = _panels(window, _VIEWS, edges, rows=1, height=3.4)
    for axes, (view, axis) in zip(grid[0], _VIEWS.items(), strict=True):
        cut = _cut(window, axis, _richest_slice(labels, axis))
        _draw_slice(axes, image[cut], labels[cut], _aspect(edges, axis), _white(image))
        axes.set_title(view, color="white", fontsize=11, pad=6)
        _letter(axes, view)
    _legend(figure, brain)
    _save(figure, path)


def draw_split(brain: Brain, labels: np.ndarray, path: Path) -> None:
    """The whole brain: the structures trained on, the gap, and `labels`, what the network found on the tested side."""
    both = whole(brain, labels, brain.tested)
    both[brain.trained.box] = brain.labels[brain.trained.box]
    image, both, truth = _ras(brain, brain.voxels), _ras(brain, both), _ras(brain, brain.labels)
    edges = _edges(brain)
    left, right = sorted((_ras_box(brain, half.box) for half in (brain.trained, brain.tested)), key=lambda box: box[0].start)
    window = tuple(slice(max(0, min(a.start, b.start) - 4), max(a.stop, b.stop) + 4) for a, b in zip(left, right, strict=True))
    views = {view: axis for view, axis in _VIEWS.items() if axis != 0}
    figure, grid = _panels(window, views, edges, rows=1, height=4.6)
    what = {brain.trained.side: "trained, labels drawn", brain.tested.side: "tested, labels found"}
    for axes, (view, axis) in zip(grid[0], views.items(), strict=True):
        cut = _cut(window, axis, _richest_slice(truth, axis))
        _draw_slice(axes, image[cut], both[cut], _aspect(edges, axis), _white(image))
        axes.axvspan(left[0].stop - window[0].start - 0.5, right[0].start - window[0].start - 0.5, color="white", alpha=0.35, lw=0)
        for box, side in ((left, "left"), (right, "right")):
            middle = (box[0].start + box[0].stop) / 2 - window[0].start
            axes.text(middle, 1.015, f"{side}: {what[side]}", color="white", fontsize=9, ha="center", transform=axes.get_xaxis_transform())
        _letter(axes, view)
    _legend(figure, brain)
    _save(figure, path)


def draw_dice(dice: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """{row: {class: Dice}} as one line of marks for each class, the mean among them; the last two rows are no networks, in grey."""
    classes = list(next(iter(dice.values())))
    figure = Figure(figsize=(8, 0.44 * len(classes) + 1.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    colours = [*itertools.islice(itertools.cycle(NETWORKS), len(dice) - 2), "#7a8794", "#7a8794"]
    for marker, colour, (title, values) in zip(itertools.cycle(MARKERS), colours, dice.items(), strict=False):
        axes.scatter([values[name] for name in classes], range(len(classes)), marker=marker, s=55, color=colour, label=title, zorder=3, alpha=0.9)
    axes.set(xlim=(-0.02, 1), xlabel="Dice on the side never trained on", yticks=range(len(classes)), yticklabels=classes)
    axes.invert_yaxis()
    _plain(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(dice), frameon=False, fontsize=9)
    _save(figure, path)


def draw_curves(logs: Mapping[str, Path], path: Path) -> None:
    """{network: metrics.jsonl}: training loss by training steps, with its running mean."""
    figure = Figure(figsize=(8, 3.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    for colour, (title, log) in zip(itertools.cycle(NETWORKS), logs.items(), strict=False):
        records = [record for record in read_json_lines(log) if "loss" in record]
        steps, loss = (np.array([record[key] for record in records]) for key in ("step", "loss"))
        axes.plot(steps, loss, ".-", color=colour, alpha=0.3, lw=1, ms=3)
        axes.plot(steps, _running_mean(loss), color=colour, lw=2, label=f"{title}, {records[-1]['seconds']:.0f} s")
    axes.set(xlabel="training steps", ylabel="loss (Dice + cross-entropy)", xlim=(0, None), ylim=(0, None))
    _plain(axes)
    axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def _panels(
    window: tuple[slice, ...], views: Mapping[str, int], edges: np.ndarray, *, rows: int, height: float, left: float = 0.05
) -> tuple[Figure, np.ndarray]:
    """A dark figure with a row of slices of one height for each of `rows`; lengths in inches."""
    size = np.array([part.stop - part.start for part in window]) * edges
    widths = [height * np.divide(*np.delete(size, axis)) for axis in views.values()]
    space, title, legend = 0.05, 0.36, 0.45
    whole_width, whole_height = left + sum(widths) + space * len(views), title + rows * (height + space) + legend
    figure = Figure(figsize=(whole_width, whole_height), dpi=130, facecolor=_DARK)
    grid = figure.subplots(
        rows,
        len(views),
        squeeze=False,
        width_ratios=widths,
        gridspec_kw={
            "left": left / whole_width,
            "right": 1 - space / whole_width,
            "wspace": space / np.mean(widths),
            "top": 1 - title / whole_height,
            "bottom": legend / whole_height,
            "hspace": space / height,
        },
    )
    return figure, grid


def _draw_slice(axes: Axes, image: np.ndarray, labels: np.ndarray, aspect: float, white: float, outlines: np.ndarray | None = None) -> None:
    """One slice in grey, labels over it in colour, and the outlines of other labels in white."""
    axes.imshow(image.T, cmap="gray", vmin=0, vmax=white, origin="lower", interpolation="bilinear", aspect=aspect)
    colours = np.zeros((*labels.shape, 4))
    for value in np.unique(labels[labels > 0]):
        colours[labels == value] = (*to_rgb(COLOURS[value - 1]), 0.6)
    axes.imshow(colours.transpose(1, 0, 2), origin="lower", interpolation="nearest", aspect=aspect)
    for source, colour, width in ((labels, None, 1.2), (outlines, "white", 0.8)):
        for value in () if source is None else np.unique(source[source > 0]):
            axes.contour((source == value).T, levels=[0.5], colors=[colour or COLOURS[value - 1]], linewidths=width)
    axes.set(xticks=[], yticks=[], facecolor="black")
    axes.spines[:].set_visible(False)


def _letter(axes: Axes, view: str) -> None:
    """The directions at the edges of a slice: L left, A front, S up and so on."""
    places = ((0.015, 0.5, "left", "center"), (0.985, 0.5, "right", "center"), (0.5, 0.015, "center", "bottom"), (0.5, 0.985, "center", "top"))
    for letter, (x, y, horizontal, vertical) in zip(_LETTERS[view], places, strict=True):
        axes.text(
            x,
            y,
            letter,
            color="white",
            fontsize=8,
            ha=horizontal,
            va=vertical,
            transform=axes.transAxes,
            path_effects=[withStroke(linewidth=2, foreground="black")],
        )


def _legend(figure: Figure, brain: Brain) -> None:
    patches = [Patch(color=COLOURS[value - 1], label=name) for name, value in brain.classes.items() if value]
    figure.legend(
        handles=patches, loc="lower center", ncols=len(patches), frameon=False, labelcolor="white", fontsize=9, handlelength=1.1, columnspacing=1.4
    )


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.25, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK)


def _save(figure: Figure, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary)


def _ras(brain: Brain, array: np.ndarray) -> np.ndarray:
    """The array with its axes from left to right, back to front and down to up."""
    return nib.orientations.apply_orientation(array, nib.io_orientation(brain.image.affine))


def _ras_box(brain: Brain, box: tuple[slice, ...]) -> tuple[slice, ...]:
    inside = np.zeros(brain.image.shape, bool)
    inside[box] = True
    return tuple(slice(int(index.min()), int(index.max()) + 1) for index in np.nonzero(_ras(brain, inside)))


def _edges(brain: Brain) -> np.ndarray:
    """A voxel's edges in millimetres along the RAS axes."""
    return np.linalg.norm(nib.as_closest_canonical(brain.image).affine[:3, :3], axis=0)


def _white(image: np.ndarray) -> float:
    """The intensity shown as white: a little above the brightest tissue."""
    return 1.1 * float(np.percentile(image[image > 0], 99))


def _window(labels: np.ndarray, edges: np.ndarray) -> tuple[slice, ...]:
    """The box about all labels with a margin."""
    margin = np.rint(_MARGIN_MM / edges).astype(int)
    return tuple(
        slice(max(0, int(index.min()) - m), min(size, int(index.max()) + 1 + m))
        for index, m, size in zip(np.nonzero(labels), margin, labels.shape, strict=True)
    )


def _richest_slice(labels: np.ndarray, axis: int) -> int:
    """The slice across `axis` that shows most of the structures: small ones count for more than their voxels."""
    others = tuple(other for other in range(3) if other != axis)
    weights = sum(np.sqrt((labels == value).sum(others)) for value in np.unique(labels[labels > 0]))
    return int(np.argmax(weights)) if np.ndim(weights) else labels.shape[axis] // 2  # no structure: the middle


def _cut(window: tuple[slice, ...], axis: int, index: int) -> tuple[slice | int, ...]:
    return tuple(index if other == axis else window[other] for other in range(3))


def _aspect(edges: np.ndarray, axis: int) -> float:
    horizontal, vertical = np.delete(edges, axis)
    return vertical / horizontal


def _running_mean(values: np.ndarray, width: int = 9) -> np.ndarray:
    """The mean over at most `width` values about each."""
    kernel = np.ones(min(width, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
