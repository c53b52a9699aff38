"""A run as files: JSON with machine, versions and commit, a Markdown table, and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medssm.bench.goals import Goal
from medssm.bench.network_goals import network_goals
from medssm.bench.row import OURS
from medssm.files import atomic, write_json, write_text


def write(results: Mapping[str, Any], out: Path) -> None:
    """Write results.json, results.md and, when it was measured, lengths.png into `out`."""
    write_json(out / "results.json", results)
    write_text(out / "results.md", markdown(results))
    if results.get("lengths"):
        _plot_lengths(results, out / "lengths.png")


def write_networks(results: Mapping[str, Any], out: Path) -> None:
    """Write networks.json and networks.md into `out`."""
    write_json(out / "networks.json", results)
    write_text(out / "networks.md", networks_markdown(results))


def networks_markdown(results: Mapping[str, Any]) -> str:
    """A table for inference and one for a training step: median seconds on each kind of kernels, and ratios to ours in float32."""
    where = results["machine"]
    commits = sorted({n["commit"] for n in results["networks"].values()})
    lines = [
        f"# Networks, {results['date']}, commit{'s' * (len(commits) > 1)} {', '.join(commits)}",
        "",
        f"{where['processor']}, {where['threads']} threads, {where['medssm']}, torch {where['torch']}; the kinds of a network take turns in one "
        "process, medians; a kind that takes over 6 s was called once. Training: forward, cross-entropy, backward, an SGD step, on two samples.",
    ]
    lines += _goal_table(network_goals(results["networks"]))
    small = {name: n["small"] for name, n in results["networks"].items() if n["small"]}
    lines += _network_table("Inference", "inference", results["networks"]) + _network_table("Training", "training", results["networks"])
    lines += _network_table("Inference of a small input", "inference", small) + _network_table("Training on small inputs", "training", small)
    return "\n".join(lines) + "\n"


def _network_table(title: str, kind: str, networks: Mapping[str, Any]) -> list[str]:
    networks = {name: n for name, n in networks.items() if n[kind]}
    ways = list(dict.fromkeys(way for n in networks.values() for way in n[kind]))
    columns = ["network", "input", *ways]
    lines = ["", f"## {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, n in networks.items():
        ours = next(iter(n[kind].values()))["median"]
        size = n.get("training_input", n["input"]) if kind == "training" else n["input"]
        cells = [name, " x ".join(map(str, size[1:])), *(_against(n[kind][way]["median"], ours) if way in n[kind] else "" for way in ways)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _goal_table(goals: Sequence[Goal]) -> list[str]:
    """Of those whose rows were measured."""
    rows = [f"| {goal.name} | {goal.wanted} | {goal.reached} | {'met' if goal.met else '**missed**'} |" for goal in goals if goal.met is not None]
    return ["", "| goal | wanted | reached | |", "|---|---|---|---|", *rows] if rows else []


def network_line(name: str, figures: Mapping[str, Any]) -> str:
    """A network's seconds in one line."""
    ways = ", ".join(f"{way} {_seconds(t['median'])}" for way, t in figures["inference"].items())
    return f"{name}: {ways}; training " + ", ".join(f"{way} {_seconds(t['median'])}" for way, t in figures["training"].items())


def _against(seconds: float, ours: float) -> str:
    return _seconds(seconds) + (f" ({seconds / ours:.2g} x)" if seconds != ours else "")


def markdown(results: Mapping[str, Any]) -> str:
    """The goals, then every row: median times, ratios to ours, memory."""
    where = results["machine"]
    lines = [
        f"# Benchmark, {results['date']}, commit {results['commit']}",
        "",
        f"{where['processor']}, {where['cores']} cores, {where['medssm']}, torch {where['torch']}, threads bound; "
        "the sides of a row take turns of at least 0.3 s in one process, of its own; medians, ratios within a row.",
    ]
    if results.get("absent"):
        lines[-1] += f" Not installed: {', '.join(results['absent'])}."
    lines += _goal_table([Goal(**goal) for goal in results.get("goals", [])])
    for row in results["rows"].values():
        lines += [
            "",
            f"## {row['title']}",
            "",
            f"{row['date']}, commit {row['commit']}",
            "",
            "| side | threads | median | min | calls | / ours | ns per token and channel | peak memory |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for threads, sides in row["times"].items():
            ours = sides[OURS]["median"]
            for name, t in sides.items():
                each = f"{t['median'] / row['tokens'] * 1e9:.3g}" if row.get("tokens") else ""
                memory = row.get("memory", {}).get(name)
                shown = f"{memory / 2**20:.0f} MiB" if memory is not None and threads == list(row["times"])[-1] else ""
                lines.append(
                    f"| {name} | {threads} | {_seconds(t['median'])} | {_seconds(t['min'])} | {t['calls']} | {t['median'] / ours:.3g} "
                    f"| {each} | {shown} |"
                )
    return "\n".join(lines) + "\n"


def _seconds(t: float) -> str:
    return f"{t * 1e6:.0f} us" if t < 1e-3 else f"{t * 1e3:.2f} ms" if t < 1 else f"{t:.1f} s"


def _plot_lengths(results: Mapping[str, Any], path: Path) -> None:
    """Time per token against length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for name, points in results["lengths"].items():
        width = 2.5 if name == OURS else 1.2
        axes.plot([p[0] for p in points], [p[1] / p[0] * 1e6 for p in points], marker="o", label=name, linewidth=width)
    axes.set(yscale="log", xlabel="tokens", ylabel="microseconds per token", title="Selective scan forward, 96 channels, state 16, one thread")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic(path) as temporary:
        figure.savefig(temporary)
