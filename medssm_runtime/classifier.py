"""An exported classifier, opened once: from the voxels of an image to the probability of each class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medssm_runtime.engines import Run
from medssm_runtime.prepare import prepared
from medssm_runtime.settings import ClassSettings


@dataclass(frozen=True)
class Classifier:
    """settings: what the file says of itself; run: images (batch, channels, *shape) -> logits over the temperature (batch, classes), both float32."""

    path: Path
    settings: ClassSettings
    run: Run

    def classify(self, data: np.ndarray, affine: np.ndarray) -> np.ndarray:
        """The probability of each of `settings.classes`, (classes,) float64.

        Args:
            data: (channels, x, y, z), as they stand in the file; a plane has one voxel along an axis
            affine: (4, 4), from voxels to millimetres in RAS

        Raises:
            UserError: the image does not fit the network.
        """
        logits = self.run(prepared(data, affine, self.settings)[None])[0].astype(np.float64)
        found = np.exp(logits - logits.max())
        result: np.ndarray = found / found.sum()
        return result
