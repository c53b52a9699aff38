"""medssm compare: two or more sets of predictions, or runs, on the same cases: their scores with intervals, and their paired differences.

Metrics are those of `medssm evaluate`. A class that is empty in the reference and in a prediction is left out of that case and counted; empty in one
of the two it is Dice 0, surface Dice 0 and an HD95 of the image's diagonal.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from medssm.compare import disturb as disturbances
from medssm.compare import page, pictures, sources, table
from medssm.compare.result import change, compared, worst_first
from medssm.compare.scores import Cases, score
from medssm.errors import UserError
from medssm.files import first_line, protect, read_json, write_json
from medssm.options import Option
from medssm.segment import pages
from medssm.segment.evaluate import by_name, named
from medssm.segment.images import Image, say
from medssm.segment.inputs import DATALIST, references_of
from medssm.segment.patients import patient_of
from medssm.segment.progress import progress

RESULT, PAGE, PREDICTIONS = "compare.json", "compare.html", "predictions"


def compare(
    predictions: Annotated[Sequence[Path | str], Option(several=True)],
    *,
    references: Path | str,
    out: Path | str | None = None,
    names: Sequence[str] | None = None,
    baseline: str | None = None,
    images: Path | str | None = None,
    section: str | None = None,
    common: bool = False,
    classes: Mapping[str, int | Sequence[int]] | Path | str | None = None,
    ignore: int | None = None,
    patient: str | None = None,
    nsd_mm: float = 2.0,
    dice_margin: float = 0.01,
    hd95_margin: float = 1.0,
    fewest: int = 20,
    resamples: int = 9999,
    seed: int = 0,
    disturb: Sequence[Literal["noise", "bias-field", "thick-slices"]] = (),
    measure: bool = False,
    device: str = "auto",
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Compare sets of predictions, or runs, on the same cases: scores with intervals over patients, and paired differences from the first one.

    A side is "non-inferior" where, with 95 % confidence one-sided, its mean Dice is less than 0.01 below the baseline's and its mean HD95 less than
    1 mm above it, in each class that at least 20 patients have; else that is "not established".

    Args: Files
        predictions: two or more: folders of label maps; runs, whose held-out cases are predicted now, without post-processing; or folders of runs,
            the folds of one training
        references: folder with files of the same names and places, or a datalist (.json) with labels, such as train's cases.json
        section: of a datalist (default: testing or test, or the only one)
        out: folder for compare.json, compare.html, the plots and what runs predict (default: nothing is kept)
        names: one for each of `predictions` (default: their folders' names)
        baseline: the name of the one that the others are compared with (default: the first)
        images: folder of the scans, for pictures of the worst cases
        common: compare the cases that all have, and name the others (default: a case that one lacks is an error)
        overwrite: write over files of other origin in `out`
    Args: Metrics
        classes: dataset.json or weights folder that names the classes or regions, or {name: value or values} (default: every value in the files)
        nsd_mm: tolerance of the surface Dice in millimetres
        ignore: value in the references whose voxels count for nothing (default: the ignore label of `classes`)
    Args: Statistics
        patient: regular expression whose first group in a case's name is the patient, as in '(sub-[0-9]+)' (default: the entry patient of a datalist,
            or every case is one)
        dice_margin: how much lower the mean Dice of a class may be
        hd95_margin: how many millimetres higher the mean HD95 of a class may be
        fewest: patients that a class needs to be judged
        resamples: how often the patients are drawn anew
        seed: of the draws
    Args: What else is found of runs
        disturb: they also segment their held-out scans with noise, a bias field or thick slices; each is compared with the baseline under the same
            disturbance, and with itself without it
        measure: also the calibration error of their probabilities, and of a new process with one scan the seconds and the largest memory
    Args: Machine
        device: that runs are predicted on: auto, cpu, cuda, cuda:1 or mps

    Returns:
        What compare.json holds; docs/guides/compare.md describes it. A case that cannot be compared is in "failed", and the others are compared.

    Raises:
        UserError: where nothing can be compared, or a side lacks a case that another one has.
    """
    _check(nsd_mm=nsd_mm, dice_margin=dice_margin, hd95_margin=hd95_margin)
    for name, value, least in (("fewest", fewest, 1), ("resamples", resamples, 100)):
        if value < least:
            raise UserError(f"{name}: expected {least} or more, got {value}")
    sides = sources.sides_of([Path(folder) for folder in predictions], names)
    chosen = sides[0].name if baseline is None else baseline
    if chosen not in [side.name for side in sides]:
        raise UserError(f"baseline: expected one of {', '.join(side.name for side in sides)}, got {baseline!r}")
    kinds = _kinds(disturb, sides)
    if measure and not any(side.runs for side in sides):
        raise UserError(f"measure: expected a run, got folders of label maps: {', '.join(side.name for side in sides)}")
    values, ignored = (None, None) if classes is None else named(classes)
    ignore = ignored if ignore is None else ignore
    wanted, listed = _references(Path(references), section)
    scans_given = None if images is None else pictures.scans(Path(images))
    if out is not None:
        _protect(Path(out), overwrite)
    statistics: dict[str, Any] = {"dice_margin": dice_margin, "hd95_margin": hd95_margin, "fewest": fewest, "resamples": resamples, "seed": seed}
    with tempfile.TemporaryDirectory() as temporary:
        places = Path(temporary) if out is None else Path(out) / PREDICTIONS
        for i, side in enumerate(sides):
            sources.find(side, places / f"{i}-{_as_folder(side.name)}", device, quiet, wanted if measure else None, ignore)
        kept, left_out = _cases(sides, wanted, common, references)
        patients = {case: patient_of(case, patient, "patient") if patient is not None else listed.get(case, case) for case in kept}
        tables, failed = _scored(sides, kept, wanted, values, ignore, nsd_mm, quiet)
        kept = [case for case in kept if case in next(iter(tables.values()))]
        result: dict[str, Any] = {
            "baseline": chosen,
            "references": str(references),
            "nsd_mm": nsd_mm,
            **statistics,
            "patients": len({patients[case] for case in kept}),
            "cases": {case: patients[case] for case in kept},
            "left_out": left_out,
            "failed": failed,
            **compared(tables, patients, baseline=chosen, **statistics),
            "disturbed": {},
        }
        for side in sides:
            result["sides"][side.name] |= {"folder": str(side.folder), "facts": side.facts, "cases": tables[side.name]}
        for kind in kinds:
            scans = Path(temporary) / "scans" / kind
            under = [
                sources.find_disturbed(side, kind, scans, places / kind / f"{i}-{_as_folder(side.name)}", seed, device, quiet)
                for i, side in enumerate(sides)
            ]
            found, lost = _scored(under, kept, wanted, values, ignore, nsd_mm, quiet)
            shutil.rmtree(scans)
            failed |= {f"{case}, {kind}": why for case, why in lost.items()}
            result["disturbed"][kind] = {
                **compared(found, patients, baseline=chosen, **statistics),
                "changes": {name: change(tables[name], cases, patients, **statistics) for name, cases in found.items()},
            }
            for name, cases in found.items():
                result["disturbed"][kind]["sides"][name]["cases"] = cases
        if out is not None:
            worst = worst_first(tables, kept)
            shown = pictures.pictures(worst, sides, wanted, scans_given) if scans_given is not None else {}
            write_json(Path(out) / RESULT, result)
            page.write(Path(out), PAGE, result, worst, shown)
            result["page"] = str(Path(out) / PAGE)
    return result


