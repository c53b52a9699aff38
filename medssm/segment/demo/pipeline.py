"""The demo from data to report: networks trained on one hemisphere, and two answers without a network, are tested on the other one.

It is a thin layer: the halves are written as a data set, which `train`, `predict` and `evaluate` take like any other.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

import medssm
from medssm import machine
from medssm.errors import UserError
from medssm.files import read_json, write_json
from medssm.nn.mixers import MIXERS
from medssm.options import Option
from medssm.segment.demo import figures
from medssm.segment.demo.baselines import looked_up_labels, mirrored_labels
from medssm.segment.demo.data import GAP_MM, SIDES, SOURCES, Brain, load_brain, whole, write_dataset
from medssm.segment.demo.report import write_report
from medssm.segment.evaluate import METRICS, evaluate
from medssm.segment.images import nifti, read_label
from medssm.segment.loop import LOG
from medssm.segment.predict import predict
from medssm.segment.train import train
from medssm.segment.view import NotInstalled, contents, viewer

# On two quiet cores (see the report for the processor) a step of both networks together takes about 0.7 seconds.
STEPS, FAST_STEPS, NSD_MM = 550, 200, 2.0
OURS, OURS_KWARGS = "medssm_unet", {"size": "tiny", "deep_supervision": False}
UNET = "monai.networks.nets.UNet"
UNET_KWARGS = {"channels": [16, 32, 64, 128], "strides": [2, 2, 2], "num_res_units": 2}  # 1.2 million parameters
# Chosen with the sides exchanged, trained on the left and tested on the right: what all networks share, and the learning rate of two of them, from
# 1e-3 to 8e-3. Any other network has the learning rate that `train` gives.
RECIPE = {"spacing": [1.0, 1.0, 1.0], "patch": [64, 64, 64], "batch": 2, "foreground": 2 / 3, "mirror": [0], "precision": "32-true"}
LEARNING_RATES = {OURS: 8e-3, UNET: 3e-3}
OVERLAP = 0.625  # of the windows in prediction: a network is least sure near a window's border
FAST = {"spacing": [3.0, 3.0, 3.0], "patch": [32, 32, 32]}
Side = Literal["left", "right"]


def structures(
    *,
    out: Path | str = "demo-out",
    data: Annotated[str, Option(choices=SOURCES)] = "icbm2009c",
    model: Sequence[str] = (OURS,),
    model_kwargs: Mapping[str, Any] | None = None,
    size: str | None = None,
    mixers: Annotated[Sequence[str], Option(flag="--mixer", choices=MIXERS)] = (),
    steps: int | None = None,
    trained: Side = "right",
    seed: int = 0,
    device: str = "auto",
    fast: bool = False,
    prepare: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train networks on one hemisphere of a real brain MRI, find the structures of the other one, and write a report.

    Beside the named networks it trains MONAI's U-Net, all for the same number of steps. A demo that was stopped goes on in its folder.

    Args: Files
        out: folder for all results
        data: the brain, icbm2009c or colin27
        prepare: write the data set, print the commands that use it, and stop
        overwrite: train anew in a folder that has a demo
    Args: Networks
        model: names from `medssm models`, or monai.networks.nets.NAME; several stand side by side in the report
        model_kwargs: more keywords for the first network
        size: the first network's size: tiny, small or base (default: tiny for medssm_unet, else the model's own)
        mixers: further networks: medssm_unet with each of these mixers
    Args: Training
        steps: training steps of each network (default: 550; with `fast` 200)
        trained: the hemisphere to train on, left or right; the other one is tested
        seed: of the weights and of the patches; the same seed gives the same result on the same machine
        device: auto, cpu, cuda, cuda:1 or mps
        fast: at 3 mm and in seconds: to see it work, not to see it good

    Returns:
        What metrics.json holds; with `prepare` {"out", "commands"}.

    Raises:
        UserError: the data is not installed, an argument is wrong, or `out` has another demo.
        KeyboardInterrupt: it was stopped. A network in training is saved, and the same call goes on from there.
    """
    out = Path(out)
    if data not in SOURCES:
        raise UserError(f"data: expected one of {', '.join(SOURCES)}, got {data!r}")
    if trained not in SIDES:
        raise UserError(f"trained: expected one of {', '.join(SIDES)}, got {trained!r}")
    if steps is not None and steps < 1:
        raise UserError(f"steps: expected 1 or more, got {steps}")
    names = [model] if isinstance(model, str) else list(model)
    shared = RECIPE | (FAST if fast else {}) | {"max_steps": steps or (FAST_STEPS if fast else STEPS)}
    nets = _networks(names, {**(model_kwargs or {}), **({"size": size} if size else {})}, list(mixers))
    recipes = {key: shared | ({"lr": LEARNING_RATES[name]} if name in LEARNING_RATES else {}) for key, (name, _) in nets.items()}
    brain = load_brain(data, trained)
    settings = {
        "data": data,
        "trained": trained,
        "seed": seed,
        "model": names[0] if len(names) == 1 else names,
        "model_kwargs": nets["ours"][1],
        **({"mixers": list(mixers)} if mixers else {}),
        **recipes["ours"],
    }
    keep_settings(out / "demo.json", settings, overwrite)
    say(f"data: {brain.source.title}", quiet)
    write_dataset(brain, out / "data")
    commands = _commands(brain, data, nets, mixers, recipes, seed, fast)
    if prepare:
        return {"out": str(out), "commands": commands}

    rows = []
    for i, (key, net) in enumerate(nets.items()):
        say(f"network {i + 1} of {len(nets)}: {_title(key, *net)}, {shared['max_steps']:,} training steps", quiet)
        rows.append(_network_row(out, brain, key, *net, recipes[key], seed=seed, device=device, overwrite=overwrite, quiet=quiet))
    for key, title, about, labels in _baselines(brain):
        nifti.write(_prediction(out, brain, key), labels, nifti.record(brain.image.slicer[brain.tested.box]))
        rows.append({"key": key, "title": title, "about": about, **scores(out / "predictions" / key, out / "data" / "labelsTs", brain.classes)})
    metrics = {
        "version": medssm.__version__,
        "seed": seed,
        "classes": [name for name, value in brain.classes.items() if value],
        "data": {"name": data, "title": brain.source.title, "credit": brain.source.credit},
        "overlap": OVERLAP,
        "split": {"trained": brain.trained.side, "tested": brain.tested.side, "gap_mm": GAP_MM},
        "recipe": shared,
        "nsd_mm": NSD_MM,
        "rows": rows,
        "checks": _checks(rows),
        "machine": machine.describe(),
        "commands": commands,
        "report": str(out / "report.html"),
    }
    say("figures and report", quiet)
    pictures = _draw(out, brain, rows)
    nifti.write(out / "labels.nii.gz", whole(brain, _labels(out, brain, "ours"), brain.tested), nifti.record(brain.image))
    write_json(out / "metrics.json", metrics)
    write_report(out / "report.html", metrics, pictures, _viewer(out, brain))
    return metrics


