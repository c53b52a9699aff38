"""Pictures of cases: what each side found over the scan, with the reference's outlines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from medssm.compare.sources import Side
from medssm.errors import UserError
from medssm.segment import pages
from medssm.segment.evaluate import by_name
from medssm.segment.images import open_image, read_label

SHOWN = 12  # cases with pictures
_PIXELS = 170
_FIRST = "_0000"  # nnU-Net's ending of the first channel's file


def scans(folder: Path) -> dict[str, Path]:
    """{case: scan} of a folder: CASE, or CASE_0000, its first channel. Raises UserError where there is none."""
    if not folder.is_dir():
        raise UserError(f"images: {folder}: no such folder")
    found = by_name(folder)
    if not found:
        raise UserError(f"images: {folder}: no image in this folder")
    return {name.removesuffix(_FIRST): file for name, file in found.items() if name.removesuffix(_FIRST) not in found or not name.endswith(_FIRST)}


def pictures(cases: Sequence[str], sides: Sequence[Side], references: Mapping[str, Path], images: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """{case: {side: picture}} of the first cases that have a scan. Raises UserError where a scan does not lie where its label maps lie."""
    shown: dict[str, dict[str, str]] = {}
    for case in (case for case in cases if case in images):
        scan = open_image(images[case])
        turn = nib.io_orientation(scan.affine)
        grey = nib.orientations.apply_orientation(scan.voxels(np.float32)[0], turn)
        edges = scan.spacing[np.argsort(turn[:, 0])]
        truth = nib.orientations.apply_orientation(read_label(references[case], scan)[0], turn)
        low, high = np.nanpercentile(grey.reshape(-1)[:: max(1, grey.size // 2**20)], (0.5, 99.5)).tolist()
        shown[case] = {}
        for side in sides:
            found = nib.orientations.apply_orientation(read_label(side.files[case], scan)[0], turn)
            at = pages.richest(np.maximum(truth, found) if not truth.any() else truth)
            shown[case][side.name] = pages.slices(np.nan_to_num(grey), [found, truth], edges, (low, high), _PIXELS, at=at)
        if len(shown) == SHOWN:
            break
    return shown
