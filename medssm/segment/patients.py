"""Which cases are of one patient: all of them belong on one side of a fold, and an interval is over patients."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from medssm.errors import UserError
from medssm.segment.cases import Case


def patient_of(case: str, pattern: str, argument: str) -> str:
    """The first group of a regular expression where it is first found in a case's name, or all that was found if the expression has no group.

    Raises UserError, which names the argument, where it is not found or is no regular expression.
    """
    try:
        match = re.search(pattern, case)
    except re.error as error:
        raise UserError(f"{argument}: {pattern!r} is no regular expression ({error})") from error
    found = match and (match.group(1) if match.groups() else match.group())
    if not found:
        raise UserError(f"{argument}: {pattern!r} is not in the name {case}")
    return found


def with_patients(cases: Sequence[Case], group: str | None) -> tuple[Case, ...]:
    """The cases with the patients that `group`, a regular expression, finds in their names; without it with those that a datalist names.

    Raises UserError where a datalist names the patients of some cases only.
    """
    if group is not None:
        return tuple(replace(case, patient=patient_of(case.name, group, "group")) for case in cases)
    without = [case for case in cases if case.patient is None]
    if without and len(without) < len(cases):
        raise UserError(f"{without[0].label}: has no patient, where other cases of the datalist have one")
    return tuple(cases)


def units(cases: Sequence[Case]) -> list[list[int]]:
    """The positions of the cases of each patient; without patients, of each case. In the order of their names, whatever the order of the cases."""
    found: dict[str, list[int]] = {}
    for i, case in enumerate(cases):
        found.setdefault(case.name if case.patient is None else case.patient, []).append(i)
    return [found[name] for name in sorted(found)]


def check_apart(training: Sequence[Case], validation: Sequence[Case]) -> None:
    """Raise UserError where a patient has cases on both sides."""
    trained = {case.patient: case for case in training if case.patient is not None}
    for case in validation:
        if case.patient in trained:
            raise UserError(f"patient {case.patient}: {trained[case.patient].name} is trained on and {case.name} is held out")
