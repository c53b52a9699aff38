"""The demo's brain with left and right as classes of their own: a data set whose test image is the same brain mirrored.

    python docs/examples/sides.py Dataset003_Sides
    medssm train Dataset003_Sides run --spacing 3 3 3 --patch 48 60 52 --batch 1 --max-steps 200
    medssm predict run Dataset003_Sides/imagesTs found
    medssm evaluate found Dataset003_Sides/labelsTs

In the mirrored brain what looks like a right hippocampus is the left one. A network that names a structure by its looks is wrong there; one that
names it by where it lies in the head is right. `medssm train` does not mirror from left to right where classes have a side, so the test image is not
among the trained ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from medssm.files import write_json
from medssm.segment.demo.data import SOURCES, load_brain
from medssm.segment.images import nifti


def write(out: Path, data: str = "icbm2009c") -> dict[str, int]:
    """Write the data set; returns {class: value}."""
    brain = load_brain(data)
    axis, x = brain.left_right
    names = [name for name in brain.classes if name != "background"]
    classes = {"background": 0, **{f"{side} {name}": 1 + 2 * i + s for i, name in enumerate(names) for s, side in enumerate(("left", "right"))}}
    right = np.expand_dims(x > 0, tuple(other for other in range(3) if other != axis))
    sided = np.where(brain.labels > 0, 2 * brain.labels - 1 + right, 0).astype(np.uint8)
    box = tuple(slice(int(at.min()), int(at.max()) + 1) for at in np.nonzero(brain.voxels > 0))
    part = brain.image.slicer[box]
    image, labels, record = np.asanyarray(part.dataobj), sided[box], nifti.record(part)
    exchanged = np.where(labels > 0, 1 + (labels - 1 ^ 1), 0).astype(np.uint8)
    mirrored = np.ascontiguousarray(np.flip(image, axis)), np.ascontiguousarray(np.flip(exchanged, axis))
    for section, name, (voxels, truth) in (("Tr", "brain", (image, labels)), ("Ts", "mirrored", mirrored)):
        nifti.write(out / f"images{section}" / f"{name}_0000.nii.gz", voxels, record)
        nifti.write(out / f"labels{section}" / f"{name}.nii.gz", truth, record)
    description = {"name": "Sides", "channel_names": {"0": "T1"}, "labels": classes, "numTraining": 1, "file_ending": ".nii.gz"}
    write_json(out / "dataset.json", description)
    return classes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--data", default="icbm2009c", choices=SOURCES, help="which brain")
    given = parser.parse_args()
    print(f"{given.out}: {len(write(given.out, given.data)) - 1} classes")
