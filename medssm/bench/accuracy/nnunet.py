"""nnU-Net's own network by its own plans, under the recipe of the comparison."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from medssm.errors import UserError, install_command
from medssm.files import read_json, write_json
from medssm.models.plans import inherited, read_plan

NAME = "nnunet"
PLANS = "nnUNetPlans.json"
_PLANNED = """
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments
extract_fingerprints([1], num_processes=1, check_dataset_integrity=False, clean=True, verbose=False)
plan_experiments([1])
"""


def options(dataset: Path, out: Path, dims: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """The network's lists, out of nnU-Net's plans: the file `given["plans"]`, else that in `out`, which nnU-Net's planner writes where it is missing.

    Raises UserError where nnU-Net is not installed, or the plans cannot be read.
    """
    strange = given.keys() - {"plans", "configuration"}
    if strange:
        raise UserError(f"models: {NAME}: expected plans=FILE or configuration=NAME, got {', '.join(sorted(strange))}")
    try:
        import dynamic_network_architectures  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"models: {NAME} needs nnU-Net: {install_command('nnunet')}") from error
    file = Path(given.get("plans", out / PLANS))
    if not file.is_file() and "plans" not in given:
        _plan(dataset, file)
    configuration = given.get("configuration", "2d" if dims == 2 else "3d_fullres")
    known = read_json(file).get("configurations", {})
    if configuration not in known:
        raise UserError(f"{file}: expected the configuration {configuration}, got {', '.join(known) or 'none'}")
    plan = read_plan(f"{file}: {configuration}", inherited(known, configuration))
    if len(plan.patch) != dims:
        raise UserError(f"{file}: {configuration} is a plan for {len(plan.patch)}D, expected one for {dims}D")
    return {"features": plan.features, "strides": plan.strides, "kernels": plan.kernels, "blocks": plan.blocks, "decoder_blocks": plan.decoder_blocks}


def build(
    *,
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    features: list[int],
    strides: list[list[int]],
    kernels: list[list[int]],
    blocks: list[int],
    decoder_blocks: list[int],
) -> nn.Module:
    """nnU-Net's PlainConvUNet with deep supervision: a list of logits, the finest first."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    network: nn.Module = PlainConvUNet(
        input_channels=in_channels,
        n_stages=len(features),
        features_per_stage=features,
        conv_op={2: nn.Conv2d, 3: nn.Conv3d}[spatial_dims],
        kernel_sizes=kernels,
        strides=strides,
        n_conv_per_stage=blocks,
        num_classes=out_channels,
        n_conv_per_stage_decoder=decoder_blocks,
        conv_bias=True,
        norm_op={2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[spatial_dims],
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )
    return network


def _plan(dataset: Path, file: Path) -> None:
    """Let nnU-Net plan for a data set in its layout, in a process and in folders of its own."""
    try:
        import nnunetv2  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"models: {NAME} needs nnunetv2 to plan, or plans=FILE: {install_command('nnunet')}") from error
    description = read_json(dataset / "dataset.json")
    with tempfile.TemporaryDirectory() as place:
        folders = {name: Path(place) / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        raw = folders["nnUNet_raw"] / "Dataset001_data"
        raw.mkdir(parents=True)
        for name in ("imagesTr", "labelsTr"):
            (raw / name).symlink_to((dataset / name).resolve())
        write_json(raw / "dataset.json", description)
        environment = os.environ | {name: str(folder) for name, folder in folders.items()}
        done = subprocess.run([sys.executable, "-c", _PLANNED], env=environment, capture_output=True, text=True)
        made = folders["nnUNet_preprocessed"] / "Dataset001_data" / PLANS
        if done.returncode or not made.is_file():
            raise UserError(f"models: {NAME}: nnU-Net did not plan for {dataset}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(made, file)
