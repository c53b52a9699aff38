"""medssm train: a thin recipe that fits a network to a folder of labelled images.

The recipe: RAS and the median spacing; intensities by modality (`preprocess`); patches, a third of them centred on a class drawn evenly
among the case's (`patches`); light augmentation; Dice plus cross-entropy with deep supervision where the network has it (`losses`);
AdamW with warm-up and a cosine over the budget; gradients clipped. There is no search for a better recipe and no ensembling of
configurations: that is nnU-Net's work.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import nn

from medssm.allocator import keep_freed_memory
from medssm.errors import UserError
from medssm.files import make_folder, read_json_lines
from medssm.segment import curves, networks
from medssm.segment.data import FITTED, load_dataset, split
from medssm.segment.fit import fit
from medssm.segment.inference import probabilities
from medssm.segment.loop import CHECKPOINT, LOG, Budget, Loop
from medssm.segment.losses import SegmentationLoss
from medssm.segment.patches import Patches
from medssm.segment.preprocess import IGNORE, Fitted
from medssm.segment.progress import progress
from medssm.segment.volumes import load

CURVES = "curves.png"
_STEPS = 1000
_OPTIMIZERS = {"adamw": 1e-3, "sgd": 1e-2}  # with the learning rate each starts from


def train(
    dataset: Path | str,
    out: Path | str,
    *,
    model: str | nn.Module = "medssm_unet",
    model_kwargs: dict | None = None,
    spatial_dims: int = 3,
    fold: int | None = None,
    folds: int = 5,
    splits: Path | str | None = None,
    max_steps: int | None = None,
    max_seconds: float | None = None,
    batch: int | None = None,
    patch: Sequence[int] | None = None,
    spacing: Sequence[float] | None = None,
    lr: float | None = None,
    optimizer: str = "adamw",
    weight_decay: float = 1e-2,
    clip: float = 12.0,
    foreground: float = 1 / 3,
    augment: bool = True,
    mirror: str | Sequence[int] = "auto",
    validations: int = 4,
    device: str = "auto",
    devices: int | str = 1,
    strategy: str = "auto",
    precision: str = "auto",
    workers: int | None = None,
    cache: Path | str | None = None,
    seed: int = 0,
    save_seconds: float = 60.0,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict:
    """Train a network on `dataset` and write model.safetensors, config.json, fitted.json, metrics.jsonl and curves.png into `out`.

    dataset       a folder with dataset.json (nnU-Net) or a MONAI datalist's JSON file
    model         a name of `medssm.list_models()`, one of MONAI's as monai.networks.nets.NAME, or a module that gives logits
                  (b, classes, *spatial), in training a list of them where it has deep supervision
    model_kwargs  for the model's constructor, beside spatial_dims, in_channels and out_channels
    fold          the part of the cases that is held out and validated on; None trains on all. `splits` is nnU-Net's splits_final.json;
                  else a datalist's own folds, else `folds` parts shuffled by `seed`
    max_steps     1000 where max_seconds is not given either; max_seconds counts the work of the steps alone, over all resumptions
    batch         2 in 3D, 12 in 2D, for each process
    patch         voxels; None: 64^3 at most on a CPU, 112^3 on a GPU, shaped like the median case
    spacing       millimetres, RAS; None: the median of the training cases
    mirror        axes (0 left-right, 1 front-back, 2 up-down) to mirror at random; "auto" is all, without 0 where a class's name has a side
    validations   how often, evenly over the budget, the held-out cases are segmented whole
    device        auto, cpu, cuda, cuda:1, mps; `devices` and `strategy` are Lightning's for several processes or GPUs ("ddp")
    precision     Lightning's; auto is bf16-mixed (16-mixed before Ampere) on CUDA, else 32-true
    cache         a folder for the resampled cases; None keeps them in memory
    resume        go on from out/checkpoint.pt; a finished training is returned as it is

    Returns what was trained, for how long, and the validation's Dice by class. Raises UserError for what the caller can mend;
    `loop.Interrupted`, a KeyboardInterrupt, after Ctrl-C or SIGTERM, with the training saved.
    """
    out = Path(out)
    finished = _finished(out, resume, overwrite)
    if finished:
        return finished
    _check_arguments(spatial_dims, optimizer, max_steps, max_seconds, batch, patch, spacing, lr, foreground)
    batch = batch or (2 if spatial_dims == 3 else 12)
    table = load_dataset(dataset)
    training, validation = split(table, fold, folds=folds, splits=splits, seed=seed)
    fabric = _fabric(device, devices, strategy, precision)
    fabric.launch()
    quiet = quiet or not fabric.is_global_zero

    fitted, volumes = fit(
        table, training, spatial_dims=spatial_dims, spacing=spacing, patch=patch, mirror=mirror, cache=cache, seed=seed, fabric=fabric, quiet=quiet
    )
    held_out = load(validation[fabric.global_rank :: fabric.world_size], table, fitted.spacing, cache)

    torch.manual_seed(seed)
    sizes = {"in_channels": len(fitted.channels), "out_channels": len(fitted.classes)}
    kwargs = {"spatial_dims": spatial_dims, **sizes, **(model_kwargs or {})}
    network, config = model if isinstance(model, nn.Module) else networks.build(model, **kwargs), networks.describe(model, kwargs)
    network = network.to(fabric.device, memory_format=networks.memory_format(spatial_dims))
    networks.check_patch(network, fitted.patch, **sizes, device=fabric.device)
    lr = lr or _OPTIMIZERS[optimizer]
    settings = {
        "model": config,
        "cases": [case.name for case in training],
        **dataclasses.asdict(fitted),
        "batch": batch,
        "lr": lr,
        "optimizer": optimizer,
        "weight_decay": weight_decay,
        "clip": clip,
        "foreground": foreground,
        "augment": augment,
        "seed": seed,
        "processes": fabric.world_size,
    }
    if max_steps is None and max_seconds is None:
        max_steps = _STEPS
    patches = Patches(volumes, fitted, seed=seed, foreground=foreground, augment=augment)
    criterion = SegmentationLoss(ignore=fitted.ignore is not None)
    loop = Loop(
        fabric,
        network,
        _optimizer(optimizer, network, lr, weight_decay),
        patches,
        criterion,
        out,
        batch=batch,
        lr=lr,
        clip=clip,
        budget=Budget(max_steps, max_seconds),
        seed=seed,
        workers=_workers(workers, fabric.device),
        save_seconds=save_seconds,
        settings=settings,
    )
    if resume:
        loop.resume()
    elif fabric.is_global_zero:
        for name in (networks.WEIGHTS, CHECKPOINT):
            (out / name).unlink(missing_ok=True)  # of the training that is to be overwritten
    if fabric.is_global_zero:
        fitted.save(out / FITTED)

    name = config["model"] or config["class"]
    with progress(f"training {name.rpartition('.')[2]}", quiet) as show:
        dice = loop.run(show, lambda: _validate(network, fitted, held_out, fabric), validations if validation else 0)
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
    }
    if fabric.is_global_zero:
        loop.log({"finished": result})
        networks.save(out, network, config)
        (out / CHECKPOINT).unlink(missing_ok=True)
        curves.draw(out / LOG, out / CURVES)
    return result


def add_arguments(parser) -> None:
    parser.add_argument("dataset", help="folder with nnU-Net's dataset.json, or a MONAI datalist's JSON file")
    parser.add_argument("out", help="folder for the weights and what belongs to them")
    parser.add_argument("--model", default="medssm_unet", help="one of `medssm models`, or monai.networks.nets.NAME (default %(default)s)")
    parser.add_argument("--model-kwargs", type=_json, default={}, metavar="JSON", help="more keywords for the model")
    parser.add_argument("--spatial-dims", type=int, choices=(2, 3), default=3, help="2 trains on slices (default %(default)s)")
    parser.add_argument("--fold", type=int, help="the part of the cases to hold out and validate on (default: train on all)")
    parser.add_argument("--folds", type=int, default=5, help="into how many parts the cases fall (default %(default)s)")
    parser.add_argument("--splits", help="nnU-Net's splits_final.json")
    parser.add_argument("--max-steps", type=int, help=f"default {_STEPS} where --max-seconds is not given")
    parser.add_argument("--max-seconds", type=float, help="seconds of training, without reading and validating")
    parser.add_argument("--batch", type=int, help="patches in a step and process (default 2 in 3D, 12 in 2D)")
    parser.add_argument("--patch", type=int, nargs="+", help="voxels along each axis (default: by the data and the device)")
    parser.add_argument("--spacing", type=float, nargs=3, help="millimetres along the RAS axes (default: the data set's median)")
    parser.add_argument("--lr", type=float, help=f"learning rate (default by optimizer: {_OPTIMIZERS})")
    parser.add_argument("--optimizer", choices=tuple(_OPTIMIZERS), default="adamw", help="default %(default)s")
    parser.add_argument("--weight-decay", type=float, default=1e-2, help="default %(default)s")
    parser.add_argument("--clip", type=float, default=12.0, help="the gradients' largest norm (default %(default)s)")
    parser.add_argument("--foreground", type=float, default=1 / 3, help="share of patches centred on a class (default a third)")
    parser.add_argument("--no-augment", action="store_true", help="no rotation, zoom, noise, blur, brightness and contrast")
    parser.add_argument(
        "--mirror",
        type=_axes,
        default="auto",
        metavar="AXES",
        help="axes to mirror: auto, none, or some of 0 (left-right), 1 (front-back), 2 (up-down) as in 0,1",
    )
    parser.add_argument("--validations", type=int, default=4, help="how often the held-out cases are segmented (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default %(default)s)")
    parser.add_argument("--devices", default="1", help="how many processes or GPUs, each with its own batch (default %(default)s)")
    parser.add_argument("--strategy", default="auto", help="Lightning's strategy for more than one, such as ddp (default %(default)s)")
    parser.add_argument("--precision", default="auto", help="Lightning's: 32-true, bf16-mixed, 16-mixed (default: by the device)")
    parser.add_argument("--workers", type=int, help="processes that cut patches (default: 0 on a CPU, 4 on a GPU)")
    parser.add_argument("--cache", help="a folder for the resampled cases, where they do not fit into memory")
    parser.add_argument("--save-seconds", type=float, default=60.0, help="time between checkpoints (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on where a training stopped")
    parser.add_argument("--overwrite", action="store_true", help="train anew into a folder that has a training")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")


def run(args) -> dict:
    keep_freed_memory()
    options = {name: value for name, value in vars(args).items() if name not in ("dataset", "out", "json", "no_augment", "devices")}
    devices = int(args.devices) if args.devices.lstrip("-").isdigit() else args.devices
    result = train(args.dataset, args.out, devices=devices, augment=not args.no_augment, **options)
    if not (args.quiet or args.json):
        held_out, dice = result["validation_cases"], result["validation"]
        dice = f", mean Dice {dice['mean']:.3f} on {held_out} held-out case(s)" if dice else ""
        print(f"{result['model']}: {result['parameters']:,} parameters, {result['steps']} steps in {result['seconds']:.0f} s{dice}")
        print(f"written: {args.out}")
    return result


def _finished(out: Path, resume: bool, overwrite: bool) -> dict | None:
    """The result of the training in `out` where there is nothing left to do; UserError rather than write over one unasked."""
    weights, checkpoint = out / networks.WEIGHTS, out / CHECKPOINT
    if resume and weights.exists() and not checkpoint.exists():
        return read_json_lines(out / LOG)[-1]["finished"]
    if not (resume or overwrite) and (weights.exists() or checkpoint.exists()):
        raise UserError(f"out: {out} has a training: pass resume to go on with it, or overwrite")
    make_folder(out)
    return None


def _check_arguments(spatial_dims, optimizer, max_steps, max_seconds, batch, patch, spacing, lr, foreground) -> None:
    if spatial_dims not in (2, 3):
        raise UserError(f"spatial_dims: expected 2 or 3, got {spatial_dims}")
    if optimizer not in _OPTIMIZERS:
        raise UserError(f"optimizer: expected one of {', '.join(_OPTIMIZERS)}, got {optimizer!r}")
    if patch is not None and (len(patch) != spatial_dims or min(patch) < 1):
        raise UserError(f"patch: expected {spatial_dims} numbers of voxels, got {tuple(patch)}")
    if spacing is not None and (len(spacing) != 3 or not all(0 < value < math.inf for value in spacing)):
        raise UserError(f"spacing: expected 3 lengths in millimetres, got {tuple(spacing)}")
    for name, value in (("max_steps", max_steps), ("max_seconds", max_seconds), ("batch", batch), ("lr", lr)):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name}: expected more than 0, got {value}")
    if not 0 <= foreground <= 1:
        raise UserError(f"foreground: expected 0 to 1, got {foreground}")


def _fabric(device: str, devices: int | str, strategy: str, precision: str) -> Fabric:
    accelerator, _, number = device.partition(":")
    if number:
        devices = [int(number)] if number.isdigit() else number
    if precision == "auto":
        half = "bf16-mixed" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
        precision = half if accelerator in ("auto", "cuda") and torch.cuda.is_available() else "32-true"
    try:
        return Fabric(accelerator=accelerator, devices=devices, strategy=strategy, precision=precision)
    except (RuntimeError, ValueError, TypeError) as error:  # Lightning's MisconfigurationException is none of its public names
        raise UserError(f"device: {device}, devices {devices}, strategy {strategy}, precision {precision}: {error}") from error


def _optimizer(name: str, network: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov's momentum 0.99 as in nnU-Net; no decay on biases, norms and other vectors."""
    groups = [
        {"params": [p for p in network.parameters() if p.requires_grad and (p.ndim > 1) == decayed], "weight_decay": weight_decay if decayed else 0.0}
        for decayed in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=lr) if name == "adamw" else torch.optim.SGD(groups, lr=lr, momentum=0.99, nesterov=True)


