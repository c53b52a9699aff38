"""What a MONAI bundle of a network that segments says and does: from a NIfTI file to a label map on its own grid, in MONAI's transforms.

It repeats `medssm predict`: RAS, spacing, intensities by channel, padding to the patch, a gaussian sliding window over probabilities, probabilities
back to the scan's grid, the largest of them, and the run's post-processing, which is a script of the bundle. It does not mirror.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import scipy
import torch
from torch import nn

import medssm_runtime.postprocess
from medssm.errors import UserError
from medssm.export.bundle_parts import SCALED, Contents, evaluation, intensity, network_of, numbered, start
from medssm.segment import networks, postprocess
from medssm.segment.losses import finest_first
from medssm.segment.preprocess import Fitted

_SCRIPT = "scripts/postprocess.py"


def contents(run: Path, config: dict[str, Any], fitted: Fitted) -> Contents:
    """The bundle's parts. Raises UserError for a network of several outputs."""
    model, (network, kwargs) = config["model"], _with_one_output(networks.load(run), config, fitted)
    steps = {name: how for name, how in postprocess.load([run], list(fitted.structures)).items() if how}
    packages = {"nibabel": nibabel.__version__, **({"scipy": scipy.__version__} if steps else {})}
    script = Path(medssm_runtime.postprocess.__file__).read_bytes()
    return Contents(
        network,
        _inference(model, kwargs, fitted, steps),
        _metadata(model, fitted),
        packages,
        lambda name, requires: _readme(name, model, fitted, steps, requires),
        {_SCRIPT: script} if steps else {},
    )


def _inference(model: str, kwargs: dict, fitted: Fitted, steps: postprocess.Steps) -> dict:
    """configs/inference.json."""
    files, keys, joined = "{'image': path} for path in sorted(glob.glob(@dataset_dir + '/*.nii*'))", ["image"], []
    if len(fitted.channels) > 1:
        keys = [f"image_{i}" for i in range(len(fitted.channels))]
        files = (
            f"{{f'image_{{i}}': path.replace('_0000.nii', f'_{{i:04d}}.nii') for i in range({len(keys)})}} "
            "for path in sorted(glob.glob(@dataset_dir + '/*_0000.nii*'))"
        )
        # Joined here, not by LoadImage: MONAI 1.6 cannot save the label map of an image that it stacked where its first two axes lie in a plane.
        joined = [{"_target_": "ConcatItemsd", "keys": keys, "name": "image"}, {"_target_": "DeleteItemsd", "keys": keys}]
    window = (
        {"_target_": "SlidingWindowInfererAdapt"} if fitted.slice_axis is None else {"_target_": "SliceInferer", "spatial_dim": fitted.slice_axis}
    )
    values = list(fitted.classes.values())
    decision: list[dict[str, Any]] = [{"_target_": "AsDiscreted", "keys": "pred", "argmax": True}]
    if fitted.regions:  # a later region is written over an earlier one
        over = "torch.where(pair[0] > 0.5, pair[1], label)"
        written = f"zip(x.split(1), {list(fitted.regions.written)})"
        decision = [{"_target_": "Lambdad", "keys": "pred", "func": f"$lambda x: functools.reduce(lambda label, pair: {over}, {written}, x[:1] * 0)"}]
    elif values != list(range(len(values))):
        decision.append({"_target_": "MapLabelValued", "keys": "pred", "orig_labels": list(range(len(values))), "target_labels": values})
    if steps:
        decision.append(_processing(fitted, steps))
    last = "Sigmoid()" if fitted.regions else "Softmax(1)"
    memory = str(networks.memory_format(len(fitted.patch)))
    return {
        "imports": ["$import glob", "$import functools", "$import runpy"],
        **start(f"$[{files}]"),
        "network_def": network_of(model, kwargs),
        "network": f"$torch.nn.Sequential(@network_def, torch.nn.{last}).to(@device, memory_format={memory})",
        "intensity": [intensity(how) for how in fitted.intensity],
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": keys, "ensure_channel_first": True},
                *joined,
                {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": [["L", "R"], ["P", "A"], ["I", "S"]]},
                {
                    "_target_": "Spacingd",
                    "keys": "image",
                    "pixdim": list(fitted.spacing),
                    "mode": "bilinear",
                    "padding_mode": "border",
                    "dtype": "$np.float32",
                },
                {
                    "_target_": "Lambdad",
                    "keys": "image",
                    "func": "$lambda x, scales=@intensity: torch.cat([scale(channel) for scale, channel in zip(scales, x.split(1))])",
                },
                # The margin is each channel's minimum, which SpatialPad cannot be told: infinity marks it, then it is filled.
                {"_target_": "SpatialPadd", "keys": "image", "spatial_size": list(fitted.volume_patch), "value": "$float('inf')"},
                {"_target_": "Lambdad", "keys": "image", "func": "$lambda x: torch.where(x.isinf(), x.amin((1, 2, 3), keepdim=True), x)"},
            ],
        },
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": {**window, "roi_size": list(fitted.patch), "sw_batch_size": 1, "overlap": 0.5, "mode": "gaussian"},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image", "nearest_interp": False},
                *decision,
                {
                    "_target_": "SaveImaged",
                    "keys": "pred",
                    "output_dir": "@output_dir",
                    "output_postfix": "seg",
                    "separate_folder": False,
                    "output_dtype": f"$np.{np.result_type(*(np.min_scalar_type(value) for value in (0, *values)))}",
                },
            ],
        },
        **evaluation(),
        "run": ["$@evaluator.run()"],
    }


