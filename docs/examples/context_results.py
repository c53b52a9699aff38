"""The results of context.py as tables with intervals and as a plot: Dice of the named structure against the distance of its marker.

    python docs/examples/context_results.py results --page docs/context.md --plot docs/context.png

An interval holds 95 % of 2,000 bootstrap samples over seeds and over test pictures. A difference is of the same pictures and the same samples.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from matplotlib.figure import Figure

from medssm.files import atomic, read_json, write_text

Run: TypeAlias = Mapping[str, Any]
Runs: TypeAlias = Mapping[tuple[str, str, int | None], list[Run]]
SAMPLES, WANTED = 2000, 0.05
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#884400", "#777777", "#6633AA")


class Row(NamedTuple):
    """Whose runs a row is made of: the network, the side of the parts that it was trained on (None: whole pictures), the way of testing."""

    network: str
    patch: int | None = None
    way: str = "whole"

    def __str__(self) -> str:
        trained = (
            f", trained on {self.patch} x {self.patch}, tested on {'windows' if self.way == 'windows' else 'whole pictures'}" if self.patch else ""
        )
        return f"`{self.network}`{trained}"


def _rows(names: str) -> tuple[Row, ...]:
    return tuple(map(Row, names.split()))


# For each table and panel: the task, its rows, and the one that the others are compared with.
TABLES: dict[str, tuple[str, tuple[Row, ...], Row]] = {
    "mixers": ("kind", _rows("ss_nd linear_attention gla delta mamba2 rwkv conv large_kernel none basic_unet"), Row("conv")),
    "side": ("side", _rows("ss_nd linear_attention gla delta mamba2 rwkv conv large_kernel none"), Row("conv")),
    "orders": ("kind", _rows("ss_nd one_way raster snake zigzag hilbert"), Row("ss_nd")),
    "places": ("kind", _rows("ss_nd two_blocks half_resolution deep_ss_nd deep_coarsest deep_none"), Row("ss_nd")),
    "patches": ("kind", (Row("ss_nd"), *(Row(name, 16, way) for name in ("ss_nd", "conv") for way in ("whole", "windows"))), Row("ss_nd")),
}


class Group:
    """The runs of one network on one task, which differ in the seed only, tested in one way."""

    def __init__(self, runs: Sequence[Run], way: str = "whole") -> None:
        self.runs, self.way = sorted(runs, key=lambda one: int(one["seed"])), way
        self.distances = [int(distance) for distance in runs[0]["tests"][way]]

    def scores(self, distance: int) -> dict[str, np.ndarray]:
        """{"dice", "named"}: (1 + SAMPLES,) each: the mean over seeds, then that of each bootstrap sample."""
        tests = [one["tests"][self.way][str(distance)] for one in self.runs]
        columns = {name: np.array([[int(n) for n in test[name].split()] for test in tests]) for name in tests[0]}  # (seeds, pictures)
        seeds, pictures = columns["named"].shape
        seed_weights, weights = _weights(seeds, [1, distance]), _weights(pictures, [2, distance])
        of_kind = np.arange(pictures) % 2  # as context.py draws them: class 1, class 2, class 1, ...
        dice = np.zeros(seed_weights.shape)  # (samples, seeds)
        for kind in (0, 1):
            right, disc = (weights @ (columns[name] * (of_kind == kind)).T for name in ("right", "disc"))
            dice += right / (weights @ columns[f"as{kind + 1}"].T + disc).clip(1)
        of_each = {"dice": dice, "named": weights @ columns["named"].T / pictures}
        return {name: (values * seed_weights).sum(1) / seeds for name, values in of_each.items()}

    def from_distance(self, other: Group) -> int | None:
        """The least distance from which on the Dice is above the other's by WANTED or more, with the whole interval."""
        found = None
        for distance in reversed(self.distances):
            difference = self.scores(distance)["dice"] - other.scores(distance)["dice"]
            if interval(difference)[1] < WANTED:
                break
            found = distance
        return found


def _weights(count: int, seed: Sequence[int]) -> np.ndarray:
    """How often each of `count` things is taken: once, then by the bootstrap, (1 + SAMPLES, count)."""
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), SAMPLES)
    return np.concatenate([np.ones((1, count)), drawn])


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """The value, and the bounds of its interval."""
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return float(values[0]), float(low), float(high)


