"""A training and its folder, whatever its task: what it may be asked for, whether there is one already, what it begins with, and its course."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from medssm.errors import UserError
from medssm.files import begins_with, make_folder, protect, read_json_lines, write_bytes, write_json
from medssm.options import as_yaml
from medssm.segment import curves
from medssm.segment.data import FITTED
from medssm.segment.loop import CHECKPOINT, LOG, Loop
from medssm.segment.networks import BEST, CONFIG, WEIGHTS
from medssm.segment.progress import progress

ARGUMENTS, CASES, CURVES, REPORT = "train.yaml", "cases.json", "curves.png", "report.html"
_HEADING = "# medssm train --config THIS_FILE --overwrite trains again\n"  # of train.yaml
_PATHS = ("dataset", "out", "splits", "cache", "start", "distil")  # arguments that are paths


def check_recipe(
    *, optimizer: str, optimizers: Collection[str], spacing: Sequence[float] | None, ema: float | None, weight_decay: float, **positive: float | None
) -> None:
    """UserError that names the first argument that no training takes. positive: numbers above 0, or None."""
    if optimizer not in optimizers:
        raise UserError(f"optimizer: expected one of {', '.join(optimizers)}, got {optimizer!r}")
    if spacing is not None and (len(spacing) != 3 or not all(0 < value < math.inf for value in spacing)):
        raise UserError(f"spacing: expected 3 lengths in millimetres, got {tuple(spacing)}")
    for name, value in positive.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name}: expected more than 0, got {value}")
    if not 0 <= weight_decay < math.inf:
        raise UserError(f"weight_decay: expected 0 or more, got {weight_decay}")
    if ema is not None and not 0 < ema < 1:
        raise UserError(f"ema: expected more than 0 and less than 1, got {ema}")


def finished(
    out: Path, *, reads: Sequence[Path | str | None], written: Sequence[str], resume: bool, overwrite: bool, max_steps: int | None, quiet: bool
) -> dict[str, Any] | None:
    """The result of the training in `out` where there is nothing left to do, which is said; else the folder is made.

    Args:
        out: the folder of the training
        reads: the files that it reads, or None
        written: the files that such a training writes when it ends, beside its weights
        resume: go on with the training that is there
        overwrite: train anew
        max_steps: that are asked for
        quiet: nothing is said

    Raises:
        UserError: a file that is read, or unasked a training or a file of other origin, would be written over.
    """
    weights, checkpoint = out / WEIGHTS, out / CHECKPOINT
    if resume and weights.exists() and not checkpoint.exists():
        *_, end = read_json_lines(out / LOG) or [{}]
        if "finished" not in end:
            raise UserError(f"resume: {out} has weights, but {LOG} says nothing of the end of their training: train anew with --overwrite")
        result: dict[str, Any] = end["finished"]
        if not quiet:
            more = max_steps is not None and max_steps > result["steps"]
            print(
                f"nothing was trained: {out} has a finished training of {result['steps']} steps"
                + (": its optimizer is gone, so more steps need a training anew (--overwrite)" if more else ""),
                file=sys.stderr,
            )
        return result
    if not (resume or overwrite) and (weights.exists() or checkpoint.exists()):
        raise UserError(f"out: {out} has a training: pass resume to go on with it, or overwrite")
    inputs = [Path(file) for file in reads if file is not None]
    ours = overwrite or resume or begins_with(out / ARGUMENTS, _HEADING)  # the last: a training that did not come to its first checkpoint
    for name in (weights.name, checkpoint.name, BEST, CONFIG, FITTED, ARGUMENTS, CASES, CURVES, REPORT, LOG, *written):
        protect(out / name, reads=inputs, overwrite=ours)
    make_folder(out)
    return None


def save_arguments(path: Path, arguments: Mapping[str, Any]) -> None:
    """Write what `medssm train --config` takes to repeat the training, from whatever folder it is called in."""
    write_bytes(path, (_HEADING + kept(arguments)).encode())


def kept(arguments: Mapping[str, Any]) -> str:
    """The arguments as YAML, with whole paths."""
    return as_yaml({name: Path(value).resolve() if name in _PATHS and value is not None else value for name, value in arguments.items()})


def say(chosen: Mapping[str, str]) -> None:
    """Print what was found, fitted or chosen, a line each."""
    print("\n".join(f"{what + ':':<12} {text}" for what, text in chosen.items()), file=sys.stderr)


def begin(loop: Loop, arguments: Mapping[str, Any], cases: Mapping[str, Any], *, resume: bool, written: Sequence[str]) -> None:
    """Go on from the checkpoint, or remove what the training that is to be overwritten left; then write the cases and the arguments.

    written: as for `finished`.
    """
    if resume:
        loop.resume()
    elif loop.fabric.is_global_zero:
        for name in (WEIGHTS, BEST, CHECKPOINT, *written):
            (loop.out / name).unlink(missing_ok=True)
    if loop.fabric.is_global_zero:
        save_arguments(loop.out / ARGUMENTS, arguments)  # first: it says whose the others are
        write_json(loop.out / CASES, cases)


def learn(
    loop: Loop,
    title: str,
    validate: Callable[[Callable[[str], None]], dict[str, float]],
    validations: int,
    quiet: bool,
    names: tuple[str, str] = curves.SEGMENTATION,
) -> dict[str, float]:
    """`loop.run` with a progress bar, and with learning curves that are drawn while it goes on.

    validate: gets what shows a line of text; names: see `curves.draw`.
    """
    live = curves.Live(loop.out / LOG, loop.out / CURVES, names=names)
    with progress(title, quiet) as show:

        def tell(fraction: float, text: str) -> None:
            show(fraction, text)
            if loop.fabric.is_global_zero:
                live()

        return loop.run(tell, lambda: validate(lambda text: tell(loop.budget.fraction(loop.done), text)), validations)
