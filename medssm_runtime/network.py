"""An exported network, opened once: from the voxels of a scan to its label map."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medssm_runtime import postprocess
from medssm_runtime.classifier import Classifier
from medssm_runtime.engines import Run, open_network
from medssm_runtime.errors import UserError
from medssm_runtime.geometry import at_spacing, edges_of, from_ras, resampled, to_ras
from medssm_runtime.settings import ClassSettings, Settings
from medssm_runtime.windows import probabilities

_APART = 50  # times: scans whose spacings differ by more were not measured in one unit


@dataclass(frozen=True)
class Network:
    """settings: what the file says of itself; run: images (batch, channels, *patch) -> logits (batch, outputs, *patch), both float32."""

    path: Path
    settings: Settings
    run: Run

    def segment(self, data: np.ndarray, affine: np.ndarray, *, overlap: float | None = None, mirror: bool | None = None) -> np.ndarray:
        """The label map (x, y, z) of a scan, on its own grid.

        Args:
            data: (channels, x, y, z), as they stand in the file
            affine: (4, 4), from voxels to millimetres in RAS
            overlap: of neighbouring windows, 0 to less than 1 (default: what the file says)
            mirror: average over the mirrorings that the network was trained with (default: what the file says)

        Raises:
            UserError: the overlap is out of range, or the scan does not fit the network.
        """
        how = self.settings
        overlap = how.overlap if overlap is None else overlap
        if not 0 <= overlap < 1:
            raise UserError(f"overlap: expected 0 to less than 1, got {overlap}")
        if data.ndim != 4 or len(data) != len(how.channels):
            raise UserError(f"data: expected ({len(how.channels)}, x, y, z), got the shape {data.shape}")
        turned, own = to_ras(np.asarray(data, np.float32), np.asarray(affine, float))
        edges = edges_of(own.affine)
        wanted = np.where(np.array(how.spacing) > 0, how.spacing, edges)
        if (edges > _APART * wanted).all() or (wanted > _APART * edges).all():
            named = [" x ".join(f"{edge:.3g}" for edge in some) for some in (edges, wanted)]
            raise UserError(
                f"voxels of {named[0]} mm, where the network was trained at {named[1]} mm: a wrong unit in the header, or another kind of image"
            )
        grid = at_spacing(own, how.spacing)
        average = how.average if mirror is None else mirror
        found = probabilities(resampled(turned, own, grid), how, self.run, overlap=overlap, mirror=average)
        values = list(how.classes.values())
        kind = np.result_type(*map(np.min_scalar_type, (0, min(values), max(values))))
        labels = np.full(own.shape, values[0], kind)
        for i, output in enumerate(found):  # one after the other: the scan may have many more voxels than the network's grid
            back = resampled(output[None], grid, own)[0]
            if how.regions:
                labels[back > 0.5] = how.written[i]
            elif i == 0:
                best = back
            else:
                better = back > best
                labels[better] = values[i]
                best = np.where(better, back, best)
        voxel_ml = abs(float(np.linalg.det(np.asarray(affine, float)[:3, :3]))) / 1000
        return postprocess.processed(from_ras(labels, affine), how.postprocessing, how.structures, voxel_ml)


def load(model: Path | str, *, threads: int | None = None, ops: Path | str | None = None) -> Network | Classifier:
    """Open an exported network: one that segments, or one that classifies.

    Args:
        model: FILE.onnx (ONNX Runtime) or FILE.xml (OpenVINO), written by medssm export
        threads: of the engine; None leaves it to the engine
        ops: the library of medssm's operators (default: that of this package or of an installed medssm)

    Raises:
        UserError: the file cannot be read, is not from medssm export, or needs what is not there.
    """
    if threads is not None and threads < 1:
        raise UserError(f"threads: expected 1 or more, got {threads}")
    settings, run = open_network(Path(model), threads, None if ops is None else Path(ops))
    return Classifier(Path(model), settings, run) if isinstance(settings, ClassSettings) else Network(Path(model), settings, run)
