"""Small labelled volumes on disk: balls and boxes of two classes in noise, in any geometry."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np

UNET = {"channels": [8, 16, 32], "strides": [2, 2], "num_res_units": 1}


def volume(seed: int, shape=(40, 36, 32), channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Image (*shape, channels) with a bright ball (class 1) and a dark box (class 2); label (*shape)."""
    random = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(size) for size in shape], indexing="ij"), -1)
    label = np.zeros(shape, np.uint8)
    label[np.linalg.norm(grid - np.array(shape) * random.uniform(0.3, 0.4, 3), axis=-1) < min(shape) * 0.22] = 1
    corner = (np.array(shape) * random.uniform(0.55, 0.65, 3)).astype(int)
    label[tuple(slice(start, start + max(1, size // 4)) for start, size in zip(corner, shape, strict=True))] = 2
    image = np.array([100.0, 180.0, 30.0])[label][..., None] + random.normal(0, 10, (*shape, channels))
    return image.astype(np.float32), label


def write(path: Path, data: np.ndarray, affine=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else np.asarray(affine, float)), path)
    return path


# A small training by words of the command line.
WORDS = ["--model", "monai.networks.nets.UNet", "--model-kwargs", json.dumps(UNET), "--patch", "16", "16", "16", "--device", "cpu"]


def nnunet_folder(root: Path, cases: int = 4, shape=(40, 36, 32), affine=None, channels=("MR",), labels=None, edit=None) -> Path:
    """nnU-Net's layout with `cases` cases; `edit(seed, image, label)` may change each before it is written."""
    for seed in range(cases):
        image, label = volume(seed, shape, len(channels))
        if edit:
            image, label = edit(seed, image, label)
        for i in range(len(channels)):
            write(root / "imagesTr" / f"case_{seed}_{i:04d}.nii.gz", image[..., i], affine)
        write(root / "labelsTr" / f"case_{seed}.nii.gz", label, affine)
    description = {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": labels or {"background": 0, "ball": 1, "box": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root
