"""Conformal bounds on the volume of a class, from the patients that training held out.

For a held-out patient i, with v_i ml found and r_i ml in the reference, the score is

    s_i = |log((v_i + 1) / (r_i + 1))|

so an error counts by its share of a volume far above 1 ml, and by its millilitres below that. A patient with several cases counts once, with the
largest score. With n patients and a new volume v the interval of level L is

    (v + 1) exp(-q) - 1  to  (v + 1) exp(q) - 1,   q the ceil((n + 1) L)-th smallest score (split conformal),

cut off at 0. If the new patient and the held-out ones are exchangeable, as when all were drawn at random from one population, it holds the reference
volume with a probability of at least L. It is no statement about one patient, and none about other scanners, protocols or populations. With fewer
than ceil((n + 1) L) patients the interval would have no end, and none is given.

Of several runs, each with held-out patients of its own (folds), a held-out patient is compared with what its own run finds in the new image (CV+):
the interval is from the floor((n + 1)(1 - L))-th smallest lower bound (v_k + 1) exp(-s_i) - 1 to the ceil((n + 1) L)-th smallest upper one, k being
the run that held out i. The probability is then at least 1 - 2 (1 - L), a little less with few patients in a fold, and about L in practice.

Sources: Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World (2005); Barber, Candes, Ramdas, Tibshirani, Predictive inference with the
jackknife+ (Annals of Statistics 2021).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from medssm.errors import UserError
from medssm.files import read_json, write_json
from medssm.scratch import Store
from medssm.segment import postprocess
from medssm.segment.cases import Case
from medssm.segment.images import open_image, read_label
from medssm.segment.preprocess import Fitted
from medssm.segment.regions import structures
from medssm.segment.stored import OnFile
from medssm.segment.volumetry import volumes, voxel_ml

CONFORMAL = "conformal.json"
_OFFSET = 1.0  # ml
Measured: TypeAlias = "dict[str, dict[str, Any]]"  # {case: {"patient", "volumes": {class: {"found_ml", "reference_ml"}}}}
Scores: TypeAlias = "dict[str, dict[str, float]]"  # {patient: {class: score}}


def score(found_ml: float, reference_ml: float) -> float:
    """|log((v + 1) / (r + 1))| of the volume found and the reference's."""
    return abs(math.log((found_ml + _OFFSET) / (reference_ml + _OFFSET)))


def interval(found_ml: Sequence[float], scores: Sequence[Sequence[float]], level: float) -> tuple[float, float] | None:
    """The bounds in ml on a new image's volume; None where there are too few scores for that level.

    Args:
        found_ml: the volume that each run found in it
        scores: for each run those of its held-out patients
        level: of the interval, 0 to 1
    """
    n = sum(map(len, scores))
    rank = _rank(n, level)
    if rank > n:
        return None
    logs = [(math.log(found + _OFFSET), one) for found, run in zip(found_ml, scores, strict=True) for one in run]
    low, high = sorted(log - one for log, one in logs)[n - rank], sorted(log + one for log, one in logs)[rank - 1]
    return max(0.0, math.exp(low) - _OFFSET), max(0.0, math.exp(high) - _OFFSET)


def fewest(level: float) -> int:
    """The number of patients from which on there is an interval of that level."""
    return next(n for n in range(1, 10**7) if _rank(n, level) <= n)


def _rank(n: int, level: float) -> int:
    """ceil((n + 1) level), where 0.56 x 100 is 56."""
    return math.ceil(round((n + 1) * level, 9))


def measured(cases: Sequence[Case], found: Sequence[Tensor], fitted: Fitted, steps: postprocess.Steps) -> Measured:
    """The volumes found in held-out cases, as `predict` would measure them, and those of their references.

    Args:
        cases: the held-out cases
        found: their label maps as positions of classes, on the grids of their images along RAS axes
        fitted: what was fitted to the training cases
        steps: the post-processing that was chosen
    """
    result: Measured = {}
    for case, labels in zip(cases, found, strict=True):
        image = open_image(case.images[0])
        final = Store.of(labels.clone())
        postprocess.process(final, steps, fitted.to_process, voxel_ml(image))
        here = volumes(OnFile(final, image), image, fitted.structures)
        there = volumes(read_label(case.label_file, image)[0], image, structures(fitted.classes, fitted.regions))
        result[case.name] = {
            "patient": case.name if case.patient is None else case.patient,
            "volumes": {name: {"found_ml": here[name]["ml"], "reference_ml": there[name]["ml"]} for name in here},
        }
    return result


def save(path: Path, cases: Measured) -> None:
    """Write what `measured` gave. Raises UserError where the file cannot be written."""
    write_json(path, {"cases": cases})


def load(folders: Sequence[Path], names: Iterable[str], level: float) -> tuple[list[Scores], str]:
    """The scores of each run's held-out patients, and what to say of them; no scores where there can be no interval, and then why.

    Args:
        folders: of the runs
        names: of the classes or regions
        level: of the interval

    Raises:
        UserError: a file does not hold what `save` writes.
    """
    found: list[Scores] = []
    for folder in folders:
        if not (folder / CONFORMAL).is_file():
            return (
                [],
                f"no conformal intervals: {folder} has no {CONFORMAL} (medssm train writes it where it holds cases out, with every voxel labelled)",
            )
        found.append(_scores(folder / CONFORMAL, list(names)))
    patients = [patient for run in found for patient in run]
    twice = next((patient for patient in patients if patients.count(patient) > 1), None)
    if twice is not None:
        return [], f"no conformal intervals: patient {twice} was held out by two of the runs"
    if len(patients) < fewest(level):
        return [], f"no conformal intervals: {len(patients)} held-out patient(s), a level of {level:g} needs {fewest(level)}"
    return found, f"conformal intervals of level {level:g} from {len(patients)} held-out patients"


def _scores(path: Path, names: Sequence[str]) -> Scores:
    table: Any = read_json(path)
    try:
        scores: Scores = {}
        for case in table["cases"].values():
            row = scores.setdefault(str(case["patient"]), {})
            for name in names:
                pair = case["volumes"][name]
                row[name] = max(row.get(name, 0.0), score(pair["found_ml"], pair["reference_ml"]))
        return scores
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: expected the volumes of {', '.join(names)} for each case, as medssm train writes them ({error!r})") from error
