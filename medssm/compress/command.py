"""medssm compress: a trained network made smaller, as a folder like that of any training."""

from __future__ import annotations

import inspect
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from medssm.compress import factorize as low_ranks
from medssm.compress import prune as pruning
from medssm.compress.cost import multiply_adds
from medssm.errors import UserError
from medssm.files import disk_error, first_line, make_folder, read_json, read_json_lines, write_json, write_text
from medssm.segment import networks, postprocess, runs
from medssm.segment.cases import Case
from medssm.segment.data import FITTED, Dataset, load_dataset, split
from medssm.segment.loop import CHECKPOINT, LOG, Interrupted
from medssm.segment.networks import BEST, CONFIG, WEIGHTS
from medssm.segment.patches import Patches
from medssm.segment.runs import ARGUMENTS, CASES
from medssm.segment.start import Start
from medssm.segment.train import criterion_for, train
from medssm.segment.uncertainty import conformal
from medssm.segment.volumes import load

_CASES_READ = 16  # for the patches that importance and ranges are found with
_SHARE_OF_STEPS = 0.5  # of the run's own, where nothing else is said
_RESULT = "compression.json"


def compress(
    run: Path | str,
    out: Path | str,
    *,
    data: Path | str | None = None,
    prune: float | None = None,
    low_rank: float | None = None,
    distil: Path | str | None = None,
    fold_norms: bool = False,
    int8: bool = False,
    steps: int | None = None,
    lr: float | None = None,
    criterion: Literal["first-order", "magnitude"] = "first-order",
    multiple: int = 16,
    batches: int = 8,
    seed: int = 0,
    device: str | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Make a trained network smaller: prune it, write its layers in low rank, train it further, compute it in 8 bits, in this order, as far as asked.

    OUT is then a folder like that of any training: predict, compare and evaluate take it. It is written whole or not at all.

    Args: Data
        run: folder of a finished training, or one that this command wrote
        out: new folder for the smaller network
        data: the data set that `run` was trained on, where it is now (default: where it was); only its training cases are used
    Args: Steps
        prune: share of the multiply-adds to keep, as 0.35: channels, states and heads that count little for their time are removed
        low_rank: share of the multiply-adds to keep of each convolution and linear layer with at least 32 channels
        distil: folder of a finished training whose network, the teacher, is learnt from beside the labels
        fold_norms: batch norms become part of the convolutions before them; the network is then for inference alone
        int8: weights and inputs of convolutions and linear layers in 8 bits, for inference on a CPU; it folds norms too
        steps: of training at the end of prune, low_rank and distil, with the run's own recipe; 0 leaves it out (default: half of the run's)
        lr: the largest learning rate of that (default: the run's)
    Args: Choice of what is pruned
        criterion: of what counts: first-order, how the loss changes on patches of training cases, or magnitude of the weights
        multiple: numbers of channels that are left are multiples of it, with half of it where there are few
        batches: patches, two at a time, for first-order and for the ranges of 8 bits
        seed: of the choice of patches
    Args: Machine
        device: of the training: auto, cpu, cuda, cuda:1 or mps (default: the run's)
        resume: go on with a training that was interrupted

    Returns:
        {"out", "model", "steps": kinds of what was done, "before", "after": {"parameters", "multiply_adds", "file"}, "validation"}

    Raises:
        UserError: for what the user can mend.
        loop.Interrupted: a KeyboardInterrupt; the training is saved beside `out`.
    """
    run, out = Path(run), Path(out)
    trains = prune is not None or low_rank is not None or distil is not None
    if not (trains or fold_norms or int8):
        raise UserError("expected at least one of --prune, --low-rank, --distil, --fold-norms and --int8, got none")
    _check(out, steps=steps, batches=batches, multiple=multiple)
    source = Source.read(run, None if data is None else Path(data), seed)
    if trains or steps:
        source.start.check_trainable("run")
    if int8 and "int8" in [step["kind"] for step in source.start.config.get("compression", [])]:
        raise UserError(f"run: {run}: its network is in 8 bits already")
    if steps is None:
        steps = max(1, math.ceil(_SHARE_OF_STEPS * source.finished["steps"])) if trains else 0
    if distil is not None and steps == 0:
        raise UserError("steps: expected at least 1 to learn from a teacher, got 0")

    work = out.with_name(f".partial-{out.name}")
    resume = resume and (work / CONFIG).is_file() and (work / CHECKPOINT).is_file()
    first_order = prune is not None and criterion == "first-order"
    patches = source.patches(batches, seed) if int8 or (first_order and not resume) else []
    if resume:
        config = read_json(work / CONFIG)
        start = Start(networks.of_config(config), config, source.start.fitted)
    else:
        shutil.rmtree(work, ignore_errors=True)
        start = source.smaller(prune, low_rank, patches if first_order else None, multiple)
    try:
        make_folder(work)
        if steps:
            write_json(work / CONFIG, start.config)
            changed = {"dataset": source.dataset, "out": work, "max_steps": steps, "max_seconds": None, "start": start, "distil": distil}
            changed |= {key: value for key, value in (("lr", lr), ("device", device)) if value is not None}
            train(**{**source.recipe, **changed, "resume": resume, "overwrite": True, "quiet": quiet})
        else:
            source.untrained(start, work)
        if fold_norms or int8:
            start = _for_inference(work, start, fold_norms, [image for image, _ in patches] if int8 else None)
        result = {
            "out": str(out),
            "model": start.config["model"],
            "steps": [step["kind"] for step in start.config["compression"]],
            "before": _size(source.start, run, source.example),
            "after": _size(start, work, source.example),
            "validation": _finished(work)["validation"],
        }
        _settle(work, out, result)
    except Interrupted:
        raise  # what was learnt stays in `work`, for resume
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError):
            raise disk_error(out, error) from error
        raise
    return result


def show(result: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Print what became smaller."""
    print(f"{result['model']}: {', '.join(result['steps'])}")
    names = {"parameters": "parameters", "multiply_adds": "multiply-adds of a patch", "file": "bytes of the file"}
    for key, name in names.items():
        before, after = result["before"][key], result["after"][key]
        print(f"{name:<24} {before:>16,} -> {after:>16,}  ({after / before:.2f})")
    if result["validation"]:
        later = ", before 8 bits and folded norms" if result["steps"][-1] in ("fold", "int8") else ""
        print(f"mean Dice on held-out cases {result['validation']['mean']:.3f}{later}")
    print(f"written: {result['out']}")


def _check(out: Path, *, steps: int | None, batches: int, multiple: int) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"out: expected a new folder, {out} exists")
    if steps is not None and steps < 0:
        raise UserError(f"steps: expected 0 or more, got {steps}")
    if batches < 1:
        raise UserError(f"batches: expected at least 1, got {batches}")
    if multiple < 4 or multiple % 4:
        raise UserError(f"multiple: expected a multiple of 4, got {multiple}")


@dataclass(frozen=True)
class Source:
    """The training whose network becomes smaller.

    start      its network and what was fitted to its data
    recipe     the arguments that `train` was called with
    finished   what `train` returned
    dataset    where its data set is
    table      the data set
    training   the cases that it was trained on
    example    (1, c, *patch), for what is counted and measured
    """

    run: Path
    start: Start
    recipe: dict[str, Any]
    finished: dict[str, Any]
    dataset: Path
    table: Dataset
    training: Sequence[Case]
    example: Tensor

    @classmethod
    def read(cls, run: Path, data: Path | None, seed: int) -> Source:
        """Raises UserError for a folder that is not that of a finished training, and a data set that is not the one that it was trained on."""
        if not (run / FITTED).is_file():
            folds = ", ".join(sorted(file.parent.name for file in run.glob(f"*/{FITTED}")))
            raise UserError(
                f"run: {run}: expected one network, got the folds {folds}: name one of them"
                if folds
                else f"run: {run}: no {FITTED} in it: not written by medssm train"
            )
        if not (run / WEIGHTS).is_file():
            raise UserError(f"run: {run / WEIGHTS}: no such file (the training is not finished)")
        start = Start.of(run)
        recipe = _recipe(run / ARGUMENTS)
        dataset = Path(recipe["dataset"]) if data is None else data
        if not dataset.exists():
            raise UserError(f"data: {dataset}: no such file or folder: where is the data set that {run} was trained on?")
        table = load_dataset(dataset)
        start.check(table)
        sides = split(table, recipe["fold"], folds=recipe["folds"], splits=recipe["splits"], group=recipe["group"], seed=recipe["seed"])
        known = read_json(run / CASES)
        for cases, side in zip(sides, ("training", "validation"), strict=True):
            wanted, found = {entry["name"] for entry in known[side]}, {case.name for case in cases}
            if wanted != found:
                other = min(wanted ^ found)
                place = f"{other} is {'not ' if other in wanted else ''}among them"
                raise UserError(f"data: {table.name}: expected the {len(wanted)} {side} cases of {run}, got {len(found)}: {place}")
        example = torch.rand(1, len(start.fitted.channels), *start.fitted.patch, generator=torch.Generator().manual_seed(seed))
        return cls(run, start, recipe, _finished(run), dataset, table, sides[0], example)

    def patches(self, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Images and labels of training cases, two at a time."""
        fitted, some = self.start.fitted, torch.randperm(len(self.training), generator=torch.Generator().manual_seed(seed))[:_CASES_READ]
        cases = [self.training[i] for i in some.tolist()]
        volumes = self.start.volumes(cases, load(cases, self.table, fitted.spacing, self.recipe["cache"], self.recipe["nan"]), seed)
        drawn = Patches(volumes, fitted, seed=seed, foreground=self.recipe["foreground"], augment=False)
        pairs = [(drawn[2 * i], drawn[2 * i + 1]) for i in range(count)]
        return [(torch.stack([a["image"], b["image"]]), torch.stack([a["label"], b["label"]])) for a, b in pairs]

    def smaller(self, prune: float | None, low_rank: float | None, patches: Sequence[tuple[Tensor, Tensor]] | None, multiple: int) -> Start:
        """The network pruned, by the loss on patches or by its weights, and with layers of low rank."""
        fitted, config = self.start.fitted, self.start.config
        done: list[dict[str, Any]] = list(config.get("compression", []))
        network = networks.placed(self.start.network, torch.device("cpu"), len(fitted.patch))
        if prune is not None:
            loss = None if patches is None else criterion_for(fitted)
            network, step = pruning.prune(network, prune, self.example, batches=patches or (), loss=loss, multiple=multiple)
            done.append(step)
        if low_rank is not None:
            network, step = low_ranks.factorize(network, low_rank)
            done.append(step)
        return Start(network, {**config, "compression": done}, fitted)

    def untrained(self, start: Start, work: Path) -> None:
        """Write what a training would have written, of a network that is not trained further."""
        networks.save(work, start.network, start.config)
        for name in (FITTED, CASES, postprocess.POSTPROCESSING):
            if (self.run / name).is_file():
                shutil.copyfile(self.run / name, work / name)
        shutil.copyfile(self.run / ARGUMENTS, work / ARGUMENTS)
        _add_end(work, {**self.finished, "validation": {}, "best": {}})


def _recipe(path: Path) -> dict[str, Any]:
    """The arguments of a training; those that the file says nothing of have their defaults."""
    parameters = inspect.signature(train).parameters
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        unknown = found.keys() - parameters.keys()
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"run: {path}: cannot be read ({first_line(error)})") from error
    if unknown:
        raise UserError(f"run: {path}: medssm train of this version has no option {', '.join(sorted(unknown))}")
    return {name: parameter.default for name, parameter in parameters.items() if parameter.default is not parameter.empty} | found


def _finished(run: Path) -> dict[str, Any]:
    """What the training of a folder returned."""
    ends = [line["finished"] for line in read_json_lines(run / LOG) if "finished" in line]
    if not ends:
        raise UserError(f"run: {run / LOG} says nothing of the end of its training")
    result: dict[str, Any] = ends[-1]
    return result


def _add_end(work: Path, finished: Mapping[str, Any]) -> None:
    """A line about the end of the training, in its log."""
    log = work / LOG
    line = json.dumps({"step": finished["steps"], "seconds": finished["seconds"], "finished": finished}) + "\n"
    write_text(log, (log.read_text(encoding="utf-8") if log.exists() else "") + line)


def _for_inference(work: Path, start: Start, fold_norms: bool, images: Sequence[Tensor] | None) -> Start:
    """The network of the folder with its norms folded, and in 8 bits where there are images to find the ranges of its numbers with."""
    done, network = list(start.config["compression"]), networks.load(work)
    network = networks.placed(network, torch.device("cpu"), len(start.fitted.patch)).eval()
    if fold_norms:
        from medssm.compress.fold import fold

        network, step = fold(network)
        done.append(step)
    if images is not None:
        from medssm.compress.int8 import quantize

        network, step = quantize(network, images)
        done.append(step)
    start = Start(network, {**start.config, "compression": done}, start.fitted)
    for name in (BEST, conformal.CONFORMAL):  # of the network as it was
        (work / name).unlink(missing_ok=True)
    networks.save(work, network, start.config)
    return start


def _size(start: Start, folder: Path, example: Tensor) -> dict[str, int]:
    """Numbers that the network has, multiply-adds of the example, bytes of its file."""
    steps = [step for step in start.config.get("compression", []) if step["kind"] != "int8"]  # in 8 bits there are as many
    network = networks.of_config({**start.config, "compression": steps})
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "multiply_adds": multiply_adds(network, example),
        "file": (folder / WEIGHTS).stat().st_size,
    }


def _settle(work: Path, out: Path, result: Mapping[str, Any]) -> None:
    """Make the folder `out`, with its own name in its files."""
    written = yaml.safe_load((work / ARGUMENTS).read_text(encoding="utf-8"))
    runs.save_arguments(work / ARGUMENTS, {**written, "out": out})
    _add_end(work, {**_finished(work), "out": str(out), "parameters": result["after"]["parameters"]})
    write_json(work / _RESULT, result)
    if out.is_dir():
        out.rmdir()
    os.replace(work, out)
