"""One case explained: maps in the image's geometry, figures, and a page with pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from medssm import machine
from medssm.errors import UserError
from medssm.files import protect, write_text
from medssm.scratch import Scratch, Store
from medssm.segment.cases import Case
from medssm.segment.explain import page, reach, write
from medssm.segment.explain.attribution import check_installed
from medssm.segment.explain.maps import METHODS, Maps, attributed, scenes
from medssm.segment.explain.sanity import checked
from medssm.segment.explain.score import structure, thick
from medssm.segment.explain.sight import Run, Sight, deepest, middle, sight
from medssm.segment.images import files_of, open_channels, read_label
from medssm.segment.resample import Grid, ras
from medssm.segment.stored import read_stored


class Explainer:
    """Explains one class of every case.

    Args:
        wanted: the class, by its name or its value
        runs: the networks, whose scores are averaged; what the scans see and the sanity checks are of the first
        device: where they are
        overlap: of neighbouring windows
        batch: windows at a time
        at: the voxel that the scans are asked about, in millimetres of the image's own coordinates (RAS); None is the middle of the class
        nan: a number in place of voxels that are not finite
        scratch: folder for temporary files; None is that of the output
        overwrite: write over files of other origin

    Raises:
        UserError: captum is missing, or there is no such class.
    """

    def __init__(
        self,
        wanted: str | int,
        runs: Sequence[Run],
        *,
        device: torch.device,
        overlap: float = 0.5,
        batch: int = 1,
        at: Sequence[float] | None = None,
        nan: float | None = None,
        scratch: Path | None = None,
        overwrite: bool = False,
    ) -> None:
        check_installed()
        self.structure = structure(wanted, runs[0].fitted)
        self.runs, self.device, self.overlap, self.batch, self.at = runs, device, overlap, batch, at
        self.nan, self.scratch, self.overwrite = nan, scratch, overwrite
        for run in runs:
            run.network.requires_grad_(False)  # gradients of the inputs alone

    def maps(self, target: Path) -> list[Path]:
        """The maps that are written beside the label map `target`, but for those of layers."""
        return [write.beside(target, name) for name in METHODS]

    def protect(self, target: Path, reads: Sequence[Path]) -> None:
        """UserError where the page would take the place of another file."""
        protect(page.beside(target), reads=reads, made=page.is_made_here, overwrite=self.overwrite)

    def __call__(self, case: Case, target: Path, show: Callable[[float], None] = lambda fraction: None) -> dict[str, Any]:
        """Explain a case whose label map is `target`. docs/guides/explain.md says what the result holds."""
        files = open_channels(case.images, len(self.runs[0].fitted.channels))
        file = files[0]
        onto, turn = ras(file.affine, file.shape), nib.io_orientation(file.affine)
        label = np.isin(nib.orientations.apply_orientation(read_label(target, file)[0], turn), self.structure.values)
        result: dict[str, Any] = {"class": self.structure.name, "voxels": int(label.sum())}
        if not label.any():
            return result
        reads = [path for image in case.images for path in files_of(image)]
        with Scratch(machine.free_memory() / 2, self.scratch or target.parent, str(case.images[0])) as stores:
            image = read_stored(files, self.nan, stores)
            view = page.View(image[:, :1].squeeze(1).numpy(), label, onto)
            writer = write.Writer(file, onto, target, reads, self.overwrite, stores)
            sights = [sight(run, self.structure.output, image, onto, label, self.overlap, stores) for run in self.runs]
            first = sights[0]
            voxel = middle(first.found) if self.at is None else _voxel(self.at, first.grid, case)
            maps = [
                attributed(one, stores, self.device, self.batch, lambda part, i=i: show((i + part) / len(sights)))  # type: ignore[misc]
                for i, one in enumerate(sights)
            ]
            scene = scenes(first, self.device)[0]()
            result["probability"] = float(scene.score.probability(scene.x[None]))
            for name in METHODS:
                result[name] = _sums([found[name] for found in maps])
                view.add(name, writer(name, [(one.grid, found[name].store) for one, found in zip(sights, maps, strict=True)]))
            result["sanity"] = checked(scene, first, maps[0], self.batch)
            place, at = deepest(first, voxel)
            centre = (first.grid.affine @ np.array([*voxel, 1.0]))[:3]
            layers = reach.layers_of(first.run.network, first.windows.cut(place).to(self.device), at)
            for layer in layers:
                store = _on_grid(layer, first, place, stores)
                view.add(f"reach of {layer.name}", writer(f"reach of {layer.name}", [(first.grid, store)]), centre)
                store.close()
        figures = [reach.figures(layer, first.spacing) for layer in layers]
        result["reach"] = {"target_mm": centre.round(3).tolist(), "layers": figures}
        result["files"] = writer.files
        curves = {layer.name: reach.curves(layer, first.spacing) for layer in layers}
        write_text(page.beside(target), page.text(case.name, result, view, curves))
        return {**result, "page": str(page.beside(target))}


def summary(name: str, result: Mapping[str, Any]) -> str:
    """A line about an explained case."""
    wanted = result["class"]
    if not result["voxels"]:
        return f"{name}: no voxel is labelled {wanted}: there is nothing to explain"
    found = result["integrated gradients"]
    return (
        f"{name}: {wanted}: integrated gradients add up to {found['sum']:.4g}, the scores differ by {found['difference']:.4g}: "
        f"a residue of {100 * found['residue_share']:.2g} %; {result['page']}"
    )


def _voxel(point: Sequence[float], grid: Grid, case: Case) -> tuple[int, ...]:
    """The voxel of a grid at a point in millimetres. Raises UserError where it lies outside."""
    x, y, z = np.rint(np.linalg.solve(grid.affine, np.array([*point, 1.0]))[:3]).astype(int).tolist()
    if not all(0 <= at < size for at, size in zip((x, y, z), grid.shape, strict=True)):
        raise UserError(f"explain-at: {case.images[0]}: expected a point in the image, got {' '.join(f'{value:g}' for value in point)} mm")
    return x, y, z


def _sums(maps: Sequence[Maps]) -> dict[str, float]:
    """The mean over the runs of a map's sum and of what the scores differ by, and what is between the two."""
    total, difference = (sum(values) / len(maps) for values in ([one.total for one in maps], [one.difference for one in maps]))
    residue = difference - total
    return {"sum": total, "difference": difference, "residue": residue, "residue_share": abs(residue) / max(abs(difference), 1e-12)}


def _on_grid(layer: reach.Layer, sight: Sight, place: Sequence[slice], stores: Scratch) -> Store:
    """What a layer's orders carry, (x, orders, y, z), in the window at `place`."""
    fitted, (x, y, z) = sight.run.fitted, sight.grid.shape
    store = stores.store(x, len(layer.orders), y, z)
    inside, (rows, *others) = sight.windows.over(place)
    for i, one in enumerate(layer.orders):
        part = thick(reach.on_patch(one, fitted.patch), fitted)[tuple(inside)]
        store.add((rows, slice(i, i + 1), *others), part.unsqueeze(1))
    return store
