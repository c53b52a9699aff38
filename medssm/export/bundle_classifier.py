"""What a MONAI bundle of a classifier says and does: from images to predictions.csv with the probability of each class, in MONAI's transforms.

It repeats `medssm predict`: RAS, spacing, intensities by channel, one shape, softmax of the logits over the temperature. Runs of pictures take PNG
and JPEG by MONAI's PILReader, all others NIfTI.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import PIL
import torch
from torch import nn

from medssm.classify import calibration
from medssm.classify.images import Fitted
from medssm.classify.predictions import PROBABILITY
from medssm.errors import UserError
from medssm.export.bundle_parts import SCALED, Contents, evaluation, intensity, network_of, numbered, start
from medssm.segment import networks

_TABLE = "predictions.csv"
_MODES = {
    "1": "1",
    "L": "L",
    "LA": "L",
    "I": "I",
    "I;16": "I;16",
    "P": "RGB",
    "PA": "RGB",
    "RGB": "RGB",
    "RGBA": "RGB",
}  # Pillow's; others are refused
_PICTURES = {("grey",): "grey values", ("red", "green", "blue"): "colours of 8 bit"}


def contents(run: Path, config: dict[str, Any], fitted: Fitted) -> Contents:
    """The bundle's parts. Raises UserError for a network of several outputs, and for pictures that MONAI reads otherwise than medssm."""
    model, pictures = config["model"], len(fitted.shape) == 2 and fitted.channels in _PICTURES
    if pictures and fitted.spacing is not None:
        raise UserError(f"run: {run}: its pictures are resampled to a spacing, and MONAI does not read how large a picture's pixel is")
    if pictures and len(fitted.channels) > 1 and any(how.get("high", 0) > 255 for how in fitted.intensity):
        raise UserError(f"run: {run}: its pictures have colours of 16 bit, of which MONAI reads half")
    network, found = networks.load(run), calibration.load(run, "last")
    _check_one_output(network, model, fitted)
    packages = {"pillow": PIL.__version__} if pictures else {"nibabel": nibabel.__version__}
    return Contents(
        network,
        _inference(model, config["kwargs"], fitted, pictures, found or 1.0),
        _metadata(model, fitted, pictures),
        packages,
        lambda name, requires: _readme(name, model, fitted, pictures, found, requires),
        {},
    )


@torch.no_grad()
def _check_one_output(network: nn.Module, model: str, fitted: Fitted) -> None:
    output = network.eval()(torch.zeros(1, len(fitted.channels), *fitted.shape))
    if not (isinstance(output, torch.Tensor) and output.ndim == 2):
        raise UserError(f"run: {model} gives several outputs; a bundle takes a network that gives one")


def _inference(model: str, kwargs: dict[str, Any], fitted: Fitted, pictures: bool, temperature: float) -> dict[str, Any]:
    """configs/inference.json."""
    endings = (".png", ".jpg", ".jpeg") if pictures else (".nii", ".nii.gz")
    files = "path in sorted(glob.glob(@dataset_dir + '/**/*', recursive=True))"
    return {
        "imports": ["$import glob", "$import os", "$import pathlib", "$import monai", *(["$from PIL import ImageOps"] if pictures else [])],
        **start(f"$[{{'image': path}} for {files} if path.lower().endswith({endings})]"),
        "temperature": temperature,
        "network_def": network_of(model, kwargs),
        "network": f"$@network_def.to(@device, memory_format={networks.memory_format(len(fitted.shape))})",
        "intensity": [intensity(how) for how in fitted.intensity],
        "preprocessing": {"_target_": "Compose", "transforms": [*(_picture() if pictures else _volume(fitted)), _scaled(fitted), *_in_shape(fitted)]},
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": {"_target_": "SimpleInferer"},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [{"_target_": "Lambdad", "keys": "pred", "func": "$lambda x, t=@temperature: torch.softmax(x.double() / t, 0)"}],
        },
        "handlers": [
            {
                "_target_": "ClassificationSaver",
                "output_dir": "@output_dir",
                "filename": _TABLE,
                "overwrite": False,  # behind the heading, which MONAI does not write
                "batch_transform": "$lambda batch: [item['image'].meta for item in batch]",
                "output_transform": "$monai.handlers.from_engine('pred')",
            }
        ],
        **evaluation(val_handlers="@handlers"),
        "run": [
            "$os.makedirs(@output_dir, exist_ok=True)",
            f"$pathlib.Path(@output_dir, '{_TABLE}').write_text({_heading(fitted.classes)})",
            "$@evaluator.run()",
        ],
    }


