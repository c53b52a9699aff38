"""medssm evaluate: Dice, HD95 and surface Dice of predicted label maps against references, class by class, in millimetres.

A class that is empty in both is left out of that case and counted; empty in one it is Dice 0, NSD 0 and an HD95 of the image's diagonal.
Intervals are 95 % bootstrap percentiles over patients, never over voxels, and only from five patients on.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from scipy import ndimage

from medssm.errors import UserError
from medssm.files import begins_with, first_line, protect, read_json, write_bytes, write_json
from medssm.options import Option
from medssm.segment.cases import Case, one_of_each_name
from medssm.segment.data import load_classes
from medssm.segment.images import Image, label_files, read_label, say, strip_ending
from medssm.segment.inputs import DATALIST, folders_below, references_of, scans_of
from medssm.segment.metrics import compare
from medssm.segment.patients import patient_of
from medssm.segment.progress import progress
from medssm.segment.uncertainty.sums import MAPS, PROBABILITIES

METRICS = ("dice", "hd95", "nsd")
_COLUMNS = ("case", "class", *METRICS)
_FEWEST = 5  # patients that an interval is given for
_DRAWS = 2000


def evaluate(
    predictions: Path | str,
    references: Path | str,
    *,
    classes: Mapping[str, int | Sequence[int]] | Path | str | None = None,
    section: str | None = None,
    nsd_mm: float = 2.0,
    ignore: int | None = None,
    patient: str | None = None,
    seed: int = 0,
    uncertainty: Path | str | None = None,
    images: Path | str | None = None,
    overwrite: bool = False,
    json_file: Path | str | None = None,
    csv_file: Annotated[Path | str | None, Option(flag="--csv")] = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Compare predicted label maps with references, class by class, in millimetres: Dice, HD95 and surface Dice.

    Args: Files
        predictions: image file, or a folder with all that is below it
        references: image file, a folder with files of the same names and places, or a datalist (.json) with labels, such as train's cases.json
        classes: dataset.json or weights folder that names the classes or regions, or {name: value or values} (default: every value in the files)
        section: of a datalist (default: testing or test, or the only one)
        json_file: file to write the result to as JSON
        csv_file: file to write a row to for each case and class
        uncertainty: folder for uncertainty.html and uncertainty.json: whether the maps and intervals beside the predictions, as of medssm predict
            --uncertainty, are of any use
        images: folder or list of the scans, for that page's pictures (default: those of a datalist)
        overwrite: write over files of other origin with `json_file`, `csv_file` and `uncertainty`
    Args: Metrics
        nsd_mm: tolerance of the surface Dice in millimetres
        ignore: value in the references whose voxels count for nothing (default: the ignore label of `classes`)
        patient: regular expression whose first group in a case's name is the patient, as in '(sub-[0-9]+)' (default: the entry patient of a datalist,
            or every case is one)
        seed: of the bootstrap

    Returns:
        {"cases": {case: {class: {metric: value} or None}}, "classes": {class: {"n", "empty_in_both", metric: {"mean", "low", "high"}}},
        "mean": the same over the classes of each case, "patients", "nsd_mm", "unused", "failed": {case: reason}}; low and high are None below five
        patients. A case whose prediction is missing, lies on another grid or holds a value that is no class has failed; the others are compared.
        With `uncertainty` also "uncertainty", as `uncertainty.worth.assess` gives it.

    Raises:
        UserError: where nothing can be compared.
    """
    if not 0 <= nsd_mm < np.inf:
        raise UserError(f"nsd_mm: expected 0 or more millimetres, got {nsd_mm}")
    names, ignored = (None, None) if classes is None else named(classes)
    ignore = ignored if ignore is None else ignore
    pairs, missing, unused, listed = _pairs(Path(predictions), Path(references), section)
    patients = {name: patient_of(name, patient, "patient") if patient is not None else listed.get(name, name) for name in pairs}
    read = [file for pair in pairs.values() for file in pair] + ([] if classes is None or isinstance(classes, Mapping) else [Path(classes)])
    for argument, file, made in (("json_file", json_file, _is_result), ("csv_file", csv_file, _is_table)):
        if file:
            protect(Path(file), reads=read, made=made, overwrite=overwrite, argument=argument)
    if uncertainty is not None:
        from medssm.segment.uncertainty import page, worth  # with matplotlib

        page.check(Path(uncertainty), read, overwrite)
        scans = scans_of(None if images is None else Path(images), Path(references), section)
    cases, failed = {}, dict(missing)
    files: list[Image] = []
    with progress("evaluating", quiet) as show:
        for i, (name, (prediction, reference)) in enumerate(pairs.items()):
            try:
                predicted, truth, grid = read_pair(prediction, reference, names, ignore, files)
                cases[name] = scores(predicted, truth, grid.spacing.tolist(), names, nsd_mm)
            except UserError as error:
                failed[name] = str(error)
            except (MemoryError, OSError) as error:
                failed[name] = f"{prediction}: {type(error).__name__}: {first_line(error)}"
            show((i + 1) / len(pairs), name)
    say(files)
    if not cases:
        raise UserError("\n".join(failed.values()))
    found = dict.fromkeys(label for case in cases.values() for label in case)
    labels = list(found) if names else sorted(found, key=int)
    cases = {name: {label: case.get(label) for label in labels} for name, case in cases.items()}
    result: dict[str, Any] = {
        "nsd_mm": nsd_mm,
        "patients": len({patients[name] for name in cases}),
        "unused": unused,
        "failed": failed,
        "cases": cases,
        "classes": {label: _summary({name: case[label] for name, case in cases.items()}, patients, seed) for label in labels},
        "mean": _summary({name: _over_classes(case) for name, case in cases.items()}, patients, seed),
    }
    if uncertainty is not None:
        scored = {name: pairs[name] for name in cases}
        with progress("uncertainty", quiet) as show:
            result["uncertainty"] = worth.assess(scored, Path(predictions), names, ignore, lambda values: bootstrap(values, patients, seed), show)
        dice = {name: (_over_classes(case) or {}).get("dice") for name, case in cases.items()}
        page.write(Path(uncertainty), result["uncertainty"], scored, dice, names, ignore, scans)
    if json_file:
        write_json(Path(json_file), result)
    if csv_file:
        write_bytes(Path(csv_file), _csv(cases).encode())
    return result