def read(folder: Path) -> Runs:
    """The 2D runs in a folder by (task, network, patch)."""
    found = defaultdict(list)
    for one in map(read_json, sorted(folder.glob("2d-*.json"))):
        found[one["task"], one["network"], one["patch"]].append(one)
    return dict(found)


def group(runs: Runs, task: str, row: Row) -> Group | None:
    """The runs of a row, None where there are none."""
    found = runs.get((task, row.network, row.patch))
    return Group(found, row.way) if found else None


def shown(runs: Runs) -> list[str]:
    """The tables that have runs of what the others are compared with, and of another one."""
    return [name for name, (task, rows, base) in TABLES.items() if group(runs, task, base) and sum(bool(group(runs, task, row)) for row in rows) > 1]


def table(runs: Runs, task: str, rows: Sequence[Row], base: Row) -> str:
    """Markdown: a line for each row that has runs."""
    there = {row: found for row in rows if (found := group(runs, task, row))}
    distances = next(iter(there.values())).distances
    head = ["network", "seeds", "multiply-adds a pixel", "sees", *(f"D = {d}" for d in distances), f"{WANTED} ahead of `{base.network}`"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for row, of_row in there.items():
        first = of_row.runs[0]
        cells = [str(row), str(len(of_row.runs)), f"{first['multiply_adds_per_voxel']:,}", _sees(first["field"])]
        cells += ["{:.2f} ({:.2f} to {:.2f})".format(*interval(of_row.scores(d)["dice"])) for d in distances]
        start = of_row.from_distance(there[base])
        cells.append("" if row == base else "nowhere" if start is None else f"from D = {start}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _sees(field: int) -> str:
    return "all" if field >= 96 else f"{field} px"


def plot(runs: Runs, path: Path) -> None:
    """A panel for each table that has something to compare: Dice against distance, with intervals as bands."""
    drawn = shown(runs)
    lines = -(-len(drawn) // 2)
    figure = Figure(figsize=(11, 4 * lines), dpi=100, layout="constrained")
    panels = list(figure.subplots(lines, 2, squeeze=False).flat)
    for unused in panels[len(drawn) :]:
        unused.remove()
    for axes, title in zip(panels, drawn, strict=False):
        task, rows, _ = TABLES[title]
        there = [(row, found) for row in rows if (found := group(runs, task, row))]
        for (row, of_row), colour in zip(there, COLOURS, strict=False):
            middle, low, high = np.transpose([interval(of_row.scores(d)["dice"]) for d in of_row.distances])
            axes.plot(of_row.distances, middle, "o-", color=colour, label=str(row).replace("`", ""), ms=4)
            axes.fill_between(of_row.distances, low, high, color=colour, alpha=0.12, lw=0)
        axes.axhline(0.5, color="0.5", ls=":", lw=1)
        axes.set(title=f"{title} (task {task!r})", xlabel="distance of the marker in pixels", ylabel="Dice of the named disc", ylim=(0, 1.02))
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    with atomic(path) as temporary:
        figure.savefig(temporary)


def filled(page: str, runs: Runs) -> str:
    """The page with each table between its marks, `<!-- begin: NAME -->` and `<!-- end -->`."""
    for name, of_table in TABLES.items():
        between = re.compile(f"(<!-- begin: {name} -->\n).*?(<!-- end -->)", re.S)
        page = between.sub(lambda marks, of_table=of_table: f"{marks[1]}{table(runs, *of_table)}\n{marks[2]}", page)  # type: ignore[misc]
    return page


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="folder of the runs")
    parser.add_argument("--page", type=Path, help="a page whose tables are written anew")
    parser.add_argument("--plot", type=Path, help="PNG file")
    given = parser.parse_args()
    runs = read(given.results)
    if given.page:
        write_text(given.page, filled(given.page.read_text(), runs))
    if given.plot:
        plot(runs, given.plot)
    if not given.page:
        for name in shown(runs):
            print(name, table(runs, *TABLES[name]), sep="\n", end="\n\n")


if __name__ == "__main__":
    main()
