"""A run as text: a line a row, a page with a table, a plot, and the summary."""

from __future__ import annotations

import datetime
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from medssm import machine as host
from medssm.kernels import cuda


def machine() -> dict:
    """What it runs on; device is None without a GPU."""
    found = torch.cuda.is_available()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    driver = subprocess.run("nvidia-smi --query-gpu=driver_version --format=csv,noheader", shell=True, capture_output=True, text=True).stdout.strip()
    return {
        **host.describe(),
        "device": torch.cuda.get_device_name() if found else None,
        "driver": driver,
        "CUDA": torch.version.cuda,
        "triton": _version("triton"),
        "library": cuda.targets(),
        "date": datetime.date.today().isoformat(),
        "commit": commit,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def line(row: dict) -> str:
    return f"{row['title']}: " + ", ".join(cells(row))


def cells(row: dict) -> list[str]:
    """Times, then what they come to."""
    said = [f"{name} {_milliseconds(t)}" for name, t in row["seconds"].items()]
    said += [f"{name} failed ({why})" for name, why in row["failed"].items()]
    if row.get("ratio"):
        said.append(f"{row['goals']['peer']} / ours {row['ratio']:.2f} x")
    if row.get("share"):
        said.append(f"{100 * row['share']:.0f} % of the floor")
    if row.get("memory"):
        said += [f"{name} takes {taken / 1e9:.2f} GB" for name, taken in row["memory"].items()]
        if row.get("memory_expected"):
            said.append(f"({row['memory_expected'] / 1e9:.2f} GB expected)")
    if row.get("absent"):
        said.append(f"absent: {row['absent']}")
    return said


def goals(results: dict) -> list[tuple[str, float | None, float]]:
    """(what, reached or None where it could not be measured, wanted)."""
    found = []
    for row in results["rows"]:
        wanted = row["goals"]
        if wanted["ratio"]:
            found.append((f"{row['title']}: {wanted['peer']} / ours", row.get("ratio"), wanted["ratio"]))
        if wanted["share"]:
            found.append((f"{row['title']}: share of the floor", row.get("share"), wanted["share"]))
    return found


def summary(results: dict) -> str:
    where = results["machine"]
    ran = f"{where['device'] or 'no GPU'}, torch {where['torch']}, triton {where['triton']}, commit {where['commit']}, {results['seconds']:.0f} s"
    lines = ["", ran]
    lines += [f"  {name}: {outcome['said'].splitlines()[0]}" for name, outcome in results["checks"].items()]
    for what, reached, wanted in goals(results):
        verdict = "not measured" if reached is None else f"{reached:.2f}, {'met' if reached >= wanted else 'missed'}"
        lines.append(f"  {what}: {verdict} (goal {wanted:g})")
    if results["rehearsal"]:
        lines.append("a rehearsal: toy sizes; the times mean nothing")
    return "\n".join(lines)


def markdown(results: dict) -> str:
    where = results["machine"]
    speeds = results["floor"]
    lines = [
        f"# On a GPU: {where['device'] or 'none, a rehearsal'}, {where['date']}, commit {where['commit']}",
        "",
        f"driver {where['driver'] or 'none'}, torch {where['torch']}, triton {where['triton']}, library for {where['library'] or 'nothing'}; "
        "bf16, medians, the sides take turns, inputs outgrow the second-level cache. "
        f"Floor: {speeds['bytes'] / 1e12:.2f} TB/s copied, {speeds['exps'] / 1e12:.2f} T exponentials/s.",
        "",
        "## Checks",
        "",
    ]
    lines += [f"- {name}: {outcome['said'].splitlines()[0]}" for name, outcome in results["checks"].items()]
    lines += ["", "## Times", "", "| row | figures |", "|---|---|"]
    lines += [f"| {row['title']} | {'; '.join(cells(row))} |" for row in results["rows"]]
    lines += ["", "## Goals", "", "| goal | wanted | reached |", "|---|---|---|"]
    lines += [f"| {what} | {wanted:g} | {'not measured' if reached is None else f'{reached:.2f}'} |" for what, reached, wanted in goals(results)]
    return "\n".join(lines) + "\n"


def plot(results: dict, to: Path) -> None:
    """Each row's time over its floor, a bar a side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in results["rows"] if row["floor"] and row["seconds"]]
    if not rows:
        return
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(rows) + 1.5), layout="constrained")
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        shown = [(j, row["seconds"][name] / row["floor"]) for j, row in enumerate(rows) if name in row["seconds"]]
        axes.barh([j + i * height for j, _ in shown], [ratio for _, ratio in shown], height, label=name)
    axes.set_yticks([j + 0.4 - height / 2 for j in range(len(rows))], [row["title"] for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time / floor")
    axes.legend()
    figure.savefig(to, dpi=120)
    pyplot.close(figure)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
