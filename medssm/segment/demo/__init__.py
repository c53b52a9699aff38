"""medssm demo structures: networks learn the structures of one hemisphere of a real brain and find those of the other, with a report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from medssm.allocator import keep_freed_memory
from medssm.nn.mixers import MIXERS
from medssm.segment.demo.data import SIDES, SOURCES
from medssm.segment.demo.pipeline import FAST_STEPS, OURS, STEPS, structures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command, as `structures` documents them."""
    parser.add_argument("task", choices=("structures",), help="structures: deep structures of a T1 brain MRI")
    parser.add_argument("--out", default="demo-out", help="folder for all results; one that was stopped goes on (default %(default)s)")
    parser.add_argument("--data", choices=tuple(SOURCES), default="icbm2009c", help="default %(default)s")
    parser.add_argument(
        "--model",
        nargs="+",
        default=[OURS],
        metavar="NAME",
        help=f"one of `medssm models`, or monai.networks.nets.NAME; several stand side by side in the report (default {OURS})",
    )
    parser.add_argument(
        "--mixer",
        dest="mixers",
        nargs="+",
        default=[],
        choices=tuple(MIXERS),
        metavar="NAME",
        help=f"further networks beside the first: {OURS} with this mixer, one of {', '.join(MIXERS)}",
    )
    parser.add_argument("--size", help="the model's size: tiny, small or base (default tiny for medssm_unet, else the model's own)")
    parser.add_argument("--model-kwargs", type=json.loads, default={}, metavar="JSON", help="more keywords for the model")
    parser.add_argument("--steps", type=int, help=f"training steps of each network (default {STEPS}; with --fast {FAST_STEPS})")
    parser.add_argument("--trained", choices=SIDES, default="right", help="the hemisphere to train on (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default %(default)s)")
    parser.add_argument("--fast", action="store_true", help="at 3 mm and in seconds: to see it work, not to see it good")
    parser.add_argument("--prepare", action="store_true", help="write the data set, print the commands that use it, and stop")
    parser.add_argument("--overwrite", action="store_true", help="train anew in a folder that has a demo")
    parser.add_argument("--json", action="store_true", help="print metrics.json")
    parser.add_argument("--quiet", action="store_true", help="no progress, no table")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the demo and print its table, or the commands of a prepared one."""
    keep_freed_memory()
    options = {name: value for name, value in vars(args).items() if name not in ("task", "json")}
    result = structures(**options)
    if not (args.quiet or args.json):
        show(result, options)
    return result


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