def _heading(classes: Sequence[str]) -> str:
    """The first line of the table, as an expression in which MONAI finds no reference."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(("path", *(PROBABILITY + name for name in classes)))
    return repr(text.getvalue()).replace("@", "\\x40").replace("%", "\\x25")


def _picture() -> list[dict[str, Any]]:
    """From a file to (c, x, y) with the axes in RAS: a picture's columns go to the left, its rows to the back."""
    upright = f"$lambda image: ImageOps.exif_transpose(image.convert({_MODES}[image.mode]))"
    return [
        {"_target_": "LoadImaged", "keys": "image", "reader": {"_target_": "PILReader", "converter": upright}, "ensure_channel_first": True},
        {"_target_": "Flipd", "keys": "image", "spatial_axis": [0, 1]},
    ]


def _volume(fitted: Fitted) -> list[dict[str, Any]]:
    """From a NIfTI file to (c, x, y, z) in RAS at the spacing, or (c, x, y) of a plane."""
    steps: list[dict[str, Any]] = [
        {"_target_": "LoadImaged", "keys": "image", "reader": "NibabelReader", "ensure_channel_first": True},
        {"_target_": "Lambdad", "keys": "image", "func": "$lambda x: x[..., None] if x.ndim == 3 else x"},  # a file of two axes
        {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": [["L", "R"], ["P", "A"], ["I", "S"]]},
    ]
    if fitted.spacing is not None:
        edges = [edge if axis in fitted.axes else 0.0 for axis, edge in enumerate(fitted.spacing)]
        steps.append({"_target_": "Spacingd", "keys": "image", "pixdim": edges, "mode": "bilinear", "padding_mode": "border", "dtype": "$np.float32"})
    if len(fitted.shape) == 2:
        steps.append({"_target_": "Lambdad", "keys": "image", "func": "$lambda x: x.squeeze(max(i for i, n in enumerate(x.shape) if i and n == 1))"})
    return steps


def _scaled(fitted: Fitted) -> dict[str, Any]:
    """Each channel scaled; of three channels a grey image has each."""
    count = len(fitted.channels)
    channels = "x.expand(3, *x.shape[1:])" if count == 3 else "x"
    func = f"$lambda x, scales=@intensity: torch.cat([scale(c) for scale, c in zip(scales, {channels}.split(1), strict=True)])"
    return {"_target_": "Lambdad", "keys": "image", "func": func}


def _in_shape(fitted: Fitted) -> list[dict[str, Any]]:
    """Every image in one shape, as `classify.images.prepared` does it."""
    shape, axes = list(fitted.shape), "xyz"[: len(fitted.shape)]
    if fitted.sizes == "pad":  # with each channel's minimum, which SpatialPad cannot be told: infinity marks it, then it is filled
        return [
            {"_target_": "SpatialPadd", "keys": "image", "spatial_size": shape, "value": "$float('inf')"},
            {
                "_target_": "Lambdad",
                "keys": "image",
                "func": f"$lambda x: torch.where(x.isinf(), x.amin({tuple(range(1, len(shape) + 1))}, keepdim=True), x)",
            },
            {"_target_": "CenterSpatialCropd", "keys": "image", "roi_size": shape},
        ]
    # Linear along each axis with antialiasing, as a product with what it makes of a unit matrix: MONAI's Resize smooths in another way.
    weights = "torch.nn.functional.interpolate(torch.eye(n)[None, None], (m, n), mode='bilinear', antialias=True)[0, 0]"
    equation = f"c{axes}," + ",".join(f"{new}{old}" for new, old in zip("ijk", axes, strict=False)) + f"->c{'ijk'[: len(shape)]}"
    func = f"$lambda x: torch.einsum('{equation}', x, *({weights} for n, m in zip(x.shape[1:], {shape}, strict=True)))"
    return [{"_target_": "Lambdad", "keys": "image", "func": func}]


def _metadata(model: str, fitted: Fitted, pictures: bool) -> dict[str, Any]:
    classes = ", ".join(fitted.classes)
    ct = all(how["scheme"] == "ct" for how in fitted.intensity)
    return {
        "task": f"Classification: {classes}",
        "description": f"{model}, trained by medssm on images of {', '.join(fitted.channels)} to tell {classes} apart",
        "data_type": "pillow" if pictures else "nibabel",
        "pred_classes": ", ".join(f"{i} is {name}" for i, name in enumerate(fitted.classes)),
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "hounsfield" if ct else "magnitude",
                    "modality": ", ".join(fitted.channels),
                    "num_channels": len(fitted.channels),
                    "spatial_shape": list(fitted.shape),
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": False,
                    "channel_def": numbered(fitted.channels),
                }
            },
            "outputs": {
                "pred": {
                    "type": "probabilities",
                    "format": "classes",
                    "num_channels": len(fitted.classes),
                    "spatial_shape": [1, len(fitted.classes)],
                    "dtype": "float32",
                    "value_range": [0, 1],
                    "is_patch_data": False,
                    "channel_def": numbered(fitted.classes),
                }
            },
        },
    }