def show(result: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Print the summary by class, with intervals or the reason why there are none."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(result['cases'])} case(s) of {result['patients']} patient(s)")
    for heading in ("class", "Dice", "HD95 mm", f"surface Dice {result['nsd_mm']:g} mm", "cases", "empty in both"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for name, row in {**result["classes"], "mean": result["mean"]}.items():
        table.add_row(
            name,
            *(_cell(row[metric], digits) for metric, digits in zip(METRICS, (3, 1, 3), strict=True)),
            str(row["n"]),
            str(row["empty_in_both"]),
            end_section=name == list(result["classes"])[-1],
        )
    console = Console()
    console.print(table)
    if result["patients"] < _FEWEST:
        console.print(f"no interval: {result['patients']} patient(s), at least {_FEWEST} are needed")
    if "uncertainty" in result:
        from medssm.segment.uncertainty.worth import said

        console.print("\n".join(said(result["uncertainty"])))
        console.print(f"written: {Path(options['uncertainty']) / 'uncertainty.html'}")


def bootstrap(values: Mapping[str, float], patients: Mapping[str, str], seed: int = 0) -> tuple[float, float] | None:
    """The 95 % percentile interval of the mean of the cases' values, with patients drawn anew; None below five patients."""
    groups: dict[str, list[float]] = {}
    for case, value in values.items():
        groups.setdefault(patients[case], []).append(value)
    if len(groups) < _FEWEST:
        return None
    sums, counts = np.array([sum(group) for group in groups.values()]), np.array([len(group) for group in groups.values()])
    drawn = np.random.default_rng(seed).integers(len(groups), size=(_DRAWS, len(groups)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), (2.5, 97.5))
    return float(low), float(high)


def read_pair(
    prediction: Path, reference: Path, names: Mapping[str, tuple[int, ...]] | None, ignore: int | None, files: list[Image]
) -> tuple[np.ndarray, np.ndarray, Image]:
    """A prediction and its reference on the reference's grid, and the reference's file. Both files are added to `files`.

    Raises UserError where one cannot be read, the prediction lies on another grid, or a value is none of the classes' `names`.
    """
    truth, file = read_label(reference)
    found, found_file = read_label(prediction, file)
    files += [file, found_file]
    if ignore is not None:
        found, truth = (np.where(truth == ignore, 0, data) for data in (found, truth))
    known = {0, *(value for values in (names or {}).values() for value in values)}
    for path, data in ((prediction, found), (reference, truth)):
        if names is not None and (strange := sorted(set(np.unique(data).tolist()) - known)):
            raise UserError(f"{path}: label value(s) {', '.join(map(str, strange[:8]))} outside the classes {sorted(known)}")
    return found, truth, file


def scores(
    found: np.ndarray, truth: np.ndarray, spacing: Sequence[float], names: Mapping[str, tuple[int, ...]] | None, nsd_mm: float
) -> dict[str, dict[str, float] | None]:
    """{class: its metrics, or None where it is in neither label map}; without `names` every value of either is a class."""
    boxes = _boxes(found), _boxes(truth)
    wanted = names or {str(value): (value,) for value in boxes[0] | boxes[1]}
    result: dict[str, dict[str, float] | None] = {name: None for name, values in wanted.items() if values != (0,)}
    for name in result:
        values = wanted[name]
        parts = [table[value] for table in boxes for value in values if value in table]
        if not parts:
            continue
        box = tuple(slice(min(part.start for part in axis), max(part.stop for part in axis)) for axis in zip(*parts, strict=True))
        result[name] = compare(np.isin(found[box], values), np.isin(truth[box], values), spacing, nsd_mm, truth.shape)
    return result


def _boxes(data: np.ndarray) -> dict[int, tuple[slice, ...]]:
    """For every value in a label map the box that holds all of it: what is compared, in place of the whole volume."""
    values, positions = np.unique(data, return_inverse=True)
    return dict(zip(values.tolist(), ndimage.find_objects(positions.reshape(data.shape) + 1), strict=True))


def named(classes: Mapping[str, int | Sequence[int]] | Path | str) -> tuple[dict[str, tuple[int, ...]], int | None]:
    """{class or region: its values}, and the ignored value."""
    table, ignore = (classes, None) if isinstance(classes, Mapping) else load_classes(Path(classes))
    return {name: (values,) if isinstance(values, int) else tuple(values) for name, values in table.items()}, ignore


def _pairs(
    predictions: Path, references: Path, section: str | None
) -> tuple[dict[str, tuple[Path, Path]], dict[str, str], list[str], dict[str, str]]:
    """{case: (prediction, reference)}, {case: that its prediction is missing}, predictions without a reference, and {case: its listed patient}."""
    for path in (predictions, references):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    listed = references.suffix == DATALIST
    if section and not listed:
        raise UserError(f"section: expected a datalist ({DATALIST}) as references, got {references}")
    if predictions.is_file() and not listed:
        reference = references if references.is_file() else _named_like(predictions, references)
        return {strip_ending(predictions): (predictions, reference)}, {}, [], {}
    if predictions.is_file():
        raise UserError(f"predictions: expected a folder, as the references are a list, got the file {predictions}")
    if references.is_file() and not listed:
        raise UserError(f"references: expected a folder as the predictions are, got the file {references}")
    found = by_name(predictions)
    wanted, patients = references_of(references, section) if listed else (by_name(references), {})
    if not wanted:
        raise UserError(f"{references}: no image in this folder")
    own = {f"{name}_{what}" for name in found for what in (*MAPS, PROBABILITIES)}  # what predict writes beside a label map
    missing = {name: f"{predictions}: no prediction for {name}" for name in sorted(wanted.keys() - found.keys())}
    return (
        {name: (found[name], wanted[name]) for name in sorted(wanted) if name in found},
        missing,
        sorted(found.keys() - wanted.keys() - own),
        patients,
    )


def by_name(folder: Path) -> dict[str, Path]:
    """{name: file} of a folder and those below it; a name is the path below the folder, without the ending."""
    files = [file for place in folders_below(folder) for file in label_files(place)]
    cases = one_of_each_name([Case((file.parent.relative_to(folder) / strip_ending(file)).as_posix(), (file,)) for file in files])
    return {case.name: case.images[0] for case in cases}


def _is_result(file: Path) -> bool:
    """Whether a file holds a result of this command as JSON."""
    try:
        table = read_json(file)
    except UserError:
        return False
    return isinstance(table, dict) and {"nsd_mm", "patients", "cases", "classes"} <= table.keys()


def _is_table(file: Path) -> bool:
    """Whether a file is this command's table."""
    return begins_with(file, ",".join(_COLUMNS) + "\n")


def _named_like(prediction: Path, folder: Path) -> Path:
    for file in label_files(folder):
        if strip_ending(file) == strip_ending(prediction):
            return file
    raise UserError(f"{folder}: no reference for {prediction.name}")


def _over_classes(case: Mapping[str, dict | None]) -> dict | None:
    """Each metric's mean over the classes that a case has."""
    rows = [row for row in case.values() if row]
    return {metric: sum(row[metric] for row in rows) / len(rows) for metric in METRICS} if rows else None


def _summary(rows: Mapping[str, dict | None], patients: Mapping[str, str], seed: int) -> dict:
    """Mean and interval of each metric over the cases that have it."""
    kept = {case: row for case, row in rows.items() if row}
    summary: dict[str, Any] = {"n": len(kept), "empty_in_both": len(rows) - len(kept)}
    for metric in METRICS:
        values = {case: row[metric] for case, row in kept.items()}
        low, high = bootstrap(values, patients, seed) or (None, None)
        summary[metric] = {"mean": sum(values.values()) / len(values) if values else None, "low": low, "high": high}
    return summary


def _csv(cases: Mapping[str, Mapping[str, dict | None]]) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(_COLUMNS)
    for case, table in cases.items():
        for label, row in table.items():
            rows.writerow((case, label, *(f"{row[metric]:.6g}" if row else "" for metric in METRICS)))
    return text.getvalue()


def _cell(value: dict, digits: int) -> str:
    if value["mean"] is None:
        return "-"
    interval = "" if value["low"] is None else f" [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"
    return f"{value['mean']:.{digits}f}{interval}"
