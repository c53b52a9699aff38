"""medssm evaluate for a classifier: a CSV of predictions against the labels of a CSV, of a folder of classes, or of a training's cases.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medssm.classify.figures import FEWEST, FIGURES, confusion, figures, recalls, reliability
from medssm.classify.predictions import read_predictions
from medssm.classify.table import CSV, Columns, Sample, load_samples
from medssm.errors import UserError
from medssm.files import protect, read_json, write_json
from medssm.segment.inputs import DATALIST


def evaluate(
    predictions: Path | str,
    references: Path | str,
    *,
    path_column: str | None = None,
    label_column: str | None = None,
    group_column: str | None = None,
    group: str | None = None,
    section: str = "validation",
    seed: int = 0,
    overwrite: bool = False,
    json_file: Path | str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Score a classifier's CSV: accuracy, balanced accuracy, AUROC, F1, NLL and ECE, with intervals over groups, and what was taken for what.

    Args: Files
        predictions: the CSV that medssm predict wrote
        references: CSV with labels, folder with a subfolder for each class, or cases.json of a training
        path_column: of the references (default: path, file, image or another usual name)
        label_column: of the references (default: label, class, diagnosis or another usual name)
        group_column: of the references (default: group, patient, subject or another usual name; where they name none, that of the predictions)
        group: regular expression whose first group in an image's path is its group
        section: of cases.json
        json_file: file to write the result to as JSON
        overwrite: write over a file of other origin with `json_file`
    Args: Figures
        seed: of the bootstrap

    Returns:
        {"images", "groups", "classes", "figures": {figure: {"value", "low", "high"}}, "recall": {class: value}, "confusion": a row for each class,
        "reliability": the bins of the confidence, "unused": images without a prediction}; low and high are None below five groups.

    Raises:
        UserError: where a prediction has no reference, a class is not among those predicted, or a file cannot be read.
    """
    predictions, references = Path(predictions), Path(references)
    found, probabilities, classes = read_predictions(predictions)
    known = _references(references, Columns(path_column, label_column, group_column), group, section)
    if json_file:
        reads = [predictions, *([references] if references.is_file() else [])]
        protect(Path(json_file), reads=reads, made=_is_result, overwrite=overwrite, argument="json_file")
    by_path = {sample.path.resolve(): sample for sample in known}
    by_name = {sample.name: sample for sample in known}
    truth: list[Sample] = []
    for sample in found:
        reference = by_path.get(sample.path.resolve()) or by_name.get(sample.name)
        if reference is None:
            raise UserError(f"{references}: no label for {sample.path}")
        if reference.label not in classes:
            raise UserError(f"{references}: {sample.path} has the label {reference.label}, which is none of the classes {', '.join(classes)}")
        truth.append(Sample(sample.name, sample.path, reference.label, reference.group or sample.group))
    labels = np.array([classes.index(str(sample.label)) for sample in truth])
    groups = [sample.unit for sample in truth]
    result = {
        "images": len(truth),
        "groups": len(set(groups)),
        "classes": list(classes),
        "figures": figures(labels.tolist(), probabilities, groups, seed),
        "recall": recalls(labels, probabilities.argmax(1), classes),
        "confusion": confusion(labels, probabilities.argmax(1), len(classes)),
        "reliability": reliability(labels, probabilities),
        "unused": sorted({sample.name for sample in known} - {(by_path.get(s.path.resolve()) or by_name[s.name]).name for s in found}),
    }
    if json_file:
        write_json(Path(json_file), result)
    return result


def show(result: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Print the figures, and what was taken for what."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{result['images']} image(s) of {result['groups']} group(s)")
    for heading in ("figure", "value", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for key, name in FIGURES.items():
        value, low, high = (result["figures"][key][part] for part in ("value", "low", "high"))
        table.add_row(name, "-" if value is None else f"{value:.3f}", "" if low is None else f"{low:.3f} to {high:.3f}")
    console.print(table)
    table = Table(title="rows: classes; columns: as found")
    for heading in ("", *result["classes"], "recall"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, row in zip(result["classes"], result["confusion"], strict=True):
        table.add_row(name, *map(str, row), f"{result['recall'][name]:.3f}" if name in result["recall"] else "")
    console.print(table)
    if result["groups"] < FEWEST:
        console.print(f"no interval: {result['groups']} group(s), at least {FEWEST} are needed")


def _references(path: Path, columns: Columns, group: str | None, section: str) -> list[Sample]:
    """The labelled images that predictions are held against."""
    if path.suffix.lower() != DATALIST:
        return load_samples(path, columns, group)[0]
    table: Any = read_json(path)
    entries = table.get(section) if isinstance(table, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and {"name", "image", "label"} <= entry.keys() for entry in entries):
        raise UserError(f"{path}: expected cases.json of a classifier's training, with the section {section}, or a CSV ({CSV})")
    return [Sample(entry["name"], path.parent / entry["image"], entry["label"], entry.get("group")) for entry in entries]


def _is_result(file: Path) -> bool:
    """Whether a file holds a result of this command as JSON."""
    try:
        table = read_json(file)
    except UserError:
        return False
    return isinstance(table, dict) and {"figures", "recall", "confusion", "reliability"} <= table.keys()