def _processing(fitted: Fitted, steps: postprocess.Steps) -> dict:
    """The run's post-processing. MONAI's own transforms differ: its holes take in other classes, its small objects are values, not parts."""
    values = list(fitted.classes.values())
    every = {name: (tuple(values[i] for i in positions), values[written]) for name, (positions, written) in fitted.to_process.items()}
    chosen, structures = dict(enumerate(steps.values())), dict(enumerate(every[name] for name in steps))  # MONAI would read an @ in a name
    labels, voxel_ml = "x[0].cpu().numpy()", "abs(float(x.affine[:3, :3].double().det())) / 1000"
    return {
        "_target_": "Lambdad",
        "keys": "pred",
        "func": f"$lambda x, processed=runpy.run_path(@bundle_root + '/{_SCRIPT}')['processed']: "
        f"x * 0 + torch.as_tensor(processed({labels}, {chosen}, {structures}, {voxel_ml}), device=x.device)[None]",
    }


def _metadata(model: str, fitted: Fitted) -> dict[str, Any]:
    names = list(fitted.structures)
    tensor = {"type": "image", "spatial_shape": list(fitted.patch), "dtype": "float32", "value_range": [], "is_patch_data": True}
    ct = all(how["scheme"] == "ct" for how in fitted.intensity)
    return {
        "task": f"Segmentation of {', '.join(names)}",
        "description": f"{model}, trained by medssm on {', '.join(fitted.channels)} to segment {', '.join(names)}",
        "data_type": "nibabel",
        "pred_classes": ", ".join(f"{value} is {name}" for name, value in fitted.classes.items()),
        "network_data_format": {
            "inputs": {
                "image": {
                    **tensor,
                    "format": "hounsfield" if ct else "magnitude",
                    "modality": ", ".join(fitted.channels),
                    "num_channels": len(fitted.channels),
                    "channel_def": numbered(fitted.channels),
                }
            },
            "outputs": {"pred": {**tensor, "format": "labels", "num_channels": len(fitted.outputs), "channel_def": numbered(fitted.outputs)}},
        },
    }


def _readme(name: str, model: str, fitted: Fitted, steps: postprocess.Steps, requires: Mapping[str, str]) -> str:
    several = len(fitted.channels) > 1
    files = "CASE_0000.nii.gz, CASE_0001.nii.gz, ..., one for each channel" if several else "CASE.nii.gz"
    channels = "\n".join(
        f"| {i} | {channel} | {SCALED[how['scheme']]} |" for i, (channel, how) in enumerate(zip(fitted.channels, fitted.intensity, strict=True))
    )
    classes = "\n".join(f"| {value} | {label} |" for label, value in fitted.classes.items())
    spacing = " x ".join(f"{edge:g}" if edge else "the image's own" for edge in fitted.spacing)
    window = f"{' x '.join(map(str, fitted.patch))} voxels"
    if fitted.slice_axis is not None:
        window += f", slice by slice across axis {fitted.slice_axis}"
    processing = f"\nThen post-processing by {_SCRIPT}: {postprocess.described(steps)}." if steps else ""
    return f"""# {name}

{model}, trained by medssm. Segments {", ".join(fitted.structures)}. For research; not a medical device.

## Run
Needs MONAI with fire, {", ".join(f"{package} {number}" for package, number in requires.items())}. In this folder:

    python -m monai.bundle run --config_file configs/inference.json --meta_file configs/metadata.json --dataset_dir SCANS --output_dir LABELS

SCANS holds 3D NIfTI files ({files}); LABELS gets CASE{"_0000" if several else ""}_seg.nii.gz on each scan's own grid.

## What it does
Turned to RAS, resampled to {spacing} mm, scaled by channel, padded to the window; windows of {window}, half overlapping, gaussian weights;
probabilities resampled back, the largest taken.{processing}
These are the steps of `medssm predict` without mirroring, which besides averages folds, takes planes and four-dimensional files, and refuses voxels
that are not finite.

| channel | name | intensity |
|---|---|---|
{channels}

| label | class |
|---|---|
{classes}
"""


@torch.no_grad()
def _with_one_output(network: nn.Module, config: dict, fitted: Fitted) -> tuple[nn.Module, dict]:
    """The network and its keywords; where it gives a list (deep supervision), the same network built to give the finest logits alone."""
    kwargs, patch = dict(config["kwargs"]), torch.rand(1, len(fitted.channels), *fitted.patch, generator=torch.Generator().manual_seed(0))
    output = network.eval()(patch)
    if isinstance(output, torch.Tensor) and output.ndim == patch.ndim:
        return network, kwargs
    if "deep_supervision" in kwargs:
        kwargs["deep_supervision"] = False
        single = networks.build(config["model"], **kwargs).eval()
        weights = network.state_dict()
        missing = single.load_state_dict({key: weights[key] for key in single.state_dict() if key in weights}, strict=False).missing_keys
        if not missing and torch.equal(single(patch), finest_first(output, patch.ndim)[0]):
            return single, kwargs
    raise UserError(f"run: {config['model']} with {kwargs} gives several outputs; a bundle takes a network that gives one")