def _workers(workers: int | None, device: torch.device) -> int:
    """None on a CPU: cutting patches takes a few hundredths of a step there, and a worker would take the network's cores."""
    return workers if workers is not None else 0 if device.type == "cpu" else 4


def _validate(network: nn.Module, fitted: Fitted, volumes: Sequence[tuple[torch.Tensor, torch.Tensor]], fabric: Fabric) -> dict:
    """Mean Dice of each class over the held-out cases at the network's spacing; a class absent from label and prediction is left out."""
    sums = torch.zeros(2, len(fitted.classes), dtype=torch.float64)
    for image, label in volumes:
        half = torch.float16 if fabric.device.type == "cuda" else None
        predicted = probabilities(network, image, fitted, device=fabric.device, half=half).argmax(0)
        for i in range(1, len(fitted.classes)):
            truth, found = label == i, (predicted == i) & (label != IGNORE)
            size = int(truth.sum() + found.sum())
            if size:
                sums[:, i] += torch.tensor([2 * int((truth & found).sum()) / size, 1.0], dtype=torch.float64)
    if fabric.world_size > 1:
        sums = fabric.all_reduce(sums, reduce_op="sum")
    dice = {name: (sums[0, i] / sums[1, i]).item() for i, name in enumerate(fitted.classes) if sums[1, i] > 0}
    return {**dice, "mean": sum(dice.values()) / len(dice) if dice else 0.0}


def _axes(text: str) -> str | tuple[int, ...]:
    if text == "auto":
        return text
    return () if text == "none" else tuple(int(axis) for axis in text.split(","))


def _json(text: str) -> dict:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value
