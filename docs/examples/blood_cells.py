"""Red cells, white cells and platelets of blood smears: a network of medssm's against a CNN of timm's, split by smear.

    python docs/examples/blood_cells.py DATA OUT [--networks NAME ...] [--folds 3] [--steps 300] [--seed 0]

DATA is a folder of classes with a CSV that names the smear of each cell, OUT a folder for the trainings and the results. The smears are divided into
folds. For each fold and network: the cells of the other folds are the data set of `medssm train --task classify`, which holds a fifth of their smears
out to fit the temperature; then `medssm predict` classifies the fold's own cells, which nothing has seen. `medssm evaluate` scores the cells of all
folds together, with intervals over smears. All networks see the same cells in the same order, with the same recipe and as many steps. An interrupt
loses nothing: call it again.

The cells, 64 x 64 pictures of 364 smears cut out of the BCCD data set (MIT licence), are not part of medssm.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import subprocess
from pathlib import Path

import numpy as np

from medssm import machine
from medssm.classify.evaluate import evaluate
from medssm.classify.figures import figures, weighted
from medssm.classify.folds import assign
from medssm.classify.predict import predict
from medssm.classify.predictions import read_predictions, write_predictions
from medssm.classify.table import load_samples
from medssm.classify.train import train
from medssm.files import write_json

# Names, and train's arguments. At 64 x 64 both networks have 0.15 G multiply-adds and 11 M parameters.
NETWORKS = {
    "vmamba": {"model": "vmamba", "model_kwargs": {"features": [64, 128, 256, 512], "depths": [2, 2, 5, 2]}},
    "resnet18": {"model": "timm:resnet18"},
}
RECIPE = {"batch": 32, "ema": 0.99, "mixup": 0.0, "smoothing": 0.0, "class_weights": "none", "rotate": 180.0, "precision": "32-true"}
DIFFERENCES = ("balanced_accuracy", "accuracy", "auroc", "f1", "ece")


def main() -> None:
    """Train, predict and evaluate what is not there yet, then write the summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    samples, _ = load_samples(given.data)
    parts = assign([str(s.label) for s in samples], [s.unit for s in samples], given.folds, given.seed)
    for fold in range(given.folds):
        for name in given.networks:
            done = given.out / f"{name}-fold{fold}.json"
            if done.exists():
                continue
            files = {}
            for kind, chosen in (("training", [p != fold for p in parts]), ("test", [p == fold for p in parts])):
                files[kind] = given.out / f"{kind}-fold{fold}.csv"
                with open(_made(files[kind]), "w", newline="") as file:
                    rows = csv.writer(file)
                    rows.writerow(("path", "label", "group"))
                    rows.writerows((s.path.resolve(), s.label, s.group) for s, kept in zip(samples, chosen, strict=True) if kept)
            run, found = given.out / f"{name}-fold{fold}", given.out / f"{name}-fold{fold}.csv"
            options = {**RECIPE, **NETWORKS[name], "max_steps": given.steps, "seed": given.seed, "device": "cpu"}
            trained: dict = train(files["training"], run, resume=True, **options)
            predict(run, files["test"], found, device="cpu")
            scores = evaluate(found, files["test"], quiet=True)
            split = {kind: sorted({s.group for s, p in zip(samples, parts, strict=True) if (p == fold) == (kind == "test")}) for kind in files}
            kept = ("model", "parameters", "images", "groups", "validation_images", "validation_groups", "steps", "seconds", "temperature")
            write_json(
                done,
                {
                    "network": name,
                    "fold": fold,
                    "folds": given.folds,
                    "seed": given.seed,
                    "options": options,
                    "training": {key: trained[key] for key in kept},
                    "test": {key: scores[key] for key in ("images", "groups", "figures", "recall", "confusion", "reliability")},
                    "smears": split,
                    "machine": machine.describe(),
                    "commit": commit,
                },
            )
    _summarise(given.out, given.networks, given.folds, given.data)


def _summarise(out: Path, networks: list[str], folds: int, data: Path) -> None:
    """All folds of each network together, and the paired differences from the last network."""
    summary: dict = {"networks": {}, "differences": {}}
    tables = {}
    for name in networks:
        parts = [read_predictions(out / f"{name}-fold{fold}.csv") for fold in range(folds)]
        samples, probabilities, classes = [s for part in parts for s in part[0]], np.concatenate([part[1] for part in parts]), parts[0][2]
        write_predictions(out / f"{name}.csv", samples, probabilities, classes)
        scores = evaluate(out / f"{name}.csv", data, quiet=True)
        summary["networks"][name] = {key: scores[key] for key in ("images", "groups", "figures", "recall", "confusion", "reliability")}
        summary["networks"][name]["predictions"] = hashlib.sha256((out / f"{name}.csv").read_bytes()).hexdigest()
        tables[name] = samples, probabilities
    known = {s.path.resolve(): s for s in load_samples(data)[0]}
    *others, last = networks
    for name in others:
        summary["differences"][f"{name} - {last}"] = _differences(tables[name], tables[last], known, list(classes))
    write_json(out / "summary.json", summary)
    print(json.dumps({name: row["figures"] for name, row in summary["networks"].items()} | summary["differences"], indent=1))


def _differences(one: tuple, other: tuple, known: dict, classes: list[str], draws: int = 2000) -> dict:
    """One network's figures minus the other's on the same cells, with 95 % percentile intervals over smears that both share."""
    truth = [known[s.path.resolve()] for s in one[0]]
    assert [s.path for s in one[0]] == [s.path for s in other[0]]
    labels = np.array([classes.index(s.label) for s in truth])
    names, member = np.unique([s.unit for s in truth], return_inverse=True)
    times = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)[:, member].astype(float)
    drawn = [weighted(labels, table[1], times) for table in (one, other)]
    value = [figures(labels.tolist(), table[1], ["one"] * len(labels)) for table in (one, other)]
    result = {}
    for key in DIFFERENCES:
        low, high = np.percentile(drawn[0][key] - drawn[1][key], (2.5, 97.5))
        result[key] = {"value": value[0][key]["value"] - value[1][key]["value"], "low": float(low), "high": float(high)}
    return result


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


if __name__ == "__main__":
    main()
