"""medssm demo structures: networks learn the structures of one hemisphere of a real brain and find those of the other, with a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medssm.segment.demo.pipeline import structures

__all__ = ["show", "structures"]


def show(result: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Print the Dice of each class and network and where the report is; of a demo that was only prepared, its commands."""
    if options["prepare"]:
        print(f"in {result['out']}:", *result["commands"][1:], sep="\n")
    else:
        _print_table(result)


def _print_table(metrics: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    split = metrics["split"]
    table = Table(
        title=f"Dice on the {split['tested']} hemisphere, trained on the {split['trained']} one",
        caption="one volume, similar hemispheres: that it works, not how accurate it is",
    )
    table.add_column(no_wrap=True)
    if len(metrics["rows"]) > 4:  # a row for each network: the classes are in the report
        for title in ("mean Dice", "seconds to train", "seconds to segment"):
            table.add_column(title, justify="right")
        for row in metrics["rows"]:
            costs = [f"{row['seconds']:.0f}", f"{row['predict_seconds']:.1f}"] if "steps" in row else ["", ""]
            table.add_row(row["title"], f"{row['dice']['mean']:.3f}", *costs)
    else:
        for row in metrics["rows"]:
            table.add_column(row["title"], justify="right")
        for name in (*metrics["classes"], "mean"):
            table.add_row(name, *(f"{row['dice'][name]:.3f}" for row in metrics["rows"]), end_section=name == metrics["classes"][-1])
        costs = [f"{row['seconds']:.0f} s" if "steps" in row else "" for row in metrics["rows"]]
        table.add_row(f"{metrics['recipe']['max_steps']:,} steps", *costs)
    console = Console()
    console.print(table)
    console.print(f"report: {metrics['report']}", soft_wrap=True)
