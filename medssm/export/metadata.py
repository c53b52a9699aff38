"""What an exported file says of itself: everything between an image and its label map or class, as one JSON text, which `medssm_runtime` reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import medssm
from medssm.classify import calibration
from medssm.classify.images import Fitted as Classifies
from medssm.errors import UserError
from medssm.files import read_json
from medssm.segment import networks, postprocess
from medssm.segment.data import FITTED
from medssm.segment.inference import OVERLAP
from medssm.segment.predict import weights_of
from medssm.segment.preprocess import Fitted
from medssm.tasks import CLASSIFY, is_fitted

KEY = "medssm"  # in metadata_props of an ONNX file, in rt_info of an OpenVINO file
SCHEMA = 1  # raised when a reader of an older schema would do something wrong


def read_run(run: Path | str, weights: str = "last") -> tuple[Fitted | Classifies, dict[str, Any]]:
    """The settings and the network's description (config.json) of one trained network, whose weights are there.

    Raises UserError for several folds, for a folder without those weights, and for a network that was given to `train` as a module.
    """
    run = Path(run)
    networks.check_run(run, "run")
    weights_of(run, weights)
    config = read_json(run / networks.CONFIG)
    if not config.get("model"):
        raise UserError(f"run: {run}: trained from a {config.get('class')} given as a module; what is exported has to name its network")
    return (Classifies if is_fitted(run / FITTED) else Fitted).load(run / FITTED), config


def metadata(
    run: Path | str, *, weights: str = "last", overlap: float = OVERLAP, mirror: bool = False, custom_ops: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The table that an exported file carries under `KEY`, as `text` of it; docs/guides/runtime.md explains the entries.

    Args:
        run: folder written by medssm train; of folds, one of them
        weights: those of the end of the training ("last"), or those with the best validation ("best")
        overlap: of a network that segments: of neighbouring windows, 0 to less than 1, unless the user of the file says otherwise
        mirror: average over the mirrorings that the network was trained with, unless the user of the file says otherwise
        custom_ops: {"domain": ..., "version": ...} that the file needs beside an engine's own operators; None if it needs none

    Raises:
        UserError: see `read_run`.
    """
    run = Path(run)
    fitted, config = read_run(run, weights)
    file = weights_of(run, weights)
    return {
        "schema": SCHEMA,
        "task": CLASSIFY if isinstance(fitted, Classifies) else "segment",
        "medssm": medssm.__version__,
        "model": config["model"],
        "compression": [step["kind"] for step in config.get("compression", [])],
        "channels": [{"name": name, **how} for name, how in zip(fitted.channels, fitted.intensity, strict=True)],
        **(_classifies(fitted, run, weights) if isinstance(fitted, Classifies) else _segments(fitted, run, weights, overlap, mirror)),
        "weights": {"file": file, "sha256": sha256(run / file)},
        "custom_ops": None if custom_ops is None else dict(custom_ops),
    }


def _segments(fitted: Fitted, run: Path, weights: str, overlap: float, mirror: bool) -> dict[str, Any]:
    return {
        "spatial_dims": len(fitted.patch),
        "classes": fitted.classes,
        "regions": {"values": fitted.regions.values, "written": fitted.regions.written} if fitted.regions else None,
        "spacing": fitted.spacing,
        "patch": fitted.patch,
        "slice_axis": fitted.slice_axis,
        "overlap": overlap,
        "mirror": {"average": mirror, "axes": fitted.mirror, "sides": fitted.sides},
        "postprocessing": {name: how for name, how in postprocess.load([run], list(fitted.structures), weights).items() if how},
    }


def _classifies(fitted: Classifies, run: Path, weights: str) -> dict[str, Any]:
    return {
        "spatial_dims": len(fitted.shape),
        "classes": fitted.classes,
        "shape": fitted.shape,
        "sizes": fitted.sizes,
        "spacing": fitted.spacing,
        "temperature": calibration.load(run, weights),
    }


def text(table: Mapping[str, Any]) -> str:
    """A table of `metadata` as the text that a file carries."""
    return json.dumps(table, allow_nan=False)


def sha256(path: Path) -> str:
    """The hash of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
