"""A comparison as tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medssm.compare.result import MEAN
from medssm.compare.scores import COMPARED
from medssm.compare.statistics import FEWEST

HEADINGS = {
    "dice": ("Dice", 3),
    "hd95": ("HD95 mm", 2),
    "nsd": ("surface Dice", 3),
    "ml": ("volume ml", 3),
    "error_ml": ("volume error ml", 3),
    "absolute_error_ml": ("absolute volume error ml", 3),
}
FACTS = {
    "parameters": lambda value: f"{value / 1e6:.2f} M",
    "multiply_adds": lambda value: f"{value / 1e9:.2f} G",
    "file_bytes": lambda value: f"{value / 2**20:.2f} MiB",
    "training_seconds": lambda value: f"{value:.0f} s",
    "training_joules": lambda value: f"{value / 1e3:.1f} kJ",
    "inference_seconds": lambda value: f"{value:.2f} s",
    "inference_joules": lambda value: f"{value:.0f} J",
    "cold_seconds": lambda value: f"{value:.2f} s",
    "peak_bytes": lambda value: f"{value / 2**20:.0f} MiB",
    "ece": lambda value: f"{value:.5f}",
    "ece_unsure": lambda value: f"{value:.4f}",
}
DISTURBED = ("Dice", "HD95 mm", "Dice less undisturbed", "Dice less baseline")
NOT_MEASURED = "not measured"


def show(result: Mapping[str, Any]) -> None:
    """Print the sides, their differences from the baseline, and what was left out."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    scores = Table(title=f"{len(result['cases'])} case(s) of {result['patients']} patient(s); 95 % intervals over patients")
    scores.add_column("")
    scores.add_column("class")
    for heading, _ in HEADINGS.values():
        scores.add_column(heading, justify="right")
    scores.add_column("cases", justify="right")
    for side, row in result["sides"].items():
        for label, own in {**row["classes"], MEAN: row[MEAN]}.items():
            cells = [interval(own[metric], digits).replace(" [", "\n[") for metric, (_, digits) in HEADINGS.items()]
            scores.add_row(side, label, *cells, str(own["n"]), end_section=label == MEAN)
    console.print(scores)
    differences = Table(title=f"paired differences from {result['baseline']}")
    differences.add_column("")
    differences.add_column("class")
    for metric in COMPARED:
        differences.add_column(HEADINGS[metric][0], justify="right")
    differences.add_column("verdict")
    for side, row in result["differences"].items():
        for label, own in {**row["classes"], MEAN: row[MEAN]}.items():
            cells = [interval(own[metric], HEADINGS[metric][1] + (metric == "dice"), True).replace(" [", "\n[") for metric in COMPARED]
            differences.add_row(side, label, *cells, row["verdict"] if label == MEAN else own["verdict"], end_section=label == MEAN)
    console.print(differences)
    for side, row in result["differences"].items():
        console.print(f"{side}: {row['verdict']}", highlight=False)
    if result["disturbed"]:
        disturbed = Table(title="disturbed scans")
        disturbed.add_column("")
        disturbed.add_column("disturbance", no_wrap=True)
        for heading in DISTURBED:
            disturbed.add_column(heading, justify="right")
        disturbed.add_column("verdict")
        for side, kind, cells, verdict in disturbed_rows(result):
            disturbed.add_row(side, kind, *(cell.replace(" [", "\n[") for cell in cells), verdict)
        console.print(disturbed)
    known = {side: row["facts"] for side, row in result["sides"].items() if row["facts"]}
    if known:
        facts = Table(title="networks")
        facts.add_column("")
        for name in facts_of(result):
            facts.add_column(name.replace("_", " "), justify="right")
        for side, own in known.items():
            facts.add_row(side, *(fact(own, name) for name in facts_of(result)))
        console.print(facts)
    for line in remarks(result):
        console.print(line, highlight=False)
    if "page" in result:
        print(f"written: {result['page']}")


def remarks(result: Mapping[str, Any]) -> list[str]:
    """What a reader of the numbers has to know."""
    lines = [
        f"non-inferior: with 95 % confidence, one-sided, less than {result['dice_margin']:g} below the Dice and less than "
        f"{result['hd95_margin']:g} mm above the HD95 of {result['baseline']}, in each class that at least {result['fewest']} patients have"
    ]
    if result["patients"] < FEWEST:
        lines.append(f"no interval: {result['patients']} patient(s), at least {FEWEST} are needed")
    if empty := _counts(result["sides"], "empty_in_both", " case(s)"):
        lines.append(f"left out, as the class is in neither the reference nor the prediction: {empty}")
    if pairs := _counts(result["differences"], "left_out"):
        lines.append(f"left out of the differences, as one side has nothing of a class that the reference has not either: {pairs}")
    for side, cases in result["left_out"].items():
        if cases["others_lack"]:
            lines.append(f"{side}: left out, as others lack them: {_some(cases['others_lack'])}")
        if cases["no_reference"]:
            lines.append(f"{side}: without a reference: {_some(cases['no_reference'])}")
    return lines


def disturbed_rows(result: Mapping[str, Any]) -> list[tuple[str, str, list[str], str]]:
    """(side, disturbance, a cell for each heading of DISTURBED, verdict)."""
    rows = []
    for kind, found in result["disturbed"].items():
        for side, own in found["sides"].items():
            against = found["differences"].get(side)
            cells = [
                interval(own[MEAN]["dice"], 3),
                interval(own[MEAN]["hd95"], 2),
                interval(found["changes"][side][MEAN]["dice"], 4, True),
                interval(against[MEAN]["dice"], 4, True) if against else "",
            ]
            rows.append((side, kind, cells, against["verdict"] if against else ""))
    return rows


def facts_of(result: Mapping[str, Any]) -> list[str]:
    """The names of FACTS that any side has."""
    return [name for name in FACTS if any(name in row["facts"] for row in result["sides"].values())]


def interval(value: Mapping[str, Any], digits: int, signed: bool = False) -> str:
    """A mean with its interval."""
    if value["mean"] is None:
        return "-"
    form = f"{'+' if signed else ''}.{digits}f"
    ends = "" if value["low"] is None else f" [{value['low']:{form}}, {value['high']:{form}}]"
    return f"{value['mean']:{form}}{ends}"


def fact(facts: Mapping[str, Any], name: str) -> str:
    """What is known of a network, as text."""
    value = facts.get(name)
    return NOT_MEASURED if value is None else FACTS[name](value)


def _counts(sides: Mapping[str, Any], key: str, unit: str = "") -> str:
    """The numbers under `key` that are not 0, with their side and class."""
    found = ((side, label, own[key]) for side, row in sides.items() for label, own in row["classes"].items())
    return "; ".join(f"{side}, {label}: {number}{unit}" for side, label, number in found if number)


def _some(cases: list[str]) -> str:
    return ", ".join(cases[:8]) + (f" and {len(cases) - 8} more" if len(cases) > 8 else "")
