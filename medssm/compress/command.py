"""medssm compress: a trained network made smaller, as a folder like that of any training."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from medssm.compress.cost import multiply_adds
from medssm.compress.trainings import Start, Training, add_end, finished
from medssm.errors import UserError
from medssm.files import disk_error, make_folder, read_json, write_json
from medssm.segment import networks, runs
from medssm.segment.loop import CHECKPOINT, Interrupted
from medssm.segment.networks import BEST, CONFIG, WEIGHTS
from medssm.segment.runs import ARGUMENTS, REPORT
from medssm.segment.uncertainty import conformal
from medssm.tasks import CLASSIFY, is_run

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

    OUT is then a folder like that of any training, of a network that segments or of a classifier: predict takes it. It is written whole or not. Of a
    classifier in 8 bits the held-out images are classified anew: its temperature, figures and predictions are its own.

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
        {"out", "model", "steps": kinds of what was done, "before", "after": {"parameters", "multiply_adds", "file"}, "validation", "score": what its
        mean is, "measured": whether that is of the network as it is now, or of the one before 8 bits and folded norms}

    Raises:
        UserError: for what the user can mend.
        loop.Interrupted: a KeyboardInterrupt; the training is saved beside `out`.
    """
    run, given, out = Path(run), out, Path(os.path.abspath(out))  # `.` too has a name then
    trains = prune is not None or low_rank is not None or distil is not None
    if not (trains or fold_norms or int8):
        raise UserError("expected at least one of --prune, --low-rank, --distil, --fold-norms and --int8, got none")
    _check(out, {"prune": prune, "low_rank": low_rank}, steps=steps, batches=batches, multiple=multiple)
    networks.check_run(run, "run")
    if distil is not None:
        networks.check_run(Path(distil), "distil", CLASSIFY if is_run(run) else "segment")
    source = Training.read(run, None if data is None else Path(data), seed)
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
    patches = source.batches(batches, seed) if int8 or (first_order and not resume) else []
    if resume:
        config = read_json(work / CONFIG)
        start: Start = source.start._replace(network=networks.of_config(config), config=config)
    else:
        shutil.rmtree(work, ignore_errors=True)
        start = source.smaller(prune, low_rank, patches if first_order else None, multiple)
    try:
        make_folder(work)
        if steps:
            write_json(work / CONFIG, start.config)
            changed = {"dataset": source.dataset, "out": work, "max_steps": steps, "max_seconds": None, "start": start, "distil": distil}
            changed |= {key: value for key, value in (("lr", lr), ("device", device)) if value is not None}
            source.train(**{**source.recipe, **changed, "resume": resume, "overwrite": True, "quiet": quiet})
        else:
            source.untrained(start, work)
        if fold_norms or int8:
            start = _for_inference(work, start, source.example.ndim - 2, fold_norms, [image for image, _ in patches] if int8 else None)
        measured = source.measure(work, start.network) if int8 and source.measure else {}
        if measured:
            (work / REPORT).unlink(missing_ok=True)  # of the network as it was
        validation = {**finished(work), **measured}["validation"]
        result = {
            "out": str(given),
            "model": start.config["model"],
            "steps": [step["kind"] for step in start.config["compression"]],
            "before": _size(source.start, run, source.example),
            "after": _size(start, work, source.example),
            "validation": validation,
            "score": source.score,
            "measured": bool(validation) and (bool(measured) or not (fold_norms or int8)),
        }
        _settle(work, out, result, measured)
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
    print(f"{result['model']}: {', '.join(result['steps']) or 'trained further'}")
    names = {"parameters": "parameters", "multiply_adds": "multiply-adds of a patch", "file": "bytes of the file"}
    for key, name in names.items():
        before, after = result["before"][key], result["after"][key]
        print(f"{name:<24} {before:>16,} -> {after:>16,}  ({after / before:.2f})")
    if result["validation"]:
        later = "" if result["measured"] else ", before 8 bits and folded norms"
        print(f"{result['score']} {result['validation']['mean']:.3f}{later}")
    print(f"written: {result['out']}")


def _check(out: Path, shares: Mapping[str, float | None], *, steps: int | None, batches: int, multiple: int) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"out: expected a new folder, {out} exists")
    for name, share in shares.items():
        if share is not None and not 0 < share < 1:
            raise UserError(f"{name}: expected a share of the multiply-adds to keep, above 0 and below 1, got {share}")
    if steps is not None and steps < 0:
        raise UserError(f"steps: expected 0 or more, got {steps}")
    if batches < 1:
        raise UserError(f"batches: expected at least 1, got {batches}")
    if multiple < 4 or multiple % 4:
        raise UserError(f"multiple: expected a multiple of 4, got {multiple}")


def _for_inference(work: Path, start: Start, spatial_dims: int, fold_norms: bool, images: Sequence[Tensor] | None) -> Start:
    """The network of the folder with its norms folded, and in 8 bits where there are images to find the ranges of its numbers with."""
    done, network = list(start.config["compression"]), networks.load(work)
    network = networks.placed(network, torch.device("cpu"), spatial_dims).eval()
    if fold_norms:
        from medssm.compress.fold import fold

        network, step = fold(network)
        done.append(step)
    if images is not None:
        from medssm.compress.int8 import quantize

        network, step = quantize(network, images)
        done.append(step)
    start = start._replace(network=network, config={**start.config, "compression": done})
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


def _settle(work: Path, out: Path, result: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
    """Make the folder `out`, with its own name in its files, and with what was measured in place of what its training returned."""
    written = yaml.safe_load((work / ARGUMENTS).read_text(encoding="utf-8"))
    runs.save_arguments(work / ARGUMENTS, {**written, "out": out})
    add_end(work, {**finished(work), **measured, "out": str(out), "parameters": result["after"]["parameters"]})
    write_json(work / _RESULT, result)
    if out.is_dir():
        out.rmdir()
    os.replace(work, out)
