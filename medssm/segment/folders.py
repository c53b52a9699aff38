"""A data set without a description: a folder images/ and beside it masks/ or labels/, with a label map for each image."""

from __future__ import annotations

from pathlib import Path

from medssm.errors import UserError
from medssm.segment.cases import Case, one_of_each_name
from medssm.segment.images import image_files, strip_ending

IMAGES, MASKS = "images", ("masks", "labels")
_ENDINGS = ("", *(f"{mark}{word}" for word in ("mask", "seg", "segmentation", "label", "labels", "gt") for mark in "_-"))  # of a label map's name


def is_paired(root: Path) -> bool:
    """Whether a folder holds images/ and one of masks/ and labels/."""
    return (root / IMAGES).is_dir() and any((root / name).is_dir() for name in MASKS)


def paired_cases(root: Path) -> list[Case]:
    """images/NAME.png with masks/NAME.png, masks/NAME_mask.png or the like; the two may have different formats. Every file of images/ is an image.

    Raises UserError with one line for each image without a label map, and each label map without an image.
    """
    folders = [root / name for name in MASKS if (root / name).is_dir()]
    if len(folders) > 1:
        raise UserError(f"{root}: {' and '.join(MASKS)}: which of the two has the label maps? Name the pairs in a datalist")
    files = {case.name: case.images[0] for case in one_of_each_name([Case(strip_ending(file), (file,)) for file in image_files(folders[0])])}
    cases, lines, used = [], [], set()
    for case in one_of_each_name([Case(strip_ending(file), (file,)) for file in image_files(root / IMAGES)]):
        found = [f"{case.name}{ending}" for ending in _ENDINGS if f"{case.name}{ending}" in files]
        if len(found) != 1:
            lines.append(f"{case.images[0]}: {' and '.join(found) or 'no file of that name'} in {folders[0]}: expected one label map")
            continue
        used.add(found[0])
        cases.append(Case(case.name, case.images, files[found[0]]))
    lines += [f"{files[name]}: no image of that name in {root / IMAGES}" for name in sorted(files.keys() - used)]
    if lines:
        raise UserError("\n".join(lines[:20]))
    return cases
