"""The folder of a training, whatever its task: whether it has one already, and the arguments to repeat it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medssm.errors import UserError
from medssm.files import make_folder, read_json_lines, write_bytes
from medssm.options import as_yaml
from medssm.segment.loop import CHECKPOINT, LOG
from medssm.segment.networks import WEIGHTS

ARGUMENTS, CASES, CURVES, REPORT = "train.yaml", "cases.json", "curves.png", "report.html"
_PATHS = ("dataset", "out", "splits", "cache")  # arguments that are paths


def finished(out: Path, *, resume: bool, overwrite: bool, max_steps: int | None, quiet: bool) -> dict[str, Any] | None:
    """The result of the training in `out` where there is nothing left to do, which is said; else the folder is made.

    Raises UserError rather than write over a training unasked.
    """
    weights, checkpoint = out / WEIGHTS, out / CHECKPOINT
    if resume and weights.exists() and not checkpoint.exists():
        result: dict[str, Any] = read_json_lines(out / LOG)[-1]["finished"]
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
    make_folder(out)
    return None


def save_arguments(path: Path, arguments: Mapping[str, Any]) -> None:
    """Write what `medssm train --config` takes to repeat the training, from whatever folder it is called in."""
    write_bytes(path, f"# medssm train --config THIS_FILE --overwrite trains again\n{kept(arguments)}".encode())


def kept(arguments: Mapping[str, Any]) -> str:
    """The arguments as YAML, with whole paths."""
    return as_yaml({name: Path(value).resolve() if name in _PATHS and value is not None else value for name, value in arguments.items()})
