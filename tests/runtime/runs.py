"""RUN folders without a training: a small network with random weights, and settings as `medssm train` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from medssm.segment import networks, postprocess
from medssm.segment.preprocess import Fitted

MODEL = "monai.networks.nets.UNet"
CLASSES = {"background": 0, "ball": 1, "box": 2}


def write_run(folder: Path, steps: postprocess.Steps | None = None, **settings: Any) -> Path:
    """A finished training of `settings` (of `Fitted`; a 3D network with one channel unless they say otherwise)."""
    fitted = Fitted(
        **{
            "channels": ("MR",),
            "spacing": (1.0, 1.0, 1.0),
            "intensity": tuple({"scheme": "zscore"} for _ in settings.get("channels", ("MR",))),
            "classes": CLASSES,
            "ignore": None,
            "patch": (16, 16, 16),
            **settings,
        }
    )
    kwargs = {
        "spatial_dims": len(fitted.patch),
        "in_channels": len(fitted.channels),
        "out_channels": len(fitted.outputs),
        "channels": [4, 8],
        "strides": [2],
        "num_res_units": 1,
    }
    torch.manual_seed(0)
    network = networks.build(MODEL, **kwargs)
    with torch.no_grad():  # logits far from each other: few voxels are near ties
        for parameter in network.parameters():
            parameter.mul_(2)
    folder.mkdir(parents=True)
    fitted.save(folder / "fitted.json")
    networks.save(folder, network, networks.describe(MODEL, kwargs))
    if steps:
        postprocess.save(folder / postprocess.POSTPROCESSING, steps, {})
    return folder