def _networks(names: Sequence[str], kwargs: Mapping[str, Any], mixers: Sequence[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """{key: (model, keywords)}: the first of `names` is "ours", the others and the mixers have their names as keys, MONAI's U-Net "monai"."""
    if not names or len(set(names)) < len(names):
        raise UserError(f"model: expected different names, got {', '.join(names) or 'none'}")
    nets: dict[str, tuple[str, dict[str, Any]]] = {
        key: (name, dict(OURS_KWARGS) if name == OURS else {}) for key, name in zip(("ours", *names[1:]), names, strict=True)
    }
    nets["ours"][1].update(kwargs)
    if len(set(mixers)) < len(mixers):
        raise UserError(f"mixer: expected different names, got {', '.join(mixers)}")
    shared = nets["ours"][1] if names[0] == OURS else OURS_KWARGS
    return {**nets, **{mixer: (OURS, {**shared, "mixer": mixer}) for mixer in mixers}, "monai": (UNET, UNET_KWARGS)}


def _network_row(
    out: Path, brain: Brain, key: str, model: str, kwargs: Mapping, recipe: Mapping, *, seed: int, device: str, overwrite: bool, quiet: bool
) -> dict:
    """Train a network (or go on where it was stopped), segment the tested side, and compare."""
    weights, title = out / "networks" / key, _title(key, model, kwargs)
    try:
        trained = train(
            out / "data",
            weights,
            model=model,
            model_kwargs=dict(kwargs),
            validations=0,
            seed=seed,
            device=device,
            resume=not overwrite,
            overwrite=overwrite,
            quiet=quiet,
            **recipe,
        )
    except KeyboardInterrupt:
        say(f"{title}: stopped and saved; the same command goes on from here", quiet)
        raise
    say(f"{title}: predicting", quiet)
    begun = time.perf_counter()
    predict(weights, out / "data" / "imagesTs", out / "predictions" / key, overlap=OVERLAP, device=device, quiet=quiet)
    settings = ", ".join(f"{name} {value}" for name, value in kwargs.items()) or "its defaults"
    about = f"{model} with {settings}: {trained['parameters']:,} parameters, {trained['steps']:,} training steps in {trained['seconds']:.0f} seconds."
    return {
        "key": key,
        "title": title,
        "about": about,
        "parameters": trained["parameters"],
        "steps": trained["steps"],
        "lr": trained["lr"],
        "seconds": trained["seconds"],
        "predict_seconds": round(time.perf_counter() - begun, 2),
        **scores(out / "predictions" / key, out / "data" / "labelsTs", brain.classes),
    }


def _baselines(brain: Brain) -> Iterator[tuple[str, str, str, np.ndarray]]:
    """(key, title, what it is, labels of the tested side) for each answer that needs no network."""
    side = brain.trained.side
    yield (
        "mirrored",
        "mirrored labels",
        f"The labels drawn on the {side} side, reflected at the midline; the image is not looked at.",
        mirrored_labels(brain),
    )
    yield (
        "look_up",
        "look-up table",
        f"Each voxel by its intensity alone: a table from intensity to class, fitted for the mean Dice of the {side} side.",
        looked_up_labels(brain),
    )


def scores(labels: Path, references: Path, classes: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """{metric: {class: value, "mean": value}} of a folder of label maps."""
    result = evaluate(labels, references, classes=classes, nsd_mm=NSD_MM, quiet=True)
    rows = {**result["classes"], "mean": result["mean"]}
    return {metric: {name: row[metric]["mean"] for name, row in rows.items()} for metric in METRICS}


def _checks(rows: list[dict[str, Any]]) -> dict[str, float | bool]:
    """How the first network compares with MONAI's U-Net and with intensity alone."""
    ours, monai, look_up = ({row["key"]: row["dice"] for row in rows}[key] for key in ("ours", "monai", "look_up"))
    return {"ours_minus_monai": ours["mean"] - monai["mean"], "above_look_up_in_every_class": all(ours[name] > look_up[name] for name in ours)}


def _draw(out: Path, brain: Brain, rows: list[dict]) -> dict[str, Path]:
    pictures = {name: out / f"{name}.png" for name in ("found", "overlays", "split", "dice", "curves")}
    shown = {f"{row['title']}, Dice {row['dice']['mean']:.2f}": _labels(out, brain, row["key"]) for row in rows if row["key"] != "look_up"}
    figures.draw_found(brain, _labels(out, brain, "ours"), pictures["found"])
    figures.draw_overlays(brain, brain.labels[brain.tested.box], shown, pictures["overlays"])
    figures.draw_split(brain, _labels(out, brain, "ours"), pictures["split"])
    figures.draw_dice({row["title"]: row["dice"] for row in rows}, pictures["dice"])
    figures.draw_curves({row["title"]: out / "networks" / row["key"] / LOG for row in rows if "steps" in row}, pictures["curves"])
    return pictures


def _viewer(out: Path, brain: Brain) -> str | None:
    """A page to look through the tested side with what the first network found and what was drawn; None where NiiVue is not installed."""
    scan, drawn = (
        out / "data" / folder / name
        for folder, name in (("imagesTs", f"{brain.tested.side}_0000.nii.gz"), ("labelsTs", f"{brain.tested.side}.nii.gz"))
    )
    try:
        return viewer(contents(scan, [_prediction(out, brain, "ours"), drawn], brain.classes))
    except NotInstalled:
        return None


def _commands(brain: Brain, data: str, nets: Mapping, mixers: Sequence[str], recipes: Mapping, seed: int, fast: bool) -> list[str]:
    """The demo as one command, then as those it is made of, run in its folder."""
    kwargs = nets["ours"][1]
    models = [name for key, (name, _) in nets.items() if key != "monai" and key not in mixers]
    options = [
        "--data",
        data,
        "--trained",
        brain.trained.side,
        "--model",
        *models,
        "--model-kwargs",
        json.dumps(kwargs),
        *(["--mixer", *mixers] if mixers else []),
        "--steps",
        str(recipes["ours"]["max_steps"]),
        "--seed",
        str(seed),
    ]
    commands = [shlex.join(["medssm", "demo", "structures", *options, *["--fast"] * fast])]
    for key, (model, kwargs) in nets.items():
        flags = [word for name, value in recipes[key].items() for word in _flag(name, value)]
        commands += [
            shlex.join(
                ["medssm", "train", "data", f"networks/{key}", "--model", model, "--model-kwargs", json.dumps(kwargs), *flags, "--seed", str(seed)]
            ),
            f"medssm predict networks/{key} data/imagesTs predictions/{key} --overlap {OVERLAP:g}",
            f"medssm evaluate predictions/{key} data/labelsTs --classes data/dataset.json",
        ]
    return commands


def _flag(name: str, value: int | float | str | list[int] | list[float]) -> list[str]:
    """A keyword of `train` as the command takes it."""
    words = [f"{word:g}" if isinstance(word, float) else str(word) for word in (value if isinstance(value, list) else [value])]
    return [f"--{name.replace('_', '-')}", *([",".join(words)] if name == "mirror" else words)]


def keep_settings(path: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Write the settings into a new folder; UserError if the folder has a demo with other settings."""
    settings = json.loads(json.dumps(settings))
    before = read_json(path) if path.exists() and not overwrite else settings
    other = [f"{name} {before.get(name)}, now {value}" for name, value in settings.items() if before.get(name) != value]
    if other:
        raise UserError(f"out: {path.parent} has a demo with {'; '.join(other)}: name another folder, or pass --overwrite")
    write_json(path, settings)


def _prediction(out: Path, brain: Brain, key: str) -> Path:
    return out / "predictions" / key / f"{brain.tested.side}.nii.gz"


def _labels(out: Path, brain: Brain, key: str) -> np.ndarray:
    """A row's label map of the tested side."""
    return read_label(_prediction(out, brain, key))[0]


def _title(key: str, model: str, kwargs: Mapping[str, Any]) -> str:
    name = "MONAI U-Net" if key == "monai" else model.rpartition(".")[2]
    name = f"{name} {kwargs['size']}" if "size" in kwargs else name
    return f"{name}, {kwargs['mixer']}" if "mixer" in kwargs else name


def say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)
