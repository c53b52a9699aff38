"""medssm demo clinic: a network that learnt a real brain becomes smaller, is exported and runs without PyTorch; a page says what each step costs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import medssm
from medssm import machine
from medssm.compress.command import compress
from medssm.errors import UserError
from medssm.files import read_json, write_json, write_text
from medssm.segment.demo.data import load_brain, write_dataset
from medssm.segment.demo.pipeline import FAST, FAST_STEPS, LEARNING_RATES, OURS, OURS_KWARGS, OVERLAP, RECIPE, keep_settings, say, scores
from medssm.segment.images import read_label
from medssm.segment.networks import CONFIG, WEIGHTS
from medssm.segment.pages import page
from medssm.segment.predict import predict
from medssm.segment.train import train

STEPS = 400
BASE = "float32"


@dataclass(frozen=True)
class Variant:
    """A network that is made of another one by `medssm compress`: `options` of it, after a share `steps` of the first training's steps."""

    title: str
    source: str = BASE
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: float = 0.0
    taught: bool = False


VARIANTS = {
    "folded": Variant("norms folded", options={"fold_norms": True}),
    "int8": Variant("8 bits", options={"int8": True}),
    "low-rank": Variant("half of each wide layer, in low rank", options={"low_rank": 0.5}, steps=0.25),
    "pruned": Variant("pruned to 0.35, taught by the first network", options={"prune": 0.35}, steps=0.5, taught=True),
    "pruned-int8": Variant("pruned to 0.35, then 8 bits", "pruned", {"int8": True}),
}


def clinic(
    *, out: Path | str = "demo-clinic-out", steps: int | None = None, seed: int = 0, fast: bool = False, overwrite: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Train a network on one hemisphere of a real brain MRI, make it smaller in several ways, export each, run it without PyTorch, and write a page.

    A demo that was stopped goes on in its folder.

    Args: Files
        out: folder for all results
        overwrite: begin anew in a folder that has a demo
    Args: Training
        steps: of the first network (default: 400; with `fast` 200); pruning trains half as many more, low rank a quarter
        seed: of the weights and of the patches
        fast: at 3 mm and in a minute: to see it work, not to see it good

    Returns:
        What metrics.json holds.

    Raises:
        UserError: the data or onnxruntime is not installed, an argument is wrong, or `out` has another demo.
    """
    try:
        import onnxruntime  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("demo clinic needs onnxruntime, onnx and onnxscript: pip install '.[export]' (in medssm's source folder)") from error
    out = Path(out)
    if steps is not None and steps < 4:
        raise UserError(f"steps: expected 4 or more, got {steps}")
    recipe: dict[str, Any] = RECIPE | (FAST if fast else {}) | {"max_steps": steps or (FAST_STEPS if fast else STEPS), "lr": LEARNING_RATES[OURS]}
    keep_settings(out / "demo.json", {"seed": seed, "variants": {key: made.title for key, made in VARIANTS.items()}, **recipe}, overwrite)
    brain = load_brain("icbm2009c")
    write_dataset(brain, out / "data")

    say(f"training {OURS}, {recipe['max_steps']:,} steps", quiet)
    first = out / "networks" / BASE
    train(
        out / "data",
        first,
        model=OURS,
        model_kwargs=OURS_KWARGS,
        validations=0,
        seed=seed,
        resume=not overwrite,
        overwrite=overwrite,
        quiet=quiet,
        **recipe,
    )
    for key, made in VARIANTS.items():
        target = out / "networks" / key
        if not (target / WEIGHTS).is_file():
            say(f"{key}: {made.title}", quiet)
            learns: dict[str, Any] = {"steps": max(1, round(made.steps * recipe["max_steps"]))} if made.steps else {}
            taught: dict[str, Any] = {"distil": first} if made.taught else {}
            compress(out / "networks" / made.source, target, **made.options, **learns, **taught, seed=seed, resume=not overwrite, quiet=quiet)

    rows = []
    for key, title in {BASE: f"{OURS} {OURS_KWARGS['size']}, float32", **{key: made.title for key, made in VARIANTS.items()}}.items():
        say(f"{key}: predicting, exporting, predicting without PyTorch", quiet)
        rows.append({"key": key, "title": title, **_measured(out, key, brain.classes, brain.tested.side)})
    metrics = {
        "version": medssm.__version__,
        "seed": seed,
        "recipe": recipe,
        "classes": [name for name, value in brain.classes.items() if value],
        "data": {"title": brain.source.title, "credit": brain.source.credit},
        "split": {"trained": brain.trained.side, "tested": brain.tested.side},
        "rows": rows,
        "machine": machine.describe(),
        "report": str(out / "report.html"),
    }
    write_json(out / "metrics.json", metrics)
    write_text(out / "report.html", page(Path(__file__).with_name("clinic.html"), "medssm demo", m=metrics))
    return metrics


def show(metrics: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Print a row for each network and where the page is."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"One network in several sizes, tested on the {metrics['split']['tested']} hemisphere", caption="one volume: that it works, no more"
    )
    table.add_column(no_wrap=True)
    for title in ("mean Dice", "MB", "seconds", "seconds without PyTorch", "voxels that differ"):
        table.add_column(title, justify="right")
    for row in metrics["rows"]:
        apart = [f"{row['runtime']['seconds']:.1f}", f"{row['runtime']['differing']:.1e}"] if "runtime" in row else ["not exported", ""]
        table.add_row(row["key"], f"{row['dice']['mean']:.3f}", f"{row['file'] / 1e6:.2f}", f"{row['seconds']:.1f}", *apart)
    console = Console()
    console.print(table)
    console.print(f"report: {metrics['report']}", soft_wrap=True)


def _measured(out: Path, key: str, classes: Mapping[str, int], side: str) -> dict[str, Any]:
    """The scores of a network, its size and time, and the same of its ONNX file without PyTorch, where it can be exported."""
    network, labels = out / "networks" / key, out / "predictions" / key
    begun = time.perf_counter()
    predict(network, out / "data" / "imagesTs", labels, overlap=OVERLAP, quiet=True)
    row = {
        "seconds": round(time.perf_counter() - begun, 2),
        "file": (network / WEIGHTS).stat().st_size,
        "steps": [step["kind"] for step in read_json(network / CONFIG).get("compression", [])],
        **scores(labels, out / "data" / "labelsTs", classes),
    }
    file = out / "exported" / f"{key}.onnx"
    try:
        exported = _exported(network, file)
    except UserError as error:
        return {**row, "not_exported": str(error)}
    target = out / "predictions" / f"{key}-runtime"
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "medssm_runtime", file, out / "data" / "imagesTs", target, "--overwrite", "--json", "--quiet"],
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise UserError(f"medssm_runtime: {(done.stderr.strip().splitlines() or ['it ended without a word'])[-1]}")
    here, there = (read_label(folder / f"{side}.nii.gz")[0] for folder in (labels, target))
    runtime = {
        "seconds": round(seconds, 2),
        "parts": json.loads(done.stdout)["seconds"],
        "differing": float(np.mean(here != there)),
        "dice": scores(target, out / "data" / "labelsTs", classes)["dice"],
        "file": file.stat().st_size,
        "operators": exported["operators"],
    }
    return {**row, "runtime": runtime}


def _exported(network: Path, file: Path) -> dict[str, Any]:
    from medssm.export.onnx import export_onnx

    file.parent.mkdir(parents=True, exist_ok=True)
    return export_onnx(network, file, overlap=OVERLAP, overwrite=True)
