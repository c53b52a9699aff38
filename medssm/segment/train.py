"""medssm train: a thin recipe that fits a network to a folder of labelled images.

The recipe: RAS and the median spacing; intensities by modality (`preprocess`); patches, a third of them centred on a class drawn evenly
among the case's (`patches`); light augmentation; Dice plus cross-entropy with deep supervision where the network has it (`losses`);
AdamW with warm-up and a cosine over the budget; gradients clipped. There is no search for a better recipe and no ensembling of
configurations: that is nnU-Net's work.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.fabric import Fabric
from torch import nn

from medssm.errors import UserError
from medssm.segment import curves, networks, postprocess, report, runs
from medssm.segment.cases import Case
from medssm.segment.data import FITTED, load_dataset, split
from medssm.segment.distil import Distillation, teacher_for
from medssm.segment.fit import fit
from medssm.segment.images import check_nan
from medssm.segment.intensity import SCHEMES
from medssm.segment.loop import CHECKPOINT, LOG, Budget, Loop
from medssm.segment.losses import RegionLoss, SegmentationLoss
from medssm.segment.patches import Patches
from medssm.segment.preprocess import Fitted
from medssm.segment.processes import launch, over_processes
from medssm.segment.runs import CURVES, REPORT
from medssm.segment.stages import open_stages, strides_and_kernels, supervised
from medssm.segment.start import Start
from medssm.segment.uncertainty import conformal
from medssm.segment.validation import Validation
from medssm.segment.volumes import load

_STEPS = 1000
_WRITTEN = (postprocess.POSTPROCESSING, conformal.CONFORMAL)
_LEARNING_RATES = {"adamw": 1e-3, "sgd": 1e-2}


@over_processes
def train(
    dataset: Path | str,
    out: Path | str,
    *,
    task: Literal["segment", "classify"] = "segment",
    model: str | nn.Module = "medssm_unet",
    model_kwargs: Mapping[str, Any] | None = None,
    size: str | None = None,
    mixer: str | None = None,
    spatial_dims: Literal[2, 3] = 3,
    start: Path | str | Start | None = None,
    distil: Path | str | None = None,
    fold: int | None = None,
    folds: int = 5,
    splits: Path | str | None = None,
    group: str | None = None,
    spacing: Sequence[float] | None = None,
    patch: Sequence[int] | None = None,
    mirror: str | Sequence[int] = "auto",
    modality: Sequence[Literal["ct", "mri", "other", "none"]] | None = None,
    foreground: float = 1 / 3,
    augment: bool = True,
    nan: float | None = None,
    cache: Path | str | None = None,
    max_steps: int | None = None,
    max_seconds: float | None = None,
    batch: int | None = None,
    lr: float | None = None,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    weight_decay: float = 1e-2,
    clip: float = 12.0,
    ema: float | None = None,
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
    """Train a network on a data set, and write the weights and all that belongs to them into a folder.

    The folder gets config.json and model.safetensors (the network), fitted.json (what was fitted to the data), train.yaml (these arguments, for
    `medssm train --config`), cases.json (the files that were trained on and held out), metrics.jsonl, curves.png, drawn anew every minute, and at the
    end report.html; where cases are held out also model_best.safetensors (the weights with the best validation), postprocessing.json (what raised
    the Dice on these cases) and conformal.json (their volumes as found and in the references, for the intervals of predict).

    Args: Data
        dataset: folder with dataset.json (nnU-Net), or a MONAI datalist's JSON file
        out: folder for the weights
        task: segment, or classify, which takes a folder of classes or a CSV and has options of its own: medssm train --task classify --help
        fold: the part of the cases to hold out and validate on (default: train on all)
        folds: number of parts, where neither `splits` nor a datalist names them
        splits: nnU-Net's splits_final.json
        group: regular expression whose first group in a case's name is the patient, as in '(sub-[0-9]+)': all cases of a patient are on one side of a
            fold (default: the entry patient of a datalist, or every case is one)
        spacing: millimetres along the RAS axes (default: the training cases' median)
        patch: voxels along each axis (default: shaped like the median case, at most 64^3 on a CPU, 112^3 on a GPU)
        mirror: axes to mirror at random: auto, none, swap, or some of 0 (left-right), 1 (front-back), 2 (up-down) as in 0,1; auto is 0, of pictures
            all, without 0 where a class has a side or a number for a name; swap is auto with 0, and exchanges classes such as left and right kidney
        modality: of the images, one or one for each channel; it says how intensities are scaled (default: by the channel's name, as CT or T1)
        foreground: share of the patches that are centred on a class
        augment: rotate, zoom, blur patches, add noise, change brightness and contrast, at random
        nan: number that takes the place of voxels that are not finite (default: such an image is an error)
        cache: folder for the resampled cases (default: keep them in memory)
    Args: Network
        model: one of `medssm models`, or one of MONAI's as monai.networks.nets.NAME; in Python also a module that gives logits
            (b, classes, *spatial), or with deep supervision a list of them
        model_kwargs: more keywords for the model's constructor, as deep_supervision, which is true where a network of ours has it
        size: the model's size, where it has several, as tiny, small or base
        mixer: the mixer of a model that has several, as medssm_unet; docs/mixers.md compares them
        spatial_dims: 2 trains on slices
        start: folder of a finished training to begin with: its network and weights, spacing, patch, mirrored axes and intensities take the place of
            what is said of these here; the data must have its channels and classes
        distil: folder of a finished training whose network, the teacher, is learnt from beside the labels (docs/guides/compress.md)
    Args: Optimisation
        max_steps: training steps (default: 1000 where `max_seconds` is not given)
        max_seconds: seconds of training steps, all resumptions together; reading and validating are not counted
        batch: patches in a step, for each process (default: 2 in 3D, 12 in 2D)
        lr: the largest learning rate (default: 0.001 for adamw, 0.01 for sgd)
        optimizer: AdamW, or SGD with Nesterov momentum 0.99
        weight_decay: of layers' weights; biases, norms, a scan's rates and embeddings of positions have none
        clip: largest norm of the gradients
        ema: decay of an exponential moving average of the weights, as 0.999, which is then what is validated and kept (default: no average)
        validations: how often the held-out cases are segmented, evenly over the training
        seed: of the random numbers
    Args: Machine
        device: auto, cpu, cuda, cuda:1 or mps
        devices: number of processes or GPUs
        strategy: Lightning's, for several devices, as in ddp
        rank_timeout: seconds after which a process that waits for another one ends
        precision: Lightning's, as in 32-true, 16-mixed; auto is bf16-mixed on CUDA (16-mixed before Ampere) and on a CPU with AMX, else 32-true
        workers: processes that cut patches (default: 0 on a CPU, 4 on a GPU)
        save_seconds: time between checkpoints
        resume: go on from the checkpoint in `out`; a finished training is returned as it is
        overwrite: train anew in a folder that has a training

    Returns:
        What was trained, for how long, and the validation's Dice by class.

    Raises:
        UserError: for what the caller can mend.
        loop.Interrupted: a KeyboardInterrupt, after Ctrl-C or SIGTERM; the training is saved.
    """
    arguments = {name: value for name, value in locals().items() if name not in ("resume", "overwrite", "quiet")}
    out = Path(out)
    before = runs.finished(out, reads=(dataset, splits), written=_WRITTEN, resume=resume, overwrite=overwrite, max_steps=max_steps, quiet=quiet)
    if before:
        return before
    if task != "segment":
        raise UserError(f"task: expected segment, got {task!r} (medssm.classify.train.train trains a classifier)")
    for argument, folder in (("start", start), ("distil", distil)):
        if isinstance(folder, (str, Path)):
            networks.check_run(Path(folder), argument, "segment")
    begun = Start.of(Path(start)) if isinstance(start, (str, Path)) else start
    if begun:
        begun.check_trainable("start")
        spatial_dims = cast(Literal[2, 3], len(begun.fitted.patch))
    _check_arguments(spatial_dims, None if begun else patch, foreground)
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
    batch = batch or (2 if spatial_dims == 3 else 12)
    lr = lr or _LEARNING_RATES[optimizer]
    table = load_dataset(dataset)
    training, validation = split(table, fold, folds=folds, splits=splits, group=group, seed=seed)
    fabric = fabric_for(device, devices, strategy, precision)
    launch(fabric, out, rank_timeout)
    quiet = quiet or not fabric.is_global_zero
    asked = {"spatial_dims": spatial_dims, **(model_kwargs or {}), **_given(size=size, mixer=mixer)}
    stages, heads = (None, {}) if begun else (open_stages(model, asked), supervised(model, asked))

    if begun:
        begun.check(table)
        fitted, volumes = begun.fitted, begun.volumes(training, load(training, table, begun.fitted.spacing, cache, nan), seed)
    else:
        fitted, volumes = fit(
            table,
            training,
            spatial_dims=spatial_dims,
            spacing=spacing,
            patch=patch,
            mirror=axes_to_mirror(mirror),
            modality=modality,
            nan=nan,
            cache=cache,
            seed=seed,
            fabric=fabric,
            quiet=quiet,
            stages=stages,
        )
    held_out = validation[fabric.global_rank :: fabric.world_size]
    validate = Validation(held_out, load(held_out, table, fitted.spacing, cache, nan), fitted, fabric)

    torch.manual_seed(seed)
    sizes = {"in_channels": len(fitted.channels), "out_channels": len(fitted.outputs)}
    strides = {} if stages is None else {"strides": strides_and_kernels(fitted.patch, fitted.patch_spacing, stages)[0]}
    kwargs = {**sizes, **asked, **strides, **heads}
    if begun:
        network, config = begun.network, begun.config
    else:
        network, config = model if isinstance(model, nn.Module) else networks.build(model, **kwargs), networks.describe(model, kwargs)
    network = networks.placed(network, fabric.device, spatial_dims)
    networks.check_patch(network, fitted.patch, **sizes, device=fabric.device)
    settings = {
        "model": config,
        "cases": [str(case.label_file.resolve()) for case in training],
        **dataclasses.asdict(fitted),
        "batch": batch,
        "lr": lr,
        "optimizer": optimizer,
        "weight_decay": weight_decay,
        "clip": clip,
        "ema": ema,
        "foreground": foreground,
        "augment": augment,
        "distil": None if distil is None else str(Path(distil).resolve()),
        "seed": seed,
        "processes": fabric.world_size,
        "precision": fabric.strategy.precision.precision,
    }
    chosen = _chosen(fitted, fabric, training, validation, max_steps, max_seconds, batch, validations, ema)
    if not quiet:
        runs.say(chosen)
    patches = Patches(volumes, fitted, seed=seed, foreground=foreground, augment=augment)
    criterion = criterion_for(fitted)
    if distil is not None:
        teacher = networks.placed(teacher_for(Path(distil), fitted, validation), fabric.device, spatial_dims)
        criterion = Distillation(criterion, network, teacher)
    loop = Loop(
        fabric,
        network,
        optimizer_for(optimizer, network, lr, weight_decay),
        patches,
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
        settings=settings,
    )
    name = config["model"] or config["class"]
    arguments |= {"model": name, "max_steps": max_steps, "batch": batch, "lr": lr, "start": None if isinstance(start, Start) else start}
    cases = {"training": _files(training), "validation": _files(validation)}
    runs.begin(loop, arguments, cases, resume=resume, written=_WRITTEN)
    if fabric.is_global_zero:
        fitted.save(out / FITTED)

    def validated(show: Callable[[str], None]) -> dict[str, float]:
        return validate(loop.trained, show, last=loop.budget.fraction(loop.done) >= 1)

    dice = runs.learn(loop, f"training {name.rpartition('.')[2]}", validated, validations if validation else 0, quiet)
    steps, gain = validate.postprocessing() if dice else ({}, {})
    rows = validate.rows() if dice else []
    held_out_volumes = validate.volumes(steps) if dice and fitted.ignore is None else {}  # a volume with voxels of no label is not known
    of_best = None
    if dice and loop.best["step"] != loop.done.step:
        validate(networks.load_weights(out / networks.BEST, copy.deepcopy(loop.trained)))
        of_best = validate.postprocessing()
    result = {
        "out": str(out),
        "model": name,
        "parameters": sum(p.numel() for p in network.parameters()),
        "cases": len(training),
        "validation_cases": len(validation),
        "steps": loop.done.step,
        "seconds": round(loop.done.seconds, 2),
        "lr": lr,
        "spacing": list(fitted.spacing),
        "patch": list(fitted.patch),
        "validation": dice,
        "best": loop.best,
        "postprocessing": steps,
    }
    if fabric.is_global_zero:
        if dice:
            postprocess.save(out / postprocess.POSTPROCESSING, steps, gain, of_best)
        if held_out_volumes:
            conformal.save(out / conformal.CONFORMAL, held_out_volumes)
        loop.log({"finished": result})
        networks.save(out, loop.trained, config)
        (out / CHECKPOINT).unlink(missing_ok=True)
        with curves.said_if_it_fails(out / REPORT):
            curves.draw(out / LOG, out / CURVES)
            report.write(out / REPORT, result, chosen, runs.kept(arguments), out / CURVES, rows, training)
    return result


def show(result: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Print what was trained."""
    held_out, dice = result["validation_cases"], result["validation"]
    found = f", mean Dice {dice['mean']:.3f} on {held_out} held-out case(s)" if dice else ""
    if dice and result["best"]["step"] < result["steps"]:
        found += f"; the best one was {result['best']['mean']:.3f} at step {result['best']['step']:,} (predict --weights best)"
    print(f"{result['model']}: {result['parameters']:,} parameters, {result['steps']} steps in {result['seconds']:.0f} s{found}")
    if dice:
        print(f"post-processing that raises it: {postprocess.described(result['postprocessing'])}")
    print(f"written: {result['out']}")


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _check_arguments(spatial_dims: int, patch: Sequence[int] | None, foreground: float) -> None:
    if spatial_dims not in (2, 3):
        raise UserError(f"spatial_dims: expected 2 or 3, got {spatial_dims}")
    if patch is not None and (len(patch) != spatial_dims or min(patch) < 1):
        raise UserError(f"patch: expected {spatial_dims} numbers of voxels, got {tuple(patch)}")
    if not 0 <= foreground <= 1:
        raise UserError(f"foreground: expected 0 to 1, got {foreground}")


def criterion_for(fitted: Fitted) -> nn.Module:
    """The loss of a network's outputs for classes, or for regions."""
    if fitted.regions:
        return RegionLoss(list(fitted.structures.values()), len(fitted.classes))
    return SegmentationLoss(fitted.ignore is not None)


def fabric_for(device: str, devices: int | str, strategy: str, precision: str) -> Fabric:
    """Lightning's Fabric for a device and a precision; `auto` is `_fast_precision`. Raises UserError for what it refuses."""
    accelerator, _, number = device.partition(":")
    chosen: list[int] | int | str = [int(number)] if number.isdigit() else number or devices
    if precision == "auto":
        precision = _fast_precision(accelerator)
    before = logging.root.manager.disable
    logging.disable(logging.INFO)  # Lightning's line about half precision: `_chosen` says it
    try:
        return Fabric(accelerator=accelerator, devices=chosen, strategy=strategy, precision=cast(Any, precision))
    except (RuntimeError, ValueError, TypeError) as error:  # Lightning's MisconfigurationException is none of its public names
        raise UserError(f"device: {device}, devices {chosen}, strategy {strategy}, precision {precision}: {error}") from error
    finally:
        logging.disable(before)


def _fast_precision(accelerator: str) -> str:
    """Half precision where it takes less time: bf16 on a GPU and on a CPU with AMX, fp16 on a GPU before Ampere."""
    if accelerator in ("auto", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    return "bf16-mixed" if accelerator in ("auto", "cpu") and torch.cpu._is_amx_tile_supported() else "32-true"


def optimizer_for(name: str, network: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov's momentum 0.99 as in nnU-Net; `weight_decay` of the weights of layers alone."""
    parameters = [(key, p) for key, p in network.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for key, p in parameters if _decays(key, p) == decayed], "weight_decay": weight_decay if decayed else 0.0}
        for decayed in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=lr) if name == "adamw" else torch.optim.SGD(groups, lr=lr, momentum=0.99, nesterov=True)


def _decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether zero is a neutral value: not of biases and norms, nor of a scan's rates (A_logs) and an embedding of positions, which are matrices."""
    return parameter.ndim > 1 and "weight" in name and not getattr(parameter, "_no_weight_decay", False)


def workers_for(workers: int | None, device: torch.device) -> int:
    """None on a CPU: cutting patches takes a few hundredths of a step there, and a worker would take the network's cores."""
    return workers if workers is not None else 0 if device.type == "cpu" else 4


def axes_to_mirror(mirror: str | Sequence[int]) -> str | tuple[int, ...]:
    """`mirror` as "auto", "swap" or the axes."""
    if not isinstance(mirror, str):
        return tuple(mirror)
    if mirror in ("auto", "swap", "none"):
        return () if mirror == "none" else mirror
    if not re.fullmatch(r"\d+(,\d+)*", mirror):
        raise UserError(f"mirror: expected auto, swap, none or axes as in 0,1, got {mirror!r}")
    return tuple(int(axis) for axis in mirror.split(","))


def _chosen(
    fitted: Fitted,
    fabric: Fabric,
    training: Sequence[Case],
    validation: Sequence[Case],
    max_steps: int | None,
    max_seconds: float | None,
    batch: int,
    validations: int,
    ema: float | None,
) -> dict[str, str]:
    """What will be trained, a line each: what was found, fitted or chosen."""
    axes = ("left-right", "front-back", "up-down")
    mirrored = ", ".join(axes[axis] for axis in fitted.mirror) or "none"
    names = list(fitted.classes)
    swapped = "".join(f"; {names[a]} and {names[b]} change places" for a, b in fitted.sides)
    held_out = f"{_counted(validation)} held out, validated {validations} times" if validation and validations else "no validation"
    budget = " or ".join([*([f"{max_steps:,} steps"] if max_steps else []), *([f"{max_seconds:g} s"] if max_seconds else [])])
    scaled = ", ".join(f"{name} {SCHEMES[how['scheme']]}" for name, how in zip(fitted.channels, fitted.intensity, strict=True))
    return {
        "device": f"{fabric.device}, {fabric.world_size} process(es), {fabric.strategy.precision.precision}",
        "cases": f"{_counted(training)} to train on, {held_out}",
        "classes": ", ".join(f"{name} {value}" for name, value in fitted.classes.items()),
        **(
            {"regions": ", ".join(f"{name} {'+'.join(map(str, values))}" for name, values in fitted.regions.values.items())} if fitted.regions else {}
        ),
        "intensities": scaled,
        "spacing": f"{' x '.join(f'{edge:.3g}' if edge else 'own' for edge in fitted.spacing)} mm",
        "patch": f"{' x '.join(map(str, fitted.patch))} voxels, {batch} in a step",
        "mirrored": f"{mirrored}{swapped}",
        "budget": budget,
        **({} if ema is None else {"weights": f"validated and kept is their moving average, with the decay {ema:g}"}),
    }


def _counted(cases: Sequence[Case]) -> str:
    """The number of cases, with that of their patients where these are known."""
    patients = {case.patient for case in cases} - {None}
    return f"{len(cases)} (of {len(patients)} patients)" if patients else str(len(cases))


def _files(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Each case by its files, which no two cases share, and its patient, where that is known."""
    return [
        {"name": case.name, "images": [str(file.resolve()) for file in case.images], "label": str(case.label_file.resolve())}
        | ({} if case.patient is None else {"patient": case.patient})
        for case in cases
    ]
