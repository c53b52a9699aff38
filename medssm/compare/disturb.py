"""Scans with noise, a bias field or thick slices, as other scanners give them: the same ones for every network.

noise         normal, with a standard deviation of 5 % of the channel's range, from its 0.5th to its 99.5th percentile
bias-field    times exp(p), p a polynomial of degree 3 in each axis from -1 to 1 with Legendre coefficients drawn from -0.3 to 0.3; the same for all
              channels (MONAI's RandBiasField)
thick-slices  means of three slices along the axis with the widest spacing (of equal ones the last), and back to the grid by linear interpolation
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from monai.transforms import RandBiasField, RandGaussianNoise, Resize
from torch import Tensor

from medssm.errors import UserError
from medssm.files import make_folder, write_json
from medssm.segment.cases import Case
from medssm.segment.images import nifti, read_image

KINDS = ("noise", "bias-field", "thick-slices")
SECTION = "test"  # of the list that `write` writes
_NOISE, _RANGE = 0.05, (0.5, 99.5)
_DEGREE, _COEFFICIENTS = 3, (-0.3, 0.3)
_SLICES = 3


def disturbed(image: np.ndarray, spacing: Sequence[float], kind: str, seed: int) -> np.ndarray:
    """The image (c, x, y, z) with a disturbance of KINDS, float32; the same seed gives the same one.

    Raises UserError for thick slices of a plane.
    """
    x = torch.as_tensor(image, dtype=torch.float32)
    if kind == "noise":
        low, high = np.percentile(image.reshape(len(image), -1), _RANGE, axis=1)
        transform = RandGaussianNoise(prob=1, std=1.0, sample_std=False)
        transform.set_random_state(seed)
        y = x + _plain(transform(torch.zeros_like(x))) * torch.as_tensor(_NOISE * (high - low), dtype=torch.float32)[:, None, None, None]
    elif kind == "bias-field":
        field = RandBiasField(degree=_DEGREE, coeff_range=_COEFFICIENTS, prob=1)
        field.set_random_state(seed)
        y = _plain(field(x))
    else:
        shape = list(x.shape[1:])
        axis = 2 - int(np.argmax(spacing[::-1]))
        if shape[axis] < 2:
            raise UserError(f"disturb: thick-slices: expected a volume, got one slice of {shape[(axis + 1) % 3]} x {shape[(axis + 2) % 3]} voxels")
        thick = [*shape[:axis], max(1, shape[axis] // _SLICES), *shape[axis + 1 :]]
        y = _plain(Resize(shape, mode="trilinear", align_corners=False)(Resize(thick, mode="area")(x)))
    return y.numpy()


def write(cases: Sequence[Case], channels: int, kind: str, folder: Path, seed: int) -> tuple[Path, dict[str, str]]:
    """Disturbed scans of these cases as NIfTI files in a folder, a datalist of them with the section SECTION, and {case: why it cannot be read}.

    A scan that is there already is not made again. Raises UserError where none can be made.
    """
    make_folder(folder)
    listed, failed = [], dict[str, str]()
    for case in cases:
        places = "\n".join(str(file.resolve()) for file in case.images)
        file = folder / f"{zlib.crc32(places.encode()):08x}.nii.gz"
        try:
            if not file.exists():
                data, like = read_image(case.images, channels)
                values = disturbed(data, like.spacing.tolist(), kind, zlib.crc32(f"{seed} {kind} {case.name}".encode()))
                nifti.write(file, values[0] if len(values) == 1 else np.moveaxis(values, 0, -1), like)
            listed.append({"name": case.name, "image": str(file.resolve())})
        except UserError as error:
            failed[case.name] = str(error)
    if not listed:
        raise UserError("\n".join(dict.fromkeys(failed.values())))
    write_json(folder / "scans.json", {SECTION: listed})
    return folder / "scans.json", failed


def _plain(x: np.ndarray | Tensor) -> Tensor:
    """Without MONAI's metadata."""
    return torch.as_tensor(x).as_subclass(Tensor)
