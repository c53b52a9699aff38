"""Trials of the training recipe and of medssm_unet: each changes one thing, or joins changes, and is trained on the same patches of the same cases.

    python bench/accuracy_trials.py DATASET WORK [TRIAL...]

DATASET is a folder in nnU-Net's layout, WORK a folder for checkpoints and resampled cases; TRIAL is a name below, or NAME:SEED. Each finished trial
is a JSON file in bench/results/accuracy-trials: settings, held-out cases, the Dice of each of them, seconds, machine and commit. A trial that has one
is not run again; one that was stopped goes on from its checkpoint. In the end the table of docs/accuracy-trials.md is written from the files.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandScaleIntensityFixedMeand,
    RandSimulateLowResolutiond,
)
from torch import nn

from medssm import machine
from medssm.bench.networks import multiply_adds
from medssm.files import write_json
from medssm.nn.blocks import ConvBlock, DenseBlock
from medssm.segment import loop, networks, patches
from medssm.segment import train as training
from medssm.segment.data import FITTED, load_dataset, split
from medssm.segment.preprocess import Fitted
from medssm.segment.validation import Validation
from medssm.segment.volumes import load

RESULTS = Path(__file__).parent / "results" / "accuracy-trials"
PAGE, BEGIN, END = Path(__file__).parents[1] / "docs" / "accuracy-trials.md", "<!-- begin: bench/accuracy_trials.py -->", "<!-- end -->"
HEAD = """| trial | change | against | seed | anterior | posterior | mean Dice | difference | multiply-adds, G | parameters, M |
|---|---|---|---:|---:|---:|---:|---|---:|---:|"""
FOLD, FOLDS, STEPS = 0, 5, 300
SHARED: dict[str, Any] = {"fold": FOLD, "folds": FOLDS, "max_steps": STEPS, "batch": 2, "device": "cpu", "validations": 0}


@dataclass(frozen=True)
class Trial:
    """change: in words. options: of `medssm train`. edit: what is done to the network. patched: what else is changed while it trains."""

    change: str
    options: Mapping[str, Any] = field(default_factory=dict)
    edit: Callable[[nn.Module], None] = lambda network: None
    patched: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    against: str = "plain"


def replaced(kind: type[nn.Module], make: Callable[[Any], nn.Module], only: Callable[[str], bool] = lambda name: True) -> Callable[[nn.Module], None]:
    """An edit that puts make(layer) in the place of each layer of a kind whose name is one of `only`."""

    def edit(network: nn.Module) -> None:
        for name, module in list(network.named_modules()):
            for child_name, child in list(module.named_children()):
                if isinstance(child, kind) and only(f"{name}.{child_name}"):
                    setattr(module, child_name, make(child))

    return edit


def _poly(peak: float, done: loop.Progress, budget: loop.Budget) -> float:
    """nnU-Net's: peak * (1 - t)^0.9, with the warm-up of `train`."""
    return float(peak * min(1.0, (done.step + 1) / 20) * (1 - budget.fraction(done)) ** 0.9)


def _nnunet_intensity(spatial_dims: int) -> Compose:
    """nnU-Net's shares and ranges."""
    blur: dict[str, Any] = {f"sigma_{axis}": (0.5, 1.0) for axis in "xyz"[:spatial_dims]}
    linear = "bilinear" if spatial_dims == 2 else "trilinear"
    return Compose(
        [
            RandGaussianNoised("image", prob=0.1, std=0.3),
            RandGaussianSmoothd("image", prob=0.2, **blur),
            RandScaleIntensityd("image", prob=0.15, factors=0.25),
            RandScaleIntensityFixedMeand("image", prob=0.15, factors=0.25, preserve_range=True),
            RandSimulateLowResolutiond("image", prob=0.25, zoom_range=(0.5, 1.0), upsample_mode=linear),
            RandAdjustContrastd("image", prob=0.1, gamma=(0.7, 1.5), invert_image=True, retain_stats=True),
            RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
        ]
    )


@contextlib.contextmanager
def _nnunet_augmentation() -> Iterator[None]:
    with (
        mock.patch.object(patches, "_TURNED", 0.36),
        mock.patch.object(patches, "_DEGREES", 30),
        mock.patch.object(patches, "_ZOOM", (-0.3, 0.4)),
        mock.patch.object(patches, "_REACH", 1.4 * (math.cos(math.radians(30)) + math.sin(math.radians(30)))),
        mock.patch.object(patches, "_intensity_augmentation", _nnunet_intensity),
    ):
        yield


LARGE, SMALL = {"patch": (48, 64, 48)}, {"patch": (40, 56, 40)}
BASE = "mirror-0"
HALF = {"precision": "bf16-mixed"}
BASIC = {"model": "monai.networks.nets.BasicUNet", "model_kwargs": {"features": (16, 32, 64, 128, 256, 16)}}


