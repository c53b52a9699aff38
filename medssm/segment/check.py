"""medssm check: what a data set holds, and what training would refuse or get wrong, before any step.

Each file is read once, one case at a time. The rules are those of `train`, by the same functions; rules of this file's own are about what `train`
would go on with: a channel that is called CT and has no negative value, two cases of equal content, spacings far from the others.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import torch

from medssm.errors import UserError
from medssm.files import first_line, protect, write_text
from medssm.segment import intensity, pages
from medssm.segment.cases import Case
from medssm.segment.data import Dataset, absent_classes, check_values, counted_channels, described, faults, read_for, split, unnamed_classes
from medssm.segment.fit import fit_mirror, fit_slice_axis, is_oriented, wrong_units
from medssm.segment.images import Image, lengths, not_finite, ras_grid, read_image, read_label
from medssm.segment.progress import progress
from medssm.segment.regions import structures
from medssm.segment.sides import pairs, sided, unnamed

REPORT = "check.html"
_GENERATOR = "medssm check"
_APART = 3.0  # times: a spacing further from the cases' median is worth a look
_LARGE_MM = 20.0  # no scanner has voxels with larger edges
_PIXELS = 110  # of a thumbnail's longer edge
_LISTED = 5  # lines of one kind that are printed; the page and the JSON have all
_SAMPLES = 2**20  # voxels of an image that percentiles are taken from


@dataclass(frozen=True)
class Finding:
    """What the owner of a data set should know: an "error" is refused by `train`, a "warning" is trained on and may be wrong, a "note" is neither."""

    level: Literal["error", "warning", "note"]
    kind: str
    file: str
    text: str


def check(
    dataset: Path | str,
    *,
    out: Path | str | None = None,
    strict: bool = False,
    modality: Sequence[Literal["ct", "mri", "other", "none"]] | None = None,
    nan: float | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Look at every file of a data set before training: what it holds, and what is wrong with it.

    Args: Data
        dataset: folder with dataset.json (nnU-Net), or a MONAI datalist's JSON file
        modality: as for `medssm train`
        nan: as for `medssm train`: voxels that are not finite are then no error
    Args: Result
        out: folder or .html file for a page with a picture of each case (default: no page)
        strict: exit status 1 also where there are warnings
        overwrite: write over a page of other origin

    Returns:
        {"name", "listed": cases in the description, "channels": {name: {"scheme", ...}}, "classes": {name: {"value", "cases", "voxels", "ml"}},
        "shape", "spacing", "orientations", "sides", "mirror", "cases": {name: what is in it}, "findings", "report", "failed"}. Shapes and spacings
        (mm) are along the RAS axes. What differs from case to case is {"smallest", "median", "largest"}. `failed` has the errors, and with `strict`
        the warnings.

    Raises:
        UserError: the description of the data set cannot be read or contradicts itself.
    """
    findings: list[Finding] = []
    table = described(dataset, lambda line: findings.append(Finding("error", "description", line.partition(": ")[0], line)))
    report = None if out is None else Path(out) if str(out).endswith(".html") else Path(out) / REPORT
    if report:
        protect(report, reads=read_for(dataset, table), made=lambda path: pages.is_made_by(_GENERATOR, path), overwrite=overwrite)
    channels = table.channels or counted_channels(table.cases)
    table, schemes = replace(table, channels=channels), intensity.schemes(channels, modality)
    seen: dict[str, dict[str, Any]] = {}
    with progress("checking", quiet) as show:
        for i, case in enumerate(table.cases):
            try:
                found = _look(case, table, schemes, nan, findings, picture=report is not None)
                if found:
                    seen[case.name] = found
            except UserError as error:
                findings.append(Finding("error", "unreadable", str(case.images[0]), str(error)))
            except (MemoryError, OSError) as error:
                findings.append(Finding("error", "unreadable", str(case.images[0]), f"{case.images[0]}: {type(error).__name__}: {first_line(error)}"))
            show((i + 1) / len(table.cases), case.name)
    values = {value for case in seen.values() for value in case["voxels"]}
    classes = table.classes or unnamed_classes(values - {table.ignore})
    findings += _of_all(table, seen, classes, values)
    findings.sort(key=lambda finding: ("error", "warning", "note").index(finding.level))
    result = _summary(table.name, channels, schemes, classes, list(structures(classes, table.regions)), seen) | {
        "listed": len(table.cases),
        "cases": {name: {key: value for key, value in case.items() if key not in ("picture", "digest")} for name, case in seen.items()},
        "findings": [asdict(finding) for finding in findings],
        "report": str(report) if report else None,
        "failed": dict(enumerate(finding.text for finding in findings if finding.level == "error" or (strict and finding.level == "warning"))),
    }
    if report:
        page = pages.page(
            "check.html",
            _GENERATOR,
            result=result,
            facts=_facts(result),
            groups=_grouped(findings, ("error", "warning", "note")),
            pictures={name: case["picture"] for name, case in seen.items()},
            of_case={name: [f for f in findings if f.file in case["files"]] for name, case in seen.items()},
            colours=dict(zip((name for name, value in classes.items() if value), _colours(classes.values()), strict=True)),
        )
        write_text(report, page)
    return result


