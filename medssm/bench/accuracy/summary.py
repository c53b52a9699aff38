"""The trainings of a comparison as results.json and results.md: what each network costs, what it finds, its differences from the baseline."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medssm.bench.accuracy import runs
from medssm.bench.accuracy.runs import Run, Setting
from medssm.bench.accuracy.specs import Net
from medssm.compare import PAGE, page, pictures
from medssm.compare.result import MEAN, compared, worst_first
from medssm.compare.scores import Cases, averaged
from medssm.compare.sources import Side
from medssm.compare.table import interval
from medssm.errors import UserError
from medssm.files import read_json, write_json, write_text
from medssm.segment.evaluate import by_name

RESULTS, TABLE = "results.json", "results.md"
BEGIN, END = "<!-- begin: medssm bench accuracy -->", "<!-- end -->"  # of the tables in a page of the docs
MARGINS: dict[str, Any] = {"dice_margin": 0.01, "hd95_margin": 1.0, "fewest": 20, "resamples": 9999, "seed": 0}


def write(
    setting: Setting,
    nets: Sequence[Net],
    done: Sequence[Mapping[str, Any]],
    patients: Mapping[str, str],
    baseline: str,
    failed: Mapping[str, str],
    left: Sequence[str],
) -> dict[str, Any]:
    """Write both files and the page of the comparison, of the trainings that are done.

    Networks are compared on the folds and seeds that all of them have: {"compared": {"folds", "seeds"}}. Of several seeds each case counts once, with
    the mean of its metrics.
    """
    own = {net.text: [run for run in done if run["network"] == net.text] for net in nets}
    own = {name: found for name, found in own.items() if found}
    common = set.intersection(*({(run["fold"], run["seed"]) for run in found} for found in own.values())) if own else set()
    results: dict[str, Any] = {
        "settings": read_json(setting.out / "settings.json"),
        "networks": {name: _facts(found) for name, found in own.items()},
        "compared": {"folds": sorted({fold for fold, _ in common}), "seeds": sorted({seed for _, seed in common})},
        "baseline": baseline if baseline in own else next(iter(own), None),
        "comparison": None,
        "failed": dict(failed),
        "left": list(left),
        "out": str(setting.out),
    }
    if common:
        sides = {name: _cases(found, common) for name, found in own.items()}
        results["comparison"] = compared(sides, patients, baseline=results["baseline"], **MARGINS)
        _page(setting, [net for net in nets if net.text in own], results, sides, patients)
    write_json(setting.out / RESULTS, results)
    write_text(setting.out / TABLE, markdown(results))
    return results


def check_page(docs: Path) -> None:
    """UserError where a page has no place for the tables."""
    try:
        text = docs.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"docs: {docs}: {error.strerror}") from error
    if BEGIN not in text or END not in text.partition(BEGIN)[2]:
        raise UserError(f"docs: {docs}: expected the lines {BEGIN} and {END}")


def fill(docs: Path, results: Mapping[str, Any]) -> None:
    """Put the tables into a page, between the two marks."""
    before, _, rest = docs.read_text(encoding="utf-8").partition(BEGIN)
    tables = markdown(results).partition("\n\n")[2]  # without the heading
    write_text(docs, f"{before}{BEGIN}\n{tables}{END}{rest.partition(END)[2]}")


def show(results: Mapping[str, Any]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(markdown(results)))
    for name in results["left"]:
        print(f"{name}: another process is at it")
    print(f"written: {results['out']}")


def markdown(results: Mapping[str, Any]) -> str:
    """Two tables: the networks with what they cost, and their differences from the baseline."""
    settings, networks, comparison = results["settings"], results["networks"], results["comparison"]
    lines = [
        f"# Accuracy on {settings['dataset']}",
        "",
        f"{settings['steps']} steps of {settings['batch']} patches of {' x '.join(map(str, settings['patch']))} voxels each; compared on "
        f"{len(results['compared']['folds'])} fold(s) with {len(results['compared']['seeds'])} seed(s). Intervals are 95 %, over patients.",
        "",
        "| network | parameters | multiply-adds | runs | training | inference a case | energy a training | mean Dice | HD95 mm | volume error ml |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, facts in networks.items():
        mean = comparison["sides"][name][MEAN] if comparison else None
        found = [interval(mean[metric], digits) if mean else "" for metric, digits in (("dice", 4), ("hd95", 2), ("error_ml", 3))]
        energy = "not measured" if facts["training_joules"] is None else f"{facts['training_joules'] / 1e3:.1f} kJ"
        cells = [
            f"`{name}`",
            f"{facts['parameters'] / 1e6:.2f} M",
            f"{facts['multiply_adds'] / 1e9:.2f} G",
            str(facts["runs"]),
            f"{facts['training_seconds']:.0f} s",
            f"{facts['inference_seconds']:.2f} s",
            energy,
            *found,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if comparison and comparison["differences"]:
        lines += ["", f"Paired differences from `{results['baseline']}`:", "", "| network | class | Dice | HD95 mm | |", "|---|---|---:|---:|---|"]
        for name, row in comparison["differences"].items():
            for label, found in {**row["classes"], MEAN: row[MEAN]}.items():
                told = row["verdict"] if label == MEAN else found["verdict"]
                lines.append(f"| `{name}` | {label} | {interval(found['dice'], 4, True)} | {interval(found['hd95'], 2, True)} | {told} |")
    return "\n".join(lines) + "\n"


def _page(setting: Setting, nets: Sequence[Net], results: Mapping[str, Any], sides: Mapping[str, Cases], patients: Mapping[str, str]) -> None:
    """The page of `medssm compare`. Its pictures are of the first seed."""
    comparison, cases = results["comparison"], list(next(iter(sides.values())))
    seed = results["compared"]["seeds"][0]
    shown = {name: row | {"facts": results["networks"][name], "cases": sides[name]} for name, row in comparison["sides"].items()}
    whole = {
        **MARGINS,
        **comparison,
        "baseline": results["baseline"],
        "patients": len({patients[case] for case in cases}),
        "cases": {case: patients[case] for case in cases},
        "left_out": {},
        "disturbed": {},
        "sides": shown,
    }
    worst = worst_first(sides, cases)
    found = [Side(net.text, setting.out, by_name(Run(net, 0, seed).predictions(setting.out))) for net in nets]
    known = {case.name: case for case in setting.table.cases}
    drawn = pictures.pictures(worst, found, {name: case.label_file for name, case in known.items()}, {name: known[name].images[0] for name in cases})
    page.write(setting.out, PAGE, whole, worst, drawn)


def _facts(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a network is, and medians over its trainings of what it costs."""
    first, seeds = found[0], sorted({run["seed"] for run in found})
    joules = [run["training_joules"] for run in found if run["training_joules"] is not None]
    return {
        **{name: first[name] for name in ("model", "options", "parameters", "multiply_adds", "samples")},
        "runs": len(found),
        "training_seconds": statistics.median(run["training_seconds"] for run in found),
        "inference_seconds": statistics.median(run["inference_seconds"] / run["inference_cases"] for run in found),
        "training_joules": statistics.median(joules) if joules else None,
        "dice_by_seed": {str(seed): statistics.mean(runs.mean_dice(run) for run in found if run["seed"] == seed) for seed in seeds},
        "commits": sorted({run["commit"] for run in found}),
        "processors": sorted({run["machine"]["processor"] for run in found}),
    }


def _cases(found: Sequence[Mapping[str, Any]], common: set[tuple[int, int]]) -> Cases:
    """{case: {class: metrics}}: the folds put together for each seed, then the mean over the seeds."""
    by_seed: dict[int, dict[str, Any]] = {}
    for run in found:
        if (run["fold"], run["seed"]) in common:
            by_seed.setdefault(run["seed"], {}).update(run["cases"])
    return averaged(list(by_seed.values()))
