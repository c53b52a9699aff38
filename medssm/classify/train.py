"""medssm train --task classify: fits a classifier of whole images to a folder of classes or a CSV.

The recipe: every image brought to one shape; light augmentation and mixup (`samples`); cross-entropy; AdamW with warm-up and a cosine over the
budget; then the temperature that calibrates it on the held-out groups (`calibration`).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import nn

from medssm.classify import calibration, report
from medssm.classify.figures import FIGURES
from medssm.classify.folds import split
from medssm.classify.images import Fitted, Images, Sizes, fit
from medssm.classify.loss import WeightedEntropy, balanced_weights
from medssm.classify.samples import Samples
from medssm.classify.scores import WRITTEN, save, scored
from medssm.classify.start import Start, teacher_for
from medssm.classify.table import Columns, Sample, classes_of, load_samples
from medssm.classify.validation import Validation
from medssm.errors import UserError
from medssm.models import list_models, model_facts
from medssm.segment import curves, networks, runs
from medssm.segment.data import FITTED
from medssm.segment.distil import Distillation
from medssm.segment.images import check_nan
from medssm.segment.intensity import SCHEMES
from medssm.segment.loop import CHECKPOINT, LOG, Budget, Loop
from medssm.segment.processes import launch, over_processes
from medssm.segment.progress import progress
from medssm.segment.runs import CURVES, REPORT
from medssm.segment.train import axes_to_mirror, fabric_for, optimizer_for, workers_for
from medssm.tasks import CLASSIFY

_STEPS, _LEARNING_RATES = 1000, {"adamw": 1e-3, "sgd": 1e-2}
_BATCH = {2: 32, 3: 4}
_CURVES = ("loss (cross-entropy)", "balanced accuracy of the held-out images")


@over_processes
def train(
    dataset: Path | str,
    out: Path | str,
    *,
    task: Literal["segment", "classify"] = "classify",
    path_column: str | None = None,
    label_column: str | None = None,
    group_column: str | None = None,
    group: str | None = None,
    fold: int | None = 0,
    folds: int = 5,
    shape: Sequence[int] | None = None,
    sizes: Sizes = "resize",
    spacing: Sequence[float] | None = None,
    modality: Sequence[Literal["ct", "mri", "other", "none", "picture"]] | None = None,
    nan: float | None = None,
    augment: bool = True,
    mirror: str | Sequence[int] = "auto",
    rotate: float = 15.0,
    mixup: float = 0.0,
    model: str | nn.Module = "vmamba",
    model_kwargs: Mapping[str, Any] | None = None,
    size: str | None = None,
    spatial_dims: Literal[2, 3] | None = None,
    start: Path | str | Start | None = None,
    distil: Path | str | None = None,
    max_steps: int | None = None,
    max_seconds: float | None = None,
    batch: int | None = None,
    lr: float | None = None,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    weight_decay: float = 5e-2,
    clip: float = 1.0,
    ema: float | None = None,
    class_weights: Literal["balanced", "none"] = "none",
    smoothing: float = 0.0,
    validations: int = 4,
    seed: int = 0,
    device: str = "auto",
    devices: int | str = 1,
    strategy: str = "auto",
    rank_timeout: float = 1800.0,
    precision: str = "auto",
    workers: int | None = None,
    save_seconds: float = 60.0,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train a classifier of images on a folder of classes or a CSV, and write the weights and all that belongs to them into a folder.

    The folder gets config.json and model.safetensors (the network), fitted.json (what was fitted to the data), train.yaml (these arguments, for
    `medssm train --config`), cases.json (the images that were trained on and held out), metrics.jsonl, curves.png and report.html; where images are
    held out also model_best.safetensors (the weights with the best validation), calibration.json (the temperature), figures.json and predictions.csv
    (what was found in the held-out images).

    Args: Data
        dataset: folder with a subfolder for each class, or with one CSV that lists its images; or such a CSV
        out: folder for the weights
        task: classify; segment is medssm train without this option
        path_column: of a CSV (default: path, file, image or another usual name)
        label_column: of a CSV (default: label, class, diagnosis or another usual name)
        group_column: of a CSV (default: group, patient, subject or another usual name): images with one group are never on two sides of a split
        group: regular expression whose first group in an image's path is its group, as in '(sub-[0-9]+)'; it comes before a CSV's column
        fold: the part of the groups to hold out, to validate on and to calibrate with; null trains on all
        folds: number of parts; each has about the same share of every class
        shape: voxels along each axis that every image is brought to (default: the median, at most 128^2 or 64^3 on a CPU, 256^2 or 112^3 on a GPU)
        sizes: resize an image to `shape`, or pad and crop it about its middle, at its own scale
        spacing: millimetres along the RAS axes to resample to before (default: each image's own)
        modality: of the images, one or one for each channel; it says how intensities are scaled (default: picture for PNG, JPEG and TIFF, else
            mri)
        nan: number that takes the place of voxels that are not finite (default: such an image is an error)
        augment: turn, zoom and move images, add noise, blur, change brightness and contrast, at random
        mirror: axes to mirror at random: auto, none, or some of 0 (left-right), 1 (front-back), 2 (up-down) as in 0,1; auto is left-right, of
            pictures every axis, without left-right where a class has a side or a number for a name
        rotate: degrees that an image is turned by, at most
        mixup: mix pairs of images by shares from Beta(x, x), as 0.2; 0 mixes none
    Args: Network
        model: one of `medssm models`, of one that segments its encoder; one of timm's as timm:resnet18; one of MONAI's as monai.networks.nets.NAME;
            in Python also a module that gives logits (b, classes)
        model_kwargs: more keywords for the model's constructor
        size: the model's size, where it has several, as tiny, small or base
        spatial_dims: 2 for planes, 3 for volumes (default: what the images are)
        start: folder of a finished training to begin with: its network and weights, shape, spacing, mirrored axes and intensities take the place of
            new ones
        distil: folder of a finished training whose network, the teacher, is learnt from beside the labels (docs/guides/compress.md)
    Args: Optimisation
        max_steps: training steps (default: 1000 where `max_seconds` is not given)
        max_seconds: seconds of training steps, all resumptions together; reading and validating are not counted
        batch: images in a step, for each process (default: 32 in 2D, 4 in 3D)
        lr: the largest learning rate (default: 0.001 for adamw, 0.01 for sgd)
        optimizer: AdamW, or SGD with Nesterov momentum 0.99
        weight_decay: of layers' weights
        clip: largest norm of the gradients
        ema: decay of an exponential moving average of the weights, as 0.99, which is then what is validated and kept (default: no average)
        class_weights: balanced weighs a class by one over its images
        smoothing: of the labels, 0 to less than 1
        validations: how often the held-out images are classified, evenly over the training
        seed: of the folds and of the random numbers
    Args: Machine
        device: auto, cpu, cuda, cuda:1 or mps
        devices: number of processes or GPUs
        strategy: Lightning's, for several devices, as in ddp
        rank_timeout: seconds after which a process that waits for another one ends
        precision: Lightning's, as in 32-true, bf16-mixed; auto is bf16-mixed on CUDA (16-mixed before Ampere) and on a CPU with AMX, else 32-true
        workers: processes that read and augment images (default: 0 on a CPU, 4 on a GPU)
        save_seconds: time between checkpoints
        resume: go on from the checkpoint in `out`; a finished training is returned as it is
        overwrite: train anew in a folder that has a training

    Returns:
        What was trained, for how long, and on the held-out images the recall of each class, the figures with intervals over groups, and the
        temperature.

    Raises:
        UserError: for what the caller can mend.
        loop.Interrupted: a KeyboardInterrupt, after Ctrl-C or SIGTERM; the training is saved.
    """
    arguments = {name: value for name, value in locals().items() if name not in ("resume", "overwrite", "quiet")}
    out = Path(out)
    if task != CLASSIFY:
        raise UserError(f"task: expected classify, got {task!r} (medssm.segment.train trains a network that segments)")
    before = runs.finished(out, reads=(dataset,), written=WRITTEN, resume=resume, overwrite=overwrite, max_steps=max_steps, quiet=quiet)
    if before:
        return before
    for argument, folder in (("start", start), ("distil", distil)):
        if isinstance(folder, (str, Path)):
            networks.check_run(Path(folder), argument, CLASSIFY)
    begun = Start.of(Path(start)) if isinstance(start, (str, Path)) else start
    if begun:
        begun.check_trainable("start")
    _check_arguments(spatial_dims, shape, mixup, smoothing, rotate)
    runs.check_recipe(
        optimizer=optimizer,
        optimizers=_LEARNING_RATES,
        spacing=spacing,
        ema=ema,
        weight_decay=weight_decay,
        max_steps=max_steps,
        max_seconds=max_seconds,
        batch=batch,
        lr=lr,
        clip=clip,
        rank_timeout=rank_timeout,
    )
    check_nan(nan)
    if max_steps is None and max_seconds is None:
        max_steps = _STEPS
    lr = lr or _LEARNING_RATES[optimizer]
    samples, said = load_samples(dataset, Columns(path_column, label_column, group_column), group)
    if begun:
        begun.check(samples)
    training, held_out = split(samples, fold, folds, seed)
    fabric = fabric_for(device, devices, strategy, precision)
    launch(fabric, out, rank_timeout)
    quiet = quiet or not fabric.is_global_zero
    with progress("reading", quiet) as show_reading:
        fitted = (
            begun.fitted
            if begun
            else fit(
                training,
                classes_of(samples),
                spatial_dims=spatial_dims,
                shape=shape,
                sizes=sizes,
                spacing=spacing,
                mirror=axes_to_mirror(mirror),
                modality=modality,
                nan=nan,
                gpu=fabric.device.type != "cpu",
                seed=seed,
                show=show_reading,
            )
        )
        images, others = Images(training, fitted, nan, show_reading), Images(held_out, fitted, nan, show_reading)
    dims = len(fitted.shape)
    batch = batch or _BATCH[dims]
    labels = [fitted.classes.index(str(sample.label)) for sample in training]
    weights = balanced_weights(labels, len(fitted.classes)) if class_weights == "balanced" else None

    torch.manual_seed(seed)
    sizes_of = {"in_channels": len(fitted.channels), "out_channels": len(fitted.classes)}
    kwargs = {"spatial_dims": dims, **sizes_of, **(model_kwargs or {}), **({} if size is None else {"size": size})}
    chosen_model = model if isinstance(model, nn.Module) else _by_task(model)
    if begun:
        network, config = begun.network, begun.config
    else:
        network = model if isinstance(model, nn.Module) else networks.build(str(chosen_model), **kwargs)
        config = networks.describe(chosen_model, kwargs)
    network = networks.placed(network, fabric.device, dims)
    networks.check_classifier(network, fitted.shape, **sizes_of, device=fabric.device)
    criterion: nn.Module = WeightedEntropy(weights, smoothing)
    if distil is not None:
        teacher = networks.placed(teacher_for(Path(distil), fitted, held_out), fabric.device, dims)
        criterion = Distillation(criterion, network, teacher)
    loop = Loop(
        fabric,
        network,
        optimizer_for(optimizer, network, lr, weight_decay),
        Samples(images, labels, seed=seed, augment=augment, rotate=rotate, mixup=mixup),
        criterion,
        out,
        batch=batch,
        lr=lr,
        clip=clip,
        budget=Budget(max_steps, max_seconds),
        seed=seed,
        workers=workers_for(workers, fabric.device),
        save_seconds=save_seconds,
        ema=ema,
        settings={
            "model": config,
            "distil": None if distil is None else str(Path(distil).resolve()),
            "images": [[sample.name, sample.label] for sample in training],
            **dataclasses.asdict(fitted),
            "batch": batch,
            "lr": lr,
            "optimizer": optimizer,
            "weight_decay": weight_decay,
            "clip": clip,
            "ema": ema,
            "augment": augment,
            "rotate": rotate,
            "mixup": mixup,
            "smoothing": smoothing,
            "class_weights": class_weights,
            "seed": seed,
            "processes": fabric.world_size,
            "precision": fabric.strategy.precision.precision,
        },
    )
    validate = Validation(others, fabric, torch.float16 if fabric.device.type == "cuda" else None, batch)
    chosen = _chosen(fitted, fabric, training, held_out, said, max_steps, max_seconds, batch, validations, ema, class_weights, images)
    if not quiet:
        runs.say(chosen)
    name = config["model"] or config["class"]
    arguments |= {"model": name, "max_steps": max_steps, "batch": batch, "lr": lr, "start": None if isinstance(start, Start) else start}
    cases = {"training": _files(training), "validation": _files(held_out)}
    runs.begin(loop, arguments, cases, resume=resume, written=WRITTEN)
    if fabric.is_global_zero:
        fitted.save(out / FITTED)

    def validated(show: Callable[[str], None]) -> dict[str, float]:
        return validate(loop.trained, show)

    found = runs.learn(loop, f"training {name.rpartition('.')[2]}", validated, max(1, validations) if held_out else 0, quiet, _CURVES)
    result: dict[str, Any] = {
        "out": str(out),
        "task": CLASSIFY,
        "model": name,
        "parameters": sum(p.numel() for p in network.parameters()),
        "classes": list(fitted.classes),
        "images": len(training),
        "groups": len({sample.unit for sample in training}),
        "validation_images": len(held_out),
        "validation_groups": len({sample.unit for sample in held_out}),
        "steps": loop.done.step,
        "seconds": round(loop.done.seconds, 2),
        "lr": lr,
        "shape": list(fitted.shape),
        "validation": found,
        "best": loop.best,
    }
    raw = calibrated = np.zeros((0, len(fitted.classes)))
    if found:
        temperatures = {"last": calibration.temperature(validate.logits, validate.labels)}
        temperatures["best"] = temperatures["last"] if loop.best["step"] == loop.done.step else _of_best(out, network, validate)
        scores = scored(held_out, validate.logits, validate.labels, seed)
        raw, calibrated = scores.raw, scores.calibrated
        result |= {"temperature": temperatures["last"], **scores.table}
    if fabric.is_global_zero:
        if found:
            save(out, scores, held_out, fitted.classes, temperatures)
        loop.log({"finished": result})
        networks.save(out, loop.trained, config)
        (out / CHECKPOINT).unlink(missing_ok=True)
        with curves.said_if_it_fails(out / REPORT):
            curves.draw(out / LOG, out / CURVES, _CURVES)
            report.write(out / REPORT, {"figures": None, **result}, chosen, runs.kept(arguments), out / CURVES, held_out, raw, calibrated, nan)
    return result