def _readme(name: str, model: str, fitted: Fitted, pictures: bool, temperature: float | None, requires: Mapping[str, str]) -> str:
    kind = "planes" if len(fitted.shape) == 2 else "volumes"
    files = f"PNG and JPEG pictures ({_PICTURES[fitted.channels]})" if pictures else f"NIfTI files of {kind}"
    if not pictures and len(fitted.channels) > 1:
        files += ", with their channels along the fourth axis"
    channels = "\n".join(
        f"| {i} | {channel} | {SCALED[how['scheme']]} |" for i, (channel, how) in enumerate(zip(fitted.channels, fitted.intensity, strict=True))
    )
    at = f"resampled to {' x '.join(f'{edge:g}' for edge in fitted.spacing)} mm, " if fitted.spacing else ""
    shape = " x ".join(map(str, fitted.shape))
    brought = f"resized to {shape} voxels" if fitted.sizes == "resize" else f"padded and cropped about the middle to {shape} voxels"
    over = (
        "not calibrated: no image was held out in training"
        if temperature is None
        else f"the softmax of the logits over {temperature:.4g}, the temperature that was fitted to held-out images"
    )
    return f"""# {name}

{model}, trained by medssm. Says which of these classes an image is: {", ".join(fitted.classes)}. For research; not a medical device.

## Run
Needs MONAI with fire, {", ".join(f"{package} {number}" for package, number in requires.items())}. In this folder:

    python -m monai.bundle run --config_file configs/inference.json --meta_file configs/metadata.json --dataset_dir IMAGES --output_dir FOUND

IMAGES, with the folders below it, holds {files}. FOUND/{_TABLE} gets a line for each image: its path, and the probability of
every class under p_CLASS. A {_TABLE} that is there is written over.

## What it does
Turned to RAS, {at}scaled by channel, {brought}. The probabilities are {over}.
These are the steps of `medssm predict`, which besides averages folds, reads other formats, and refuses voxels that are not finite and images of one
value.

| channel | name | intensity |
|---|---|---|
{channels}
"""