def net(mirror: str = "0", **kwargs: Any) -> dict[str, Any]:
    """The small network without mixers, with strides that divide the patch of 40 x 56 x 40 voxels, in half precision, mirrored left-right alone."""
    return {**SMALL, **HALF, "mirror": mirror, "model_kwargs": {"size": "small", "strides": (1, 2, 2, 2, 1), "scans_from": 9, **kwargs}}


_instance = replaced(nn.BatchNorm3d, lambda norm: nn.InstanceNorm3d(norm.num_features, affine=True))
_dense = replaced(ConvBlock, lambda block: DenseBlock(block.conv.in_channels, block.conv.in_channels, 3))


TRIALS: dict[str, Trial] = {
    "plain": Trial("no mixers, AdamW at 0.001, every axis mirrored, bfloat16", net("0,1,2")),
    "lr-4": Trial("learning rate 0.004", {**net("0,1,2"), "lr": 4e-3}),
    "mirror-02": Trial("mirrored left-right and up-down", net("0,2")),
    "mirror-0": Trial("mirrored left-right alone", net()),
    "mirror-none": Trial("not mirrored", net("none"), against=BASE),
    "lr-3": Trial("learning rate 0.003", {**net(), "lr": 3e-3}, against=BASE),
    "deep": Trial("deep supervision", net(deep_supervision=True), against=BASE),
    "mixers-2": Trial("mixers (ss_nd) from stage 2 on", net(scans_from=2), against=BASE),
    "mixers-3": Trial("mixers (ss_nd) from stage 3 on", net(scans_from=3), against=BASE),
    "dense": Trial("full kernels in the coarse stages too", net(), _dense, against=BASE),
    "instance": Trial("instance norms in place of batch norms", net(), _instance, against=BASE),
    "all": Trial("learning rate 0.003, deep supervision, full kernels", {**net(deep_supervision=True), "lr": 3e-3}, _dense, against=BASE),
    "all-6": Trial("learning rate 0.006", {**net(deep_supervision=True), "lr": 6e-3}, _dense, against="all"),
    "all-mixers-3": Trial("mixers (ss_nd) from stage 3 on", {**net(deep_supervision=True, scans_from=3), "lr": 3e-3}, _dense, against="all"),
    "all-light": Trial(
        "one block in each stage, 128 channels in the last one",
        {**net(deep_supervision=True, features=(16, 32, 64, 128, 128), depths=1, decoder_depths=1), "lr": 3e-3},
        _dense,
        against="all",
    ),
    "all-nnunet": Trial(
        "augmentation as often and as strong as nnU-Net's", {**net(deep_supervision=True), "lr": 3e-3}, _dense, _nnunet_augmentation, against="all"
    ),
    "long": Trial("deep supervision, 1,500 steps", {**net(deep_supervision=True), "max_steps": 5 * STEPS}, against="deep"),
    "long-basic": Trial("MONAI's BasicUNet", {**SMALL, **HALF, **BASIC, "mirror": "0", "max_steps": 5 * STEPS}, against="long"),
    "long-mixers": Trial("mixers (ss_nd) as by default", {**net(deep_supervision=True, scans_from=None), "max_steps": 5 * STEPS}, against="long"),
    "long-3": Trial("learning rate 0.003", {**net(deep_supervision=True), "max_steps": 5 * STEPS, "lr": 3e-3}, against="long"),
    "deep-3": Trial("learning rate 0.003, deep supervision", {**net(deep_supervision=True), "lr": 3e-3}, against=BASE),
    "augment-none": Trial("no augmentation but mirroring", {**net(), "augment": False}, against=BASE),
    "augment-nnunet": Trial("augmentation as often and as strong as nnU-Net's", net(), patched=_nnunet_augmentation, against=BASE),
    "ema": Trial("moving average of the weights, decay 0.99", {**net(), "ema": 0.99}, against=BASE),
    "poly": Trial("learning rate falling as (1 - t)^0.9", net(), patched=lambda: mock.patch.object(loop, "learning_rate", _poly), against=BASE),
    "sgd": Trial("SGD, Nesterov momentum 0.99, learning rate 0.01", {**net(), "optimizer": "sgd", "weight_decay": 3e-5}, against=BASE),
    "batch-4": Trial("4 patches in a step, half the steps", {**net(), "batch": 4, "max_steps": STEPS // 2}, against=BASE),
    "batch-1": Trial("1 patch in a step, twice the steps", {**net(), "batch": 1, "max_steps": STEPS * 2}, against=BASE),
    "basic": Trial("MONAI's BasicUNet", {**SMALL, **HALF, **BASIC, "mirror": "0"}, against=BASE),
    "float32": Trial("float32", {**net(), "precision": "32-true"}, against=BASE),
    "large-patch": Trial("patch 48 x 64 x 48, the last stride 2", {**net(strides=(1, 2, 2, 2, 2)), **LARGE}, against=BASE),
}


def run(name: str, dataset: Path, work: Path, seed: int) -> dict[str, Any]:
    """Train and validate one trial."""
    trial = TRIALS[name]
    options = {**SHARED, **trial.options, "seed": seed}
    out = work / f"{name}-{seed}"
    table = load_dataset(dataset)
    held_out = split(table, FOLD, folds=FOLDS)[1]
    kwargs = {"spatial_dims": 3, "in_channels": len(table.channels), "out_channels": len(table.classes), **options.pop("model_kwargs", {})}
    torch.manual_seed(seed)
    network = networks.build(options.pop("model", "medssm_unet"), **kwargs)
    trial.edit(network)
    cut = [0.0]

    class Timed(patches.Patches):
        def __getitem__(self, index: int) -> dict[str, Any]:
            begun = time.perf_counter()
            patch = super().__getitem__(index)
            cut[0] += time.perf_counter() - begun
            return patch

    # The split is that of seed 0 in every trial; the seed is that of the weights and patches.
    splits = work / "splits.json"
    training_cases, validation_cases = ([case.name for case in part] for part in split(table, FOLD, folds=FOLDS))
    splits.write_text(json.dumps([{"train": training_cases, "val": validation_cases}]))
    resume = any((out / file).exists() for file in (loop.CHECKPOINT, networks.WEIGHTS))
    with trial.patched(), mock.patch.object(training, "Patches", Timed):
        result = training.train(
            dataset, out, model=network, splits=splits, cache=work / "cache", resume=resume, overwrite=not resume, quiet=True, **options
        )
    fitted = Fitted.load(out / FITTED)
    fabric = training.fabric_for("cpu", 1, "auto", "32-true")
    networks.load(out, network)
    network.eval()
    validation = Validation(held_out, load(held_out, table, fitted.spacing, work / "cache"), fitted, fabric)
    begun = time.perf_counter()
    mean = validation(network)
    return {
        "trial": name,
        "change": trial.change,
        "against": trial.against,
        "options": {key: value for key, value in options.items() if key != "quiet"},
        "network": kwargs,
        "seed": seed,
        "fold": FOLD,
        "folds": FOLDS,
        "training_cases": len(training_cases),
        "parameters": result["parameters"],
        "multiply_adds": multiply_adds(network, torch.zeros(1, len(table.channels), *fitted.patch)),
        "steps": result["steps"],
        "seconds": result["seconds"],
        "seconds_cutting_patches": round(cut[0], 2),
        "seconds_validating": round(time.perf_counter() - begun, 2),
        "dice": mean,
        "patients": {case.name: dice for case, dice in zip(held_out, validation.dice, strict=True)},
        "machine": machine.describe(),
        "commit": machine.commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def paired(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float, float]:
    """The mean over patients of the Dice of `one` less that of `other`, and its 95 % bootstrap interval."""
    names = sorted(one["patients"])
    a, b = (np.array([np.mean(list(r["patients"][name].values())) for name in names]) for r in (one, other))
    difference = a - b
    drawn = np.random.default_rng(0).integers(len(difference), size=(10_000, len(difference)))
    low, high = np.percentile(difference[drawn].mean(1), (2.5, 97.5))
    return float(difference.mean()), float(low), float(high)


def found() -> dict[tuple[str, int], dict[str, Any]]:
    results = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
    return {(r["trial"], r["seed"]): r for r in results}


def line(one: Mapping[str, Any], results: Mapping[tuple[str, int], Mapping[str, Any]]) -> str:
    """A row of the table."""
    base = results.get((one["against"], one["seed"])) if one["against"] != one["trial"] else None
    difference = "{:+.4f} ({:+.4f} to {:+.4f})".format(*paired(one, base)) if base else ""
    cells = [
        f"`{one['trial']}`",
        one["change"],
        f"`{one['against']}`" if base else "",
        str(one["seed"]),
        *(f"{value:.4f}" for value in one["dice"].values()),
        difference,
        f"{one['multiply_adds'] / 1e9:.2f}",
        f"{one['parameters'] / 1e6:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def main(words: Sequence[str]) -> None:
    """Run the trials that the command line names, or all, then write the table."""
    dataset, work, *names = words
    for folder in (RESULTS, Path(work)):
        folder.mkdir(parents=True, exist_ok=True)
    for word in names or TRIALS:
        name, _, number = word.partition(":")
        seed = int(number or 0)
        file = RESULTS / f"{name}-{seed}.json"
        if not file.exists():
            write_json(file, run(name, Path(dataset), Path(work), seed))
        print(line(found()[name, seed], found()), flush=True)
    results = found()
    order = [(name, seed) for name in TRIALS for seed in range(10) if (name, seed) in results]
    page = PAGE.read_text()
    before, rest = page.split(BEGIN, 1)
    table = "\n".join([HEAD, *(line(results[key], results) for key in order)])
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}")


if __name__ == "__main__":
    main(sys.argv[1:])