def show(result: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Print the scores, the differences, and what was left out."""
    table.show(result)


def _check(**lengths: float) -> None:
    for name, value in lengths.items():
        if not value >= 0:
            raise UserError(f"{name}: expected 0 or more, got {value}")


def _kinds(disturb: Sequence[str], sides: Sequence[sources.Side]) -> list[str]:
    """Each disturbance once. UserError for an unknown one, and for label maps, which no other scans can be given to."""
    for kind in disturb:
        if kind not in disturbances.KINDS:
            raise UserError(f"disturb: expected {', '.join(disturbances.KINDS)}, got {kind!r}")
    for side in sides:
        if disturb and not side.runs:
            raise UserError(f"disturb: expected runs, which can segment disturbed scans, got the folder of label maps {side.name}")
    return list(dict.fromkeys(disturb))


def _references(references: Path, section: str | None) -> tuple[dict[str, Path], dict[str, str]]:
    """{case: label map}, and {case: its patient} where a datalist names it."""
    if not references.exists():
        raise UserError(f"references: {references}: no such file or folder")
    if references.suffix == DATALIST:
        return references_of(references, section)
    if section:
        raise UserError(f"section: expected a datalist ({DATALIST}) as references, got {references}")
    if not references.is_dir():
        raise UserError(f"references: expected a folder or a datalist ({DATALIST}), got the file {references}")
    found = by_name(references)
    if not found:
        raise UserError(f"references: {references}: no label map in this folder")
    return found, {}


def _protect(out: Path, overwrite: bool) -> None:
    """UserError where a file of other origin would be lost."""
    protect(out / PAGE, made=lambda path: pages.is_made_by(page.GENERATOR, path), overwrite=overwrite)
    protect(out / RESULT, made=_is_result, overwrite=overwrite)


def _is_result(file: Path) -> bool:
    try:
        content = read_json(file)
    except UserError:
        return False
    return isinstance(content, dict) and {"baseline", "sides", "differences"} <= content.keys()


def _as_folder(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


def _cases(
    sides: Sequence[sources.Side], wanted: Mapping[str, Path], common: bool, references: Path | str
) -> tuple[list[str], dict[str, dict[str, list[str]]]]:
    """The cases to compare; and of each side those that only some sides have ("others lack") and those without a reference ("no reference").

    A case with a reference that no side has is none that was to be predicted.
    """
    there = [side.files.keys() | side.failed.keys() for side in sides]
    some, all_of_them = set.union(*map(set, there)) & wanted.keys(), set.intersection(*map(set, there)) & wanted.keys()
    if not common:
        for side, found in zip(sides, there, strict=True):
            lacks = sorted(some - found)
            if lacks:
                more = f" and {len(lacks) - 5} more" if len(lacks) > 5 else ""
                raise UserError(
                    f"predictions: {side.name} lacks {', '.join(lacks[:5])}{more}, which another one has: --common compares the cases that all have"
                )
    if not all_of_them:
        raise UserError(f"predictions: no case that all of them have, with a reference in {references}")
    left_out = {
        side.name: {"others_lack": sorted((found & wanted.keys()) - all_of_them), "no_reference": sorted(found - wanted.keys())}
        for side, found in zip(sides, there, strict=True)
    }
    return sorted(all_of_them), left_out


def _scored(
    sides: Sequence[sources.Side],
    cases: Sequence[str],
    wanted: Mapping[str, Path],
    values: Mapping[str, tuple[int, ...]] | None,
    ignore: int | None,
    nsd_mm: float,
    quiet: bool,
) -> tuple[dict[str, Cases], dict[str, str]]:
    """{side: its cases}, and {case: why it cannot be compared}: it is then left out of all sides."""
    tables: dict[str, Cases] = {side.name: {} for side in sides}
    failed: dict[str, str] = {}
    files: list[Image] = []
    with progress("comparing", quiet) as tell:
        for i, case in enumerate(cases):
            tell(i / len(cases), case)
            for side in sides:
                try:
                    if case in side.failed:
                        raise UserError(side.failed[case])
                    tables[side.name][case] = score(side.files[case], wanted[case], values, ignore, nsd_mm, files)
                except UserError as error:
                    failed[case] = f"{side.name}: {error}"
                except (MemoryError, OSError) as error:
                    failed[case] = f"{side.name}: {side.files[case]}: {type(error).__name__}: {first_line(error)}"
    say(files)
    tables = {side: {case: rows for case, rows in table.items() if case not in failed} for side, table in tables.items()}
    if len(failed) == len(cases):
        raise UserError("\n".join(failed.values()))
    found = list(dict.fromkeys(name for table in tables.values() for rows in table.values() for name in rows))
    classes = found if values else sorted(found, key=int)
    return {side: {case: {name: rows.get(name) for name in classes} for case, rows in table.items()} for side, table in tables.items()}, failed