def show(result: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Print what was trained, and how well it classifies the held-out images."""
    print(f"{result['model']}: {result['parameters']:,} parameters, {result['steps']} steps in {result['seconds']:.0f} s")
    if result["validation"]:
        print(f"{result['validation_images']} held-out image(s) of {result['validation_groups']} group(s): {described(result['figures'])}")
        print(f"temperature {result['temperature']:.3f}: ECE {result['uncalibrated']['ece']:.3f} before it")
        if result["best"]["step"] < result["steps"]:
            print(f"the best validation was {result['best']['mean']:.3f} at step {result['best']['step']:,} (predict --weights best)")
    print(f"written: {result['out']}")


def described(values: Mapping[str, Mapping[str, float | None]]) -> str:
    """The figures in a line, with their intervals."""
    parts = []
    for key, name in FIGURES.items():
        value, low, high = (values[key][part] for part in ("value", "low", "high"))
        interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
        parts.append(f"{name} {'-' if value is None else f'{value:.3f}'}{interval}")
    return ", ".join(parts)


def _of_best(out: Path, network: nn.Module, validate: Validation) -> float:
    """The temperature of the weights with the best validation."""
    best = networks.load_weights(out / networks.BEST, copy.deepcopy(network)).eval()
    return calibration.temperature(validate.classified(best), validate.labels)


def _by_task(model: str) -> str:
    """The model's name, as encoder:NAME where it is one of medssm's that segments."""
    return f"{networks.ENCODER}{model}" if model in list_models() and model_facts(model).task == "segment" else model


def _check_arguments(spatial_dims: int | None, shape: Sequence[int] | None, mixup: float, smoothing: float, rotate: float) -> None:
    if spatial_dims not in (None, 2, 3):
        raise UserError(f"spatial_dims: expected 2 or 3, got {spatial_dims}")
    if shape is not None and (len(shape) != (spatial_dims or len(shape)) or len(shape) not in (2, 3) or min(shape) < 1):
        raise UserError(f"shape: expected {spatial_dims or '2 or 3'} numbers of voxels, got {tuple(shape)}")
    for name, value, most in (("mixup", mixup, math.inf), ("smoothing", smoothing, 1.0), ("rotate", rotate, 180.1)):
        if not 0 <= value < most:
            raise UserError(f"{name}: expected 0 or more{'' if most == math.inf else f' and less than {most:g}'}, got {value}")


def _chosen(
    fitted: Fitted,
    fabric: Fabric,
    training: Sequence[Sample],
    held_out: Sequence[Sample],
    said: Sequence[str],
    max_steps: int | None,
    max_seconds: float | None,
    batch: int,
    validations: int,
    ema: float | None,
    class_weights: str,
    images: Images,
) -> dict[str, str]:
    """What will be trained, a line each: what was found, fitted or chosen."""
    axes = ("left-right", "front-back", "up-down")
    how = "resized" if fitted.sizes == "resize" else "padded and cropped about the middle"
    at = f"resampled to {' x '.join(f'{edge:g}' for edge in fitted.spacing)} mm, " if fitted.spacing else ""
    budget = " or ".join([*([f"{max_steps:,} steps"] if max_steps else []), *([f"{max_seconds:g} s"] if max_seconds else [])])
    scaled = ", ".join(f"{name} {SCHEMES[how['scheme']]}" for name, how in zip(fitted.channels, fitted.intensity, strict=True))
    return {
        "device": f"{fabric.device}, {fabric.world_size} process(es), {fabric.strategy.precision.precision}",
        **dict(line.split(": ", 1) for line in said),
        "trained on": _counted(training, fitted.classes),
        "held out": f"{_counted(held_out, fitted.classes)}; validated {max(1, validations)} times"
        if held_out
        else "nothing: no validation, no temperature",
        "intensities": scaled,
        "shape": f"{' x '.join(map(str, fitted.shape))} voxels; images of other shapes are {at}{how}",
        "memory": "all images" if images.kept is not None else "none: each image is read when it is needed",
        "mirrored": ", ".join(axes[axis] for axis in fitted.mirror) or "none",
        "budget": f"{budget}, {batch} image(s) in a step",
        **({"weights": "the loss weighs a class by one over its images"} if class_weights == "balanced" else {}),
        **({} if ema is None else {"average": f"validated and kept is the weights' moving average, with the decay {ema:g}"}),
    }


def _counted(samples: Sequence[Sample], classes: Sequence[str]) -> str:
    """The number of images, that of their groups, and that of each class."""
    counts = Counter(sample.label for sample in samples)
    groups = f" of {len({sample.group for sample in samples})} groups" if samples[0].group is not None else ""
    return f"{len(samples)} images{groups} ({', '.join(f'{name} {counts[name]}' for name in classes)})"


def _files(samples: Sequence[Sample]) -> list[dict[str, str]]:
    """Each image by its file, its class, and its group where that is known."""
    return [
        {"name": sample.name, "image": str(sample.path.resolve()), "label": str(sample.label)}
        | ({} if sample.group is None else {"group": sample.group})
        for sample in samples
    ]