def show(result: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Print the summary and what was found; errors, and warnings with `strict`, go to standard error instead."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for name, text in _facts(result).items():
        print(f"{name + ':':<13} {text}")
    table = Table(title="classes")
    for heading in ("class", "value", "cases", "voxels", "smallest ml", "median ml", "largest ml"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for name, row in result["classes"].items():
        volumes = (f"{row['ml'][part]:,.3g}" if row["ml"] else "" for part in ("smallest", "median", "largest"))
        table.add_row(name, str(row["value"]), str(row["cases"]), f"{row['voxels']:,}", *volumes)
    console.print(table)
    findings = [Finding(**finding) for finding in result["findings"]]
    for (level, kind), lines in _grouped(findings, ("note",) if options["strict"] else ("warning", "note")).items():
        for finding in lines[:_LISTED]:
            print(f"{level}: {finding.text}")
        if len(lines) > _LISTED:
            print(f"{level}: {len(lines) - _LISTED} more of the kind {kind!r}: --json lists all, and --out writes them to a page")
    counts = Counter(finding.level for finding in findings)
    print(", ".join(f"{counts[level]} {level}(s)" for level in ("error", "warning", "note")))
    if result["report"]:
        print(f"written: {result['report']}")


def _look(
    case: Case, table: Dataset, schemes: Sequence[str | None], nan: float | None, findings: list[Finding], *, picture: bool
) -> dict[str, Any] | None:
    """What is in a case's files, with what is wrong with them added to `findings`; None where the headers already tell that they do not fit."""

    def found(level: Literal["error", "warning", "note"], kind: str, text: str, file: Path = case.images[0]) -> None:
        findings.append(Finding(level, kind, str(file), text if text.startswith(str(file)) else f"{file}: {text}"))

    files: list[Image] = []
    lines = faults(case, len(table.channels), files)
    for line in lines:
        findings.append(Finding("error", "files", next((str(f) for f in (*case.images, case.label_file) if line.startswith(f"{f}:")), ""), line))
    if lines:
        return None
    for one in files:
        for note in one.notes:
            found("note", "files", note, one.path)
    data, file = read_image(case.images, len(table.channels), np.nan if nan is None else nan)
    label, _ = read_label(case.label_file, file)
    edges, shape = ras_grid(file)

    finite = np.isfinite(data)
    if not finite.all():
        found("error", "not finite", not_finite(case.images[0], int(data.size - finite.sum())))
        data[~finite] = data[finite].min() if finite.any() else 0
    del finite
    image = torch.from_numpy(data)
    for line in intensity.faults(str(case.images[0]), image, table.channels, schemes):
        found("error", "intensities", line)
    channels = []
    for name, scheme, values in zip(table.channels, schemes, image, strict=True):
        channels.append(_statistics(values.numpy()))
        smallest, largest = channels[-1]["smallest"], channels[-1]["largest"]
        if smallest == largest and len(image) > 1:
            found("warning", "constant", f"every voxel of the channel {name!r} is {smallest:g}")
        elif scheme == "ct" and smallest >= 0:
            found("warning", "intensities", f"the channel {name!r} is scaled as CT, and no voxel is below 0: these are no Hounsfield units")
        elif scheme == "zscore" and intensity.looks_like_ct(values):
            found("warning", "intensities", f"the channel {name!r} has values as of CT, and is scaled by its own mean: --modality ct, if it is one")
        if intensity.padding_below(values) is not None:
            found("note", "padding", f"padding of {smallest:g} in the channel {name!r}: it counts in no mean and no deviation")

    voxels = _counts(label)
    if table.classes:
        try:
            check_values(case, np.array(list(voxels)), table.classes, table.ignore)
        except UserError as error:
            found("error", "label values", str(error), case.label_file)
    if not any(value not in (0, table.ignore) for value in voxels):
        found("warning", "no class", "a label map without any class", case.label_file)

    ml = float(np.prod(edges)) / 1000
    result = {
        "files": [str(path) for path in (*case.images, case.label_file)],
        "shape": shape.tolist(),
        "spacing": [float(f"{edge:.6g}") for edge in edges],
        "orientation": "".join(nib.aff2axcodes(file.affine)),
        "channels": dict(zip(table.channels, channels, strict=True)),
        "voxels": voxels,
        "ml": {value: float(f"{count * ml:.6g}") for value, count in voxels.items()},
        "digest": hashlib.blake2b(np.ascontiguousarray(data).data, digest_size=16).hexdigest(),
    }
    if picture:
        turn = nib.io_orientation(file.affine)
        grey, drawn = (nib.orientations.apply_orientation(array, turn) for array in (data[0], label))
        drawn = np.where(drawn == (table.ignore if table.ignore is not None else 0), 0, drawn)
        window = pages.CT_WINDOWS["soft tissue"] if schemes[0] == "ct" else (channels[0]["low"], channels[0]["high"])
        result["picture"] = pages.slices(grey, [drawn], edges, window, _PIXELS)
    return result


def _of_all(table: Dataset, seen: Mapping[str, Mapping[str, Any]], classes: Mapping[str, int], values: set[int]) -> list[Finding]:
    """What only all cases together show."""
    findings = []
    read = [case for case in table.cases if case.name in seen]
    edges = {case.images[0]: np.array(seen[case.name]["spacing"]) for case in read}
    wrong = wrong_units(edges) if edges else {}
    findings += [Finding("error", "units", str(file), line) for file, line in wrong.items()]
    for file, edge in edges.items():
        middle = np.median(list(edges.values()), axis=0)
        if file not in wrong and (np.maximum(edge / middle, middle / edge) > _APART).any():
            text = f"{file}: voxels of {lengths(edge)} mm, where the median of the cases is {lengths(middle)} mm"
            findings.append(Finding("warning", "spacing", str(file), text))
        if (edge > _LARGE_MM).all():
            text = f"{file}: voxels of {lengths(edge)} mm: the unit of length in the header is likely wrong"
            findings.append(Finding("warning", "units", str(file), text))
    if seen:
        findings += [Finding("warning", "classes", "", line) for line in absent_classes(classes, values)]
    for what, names in (("classes", list(classes)), ("names", list(seen))):
        for same in _equal(names, [name.strip().lower() for name in names]):
            findings.append(Finding("warning", what, "", f"{what}: {' and '.join(same)} differ in capital letters or spaces alone"))
    for same in _equal([str(case.images[0]) for case in read], [seen[case.name]["digest"] for case in read]):
        findings.append(Finding("warning", "equal images", same[0], f"{' and '.join(same)}: equal images"))
    try:
        split(table, None)
    except UserError as error:
        findings.append(Finding("error", "split", "", str(error)))
    flat = [case for case in read if min(seen[case.name]["shape"]) == 1]
    if flat and len(flat) < len(read):
        findings += [Finding("warning", "planes", str(case.images[0]), f"{case.images[0]}: a plane, where other cases are volumes") for case in flat]
    elif flat:
        axis = "xyz"[fit_slice_axis(read)]
        findings.append(Finding("note", "planes", "", f"all cases are planes across {axis}: train with --spatial-dims 2"))
    names = list(structures(classes, table.regions))
    alone = [name for name in sided(names) if not any(name in pair for pair in pairs(names))]
    if alone:
        findings.append(Finding("note", "sides", "", f"classes: {', '.join(alone)} has a side and no partner, so --mirror swap is not possible"))
    if unnamed(names):
        findings.append(Finding("note", "sides", "", "classes: a number for a name tells no side, so left and right are not mirrored"))
    return findings


def _summary(
    name: str,
    channels: Sequence[str],
    schemes: Sequence[str | None],
    classes: Mapping[str, int],
    names: Sequence[str],
    seen: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    cases = list(seen.values())
    rows = {}
    for label, value in classes.items():
        having = [case for case in cases if case["voxels"].get(value)]
        volumes = _spread([case["ml"][value] for case in having])
        rows[label] = {"value": value, "cases": len(having), "voxels": sum(case["voxels"][value] for case in having), "ml": volumes}
    names = [label for label, value in classes.items() if value]
    oriented = not cases or is_oriented(Path(cases[0]["files"][0]))
    flat = {axis for axis in range(3) if cases and all(case["shape"][axis] == 1 for case in cases)}
    return {
        "name": name,
        "channels": {
            channel: {"scheme": scheme or "zscore"} | {part: _spread([case["channels"][channel][part] for case in cases]) for part in _PARTS}
            for channel, scheme in zip(channels, schemes, strict=True)
        },
        "classes": rows,
        "shape": _spread([case["shape"] for case in cases]),
        "spacing": _spread([case["spacing"] for case in cases]),
        "orientations": dict(Counter(case["orientation"] for case in cases).most_common()),
        "sides": {"classes": sided(names), "pairs": [list(pair) for pair in pairs(names)]},
        "mirror": list(fit_mirror("auto", ["background", *names], sorted({0, 1, 2} - flat), oriented)[0]),
    }


_PARTS = ("smallest", "low", "median", "high", "largest", "mean")


def _statistics(values: np.ndarray) -> dict[str, float]:
    """Of a channel's voxels: `low` and `high` are the 0.5 and the 99.5 percentile."""
    flat = values.reshape(-1)
    low, median, high = np.percentile(flat[:: max(1, -(-len(flat) // _SAMPLES))], (0.5, 50, 99.5))
    found = (flat.min(), low, median, high, flat.max(), flat.mean(dtype=np.float64))
    return {part: float(f"{value:.6g}") for part, value in zip(_PARTS, found, strict=True)}


def _counts(label: np.ndarray) -> dict[int, int]:
    """{value: voxels} of a label map."""
    smallest, largest = int(label.min()), int(label.max())
    if smallest >= 0 and largest < 2**16:
        counts = np.bincount(label.reshape(-1).astype(np.uint16, copy=False))
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    return {int(value): int(count) for value, count in zip(*np.unique(label, return_counts=True), strict=True)}


def _spread(values: Sequence[Any]) -> dict[str, Any]:
    """The smallest, the median and the largest of numbers, or of each entry of lists; {} of none."""
    if not values:
        return {}
    found = (function(np.array(values), axis=0) for function in (np.min, np.median, np.max))
    return {part: value.tolist() for part, value in zip(("smallest", "median", "largest"), found, strict=True)}


def _equal(items: Sequence[str], keys: Sequence[str]) -> list[list[str]]:
    """The groups of two and more items that have one key."""
    groups: dict[str, list[str]] = {}
    for item, key in zip(items, keys, strict=True):
        groups.setdefault(key, []).append(item)
    return [group for group in groups.values() if len(group) > 1]


def _grouped(findings: Iterable[Finding], levels: Sequence[str]) -> dict[tuple[str, str], list[Finding]]:
    """{(level, kind): findings} of some levels."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        if finding.level in levels:
            groups.setdefault((finding.level, finding.kind), []).append(finding)
    return groups


def _facts(result: Mapping[str, Any]) -> dict[str, str]:
    """The summary as lines."""
    axes, sides = ("left-right", "front-back", "up-down"), result["sides"]
    paired = [" and ".join(pair) for pair in sides["pairs"]]
    alone = [name for name in sides["classes"] if not any(name in pair for pair in sides["pairs"])]
    facts = {"data set": result["name"], "cases": f"{len(result['cases'])} of {result['listed']} read"}
    if result["cases"]:
        shapes = {part: " x ".join(f"{size:g}" for size in result["shape"][part]) for part in ("smallest", "median", "largest")}
        facts["shapes"] = f"{shapes['smallest']} to {shapes['largest']}, median {shapes['median']} voxels"
        edges = {part: lengths(np.array(result["spacing"][part])) for part in ("smallest", "median", "largest")}
        facts["spacings"] = f"{edges['smallest']} to {edges['largest']}, median {edges['median']} mm"
        facts["orientations"] = ", ".join(f"{name} {count}" for name, count in result["orientations"].items())
        for name, row in result["channels"].items():
            values = f"{row['smallest']['smallest']:g} to {row['largest']['largest']:g}, median {row['median']['median']:g}"
            facts[f"channel {name}"] = f"{values}; scaled {intensity.SCHEMES[row['scheme']]}"
    facts["sides"] = ", ".join([*paired, *(f"{name} alone" for name in alone)]) or "none by name"
    facts["mirrored"] = ", ".join(axes[axis] for axis in result["mirror"]) or "none"
    return facts


def _colours(values: Iterable[int]) -> list[str]:
    return [pages.COLOURS[(value - 1) % len(pages.COLOURS)] for value in values if value]
