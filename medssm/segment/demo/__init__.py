"""medssm demo structures: networks learn the structures of one hemisphere of a real brain and find those of the other, with a report."""

from __future__ import annotations

import json

from medssm.allocator import keep_freed_memory
from medssm.nn.mixers import MIXERS
from medssm.segment.demo.data import SIDES, SOURCES
from medssm.segment.demo.pipeline import FAST_SECONDS, OURS, SECONDS, structures


def add_arguments(parser) -> None:
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
        nargs="+",
        default=[],
        choices=tuple(MIXERS),
        metavar="NAME",
        help=f"further networks beside the first: {OURS} with this mixer, one of {', '.join(MIXERS)}",
    )
    parser.add_argument("--size", help="the model's size: tiny, small or base (default tiny for medssm_unet, else the model's own)")
    parser.add_argument("--model-kwargs", type=json.loads, default={}, metavar="JSON", help="more keywords for the model")
    parser.add_argument("--seconds", type=float, help=f"of training, for each network (default {SECONDS:g}; with --fast {FAST_SECONDS:g})")
    parser.add_argument("--trained", choices=SIDES, default="right", help="the hemisphere to train on (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default %(default)s)")
    parser.add_argument("--fast", action="store_true", help="at 3 mm and for seconds: to see it work, not to see it good")
    parser.add_argument("--prepare", action="store_true", help="write the data set, print the commands that use it, and stop")
    parser.add_argument("--overwrite", action="store_true", help="train anew in a folder that has a demo")
    parser.add_argument("--json", action="store_true", help="print metrics.json")
    parser.add_argument("--quiet", action="store_true", help="no progress, no table")


def run(args) -> dict:
    keep_freed_memory()
    kwargs = args.model_kwargs | ({"size": args.size} if args.size else {})
    model = args.model if len(args.model) > 1 else args.model[0]
    result = structures(
        args.out,
        data=args.data,
        model=model,
        model_kwargs=kwargs,
        mixers=args.mixer,
        seconds=args.seconds,
        trained=args.trained,
        seed=args.seed,
        device=args.device,
        fast=args.fast,
        prepare=args.prepare,
        overwrite=args.overwrite,
        quiet=args.quiet,
    )
    if not (args.quiet or args.json):
        _print_commands(args.out, result["commands"]) if args.prepare else _print_table(result)
    return result


def _print_commands(out: str, commands: list[str]) -> None:
    print(f"in {out}:")
    print(*commands[1:], sep="\n")


def _print_table(metrics: dict) -> None:
    """Dice of each class and row, and where the rest is."""
    from rich.console import Console
    from rich.table import Table

    split = metrics["split"]
    table = Table(
        title=f"Dice on the {split['tested']} hemisphere, trained on the {split['trained']} one",
        caption="one volume, similar hemispheres: that it works, not how accurate it is",
    )
    table.add_column(no_wrap=True)
    if len(metrics["rows"]) > 4:  # the classes stand in the report
        for title in ("mean Dice", "training steps", "seconds to segment"):
            table.add_column(title, justify="right")
        for row in metrics["rows"]:
            costs = (str(row["steps"]), f"{row['predict_seconds']:.1f}") if "steps" in row else ("", "")
            table.add_row(row["title"], f"{row['dice']['mean']:.3f}", *costs)
    else:
        for row in metrics["rows"]:
            table.add_column(row["title"], justify="right")
        for name in (*metrics["classes"], "mean"):
            table.add_row(name, *(f"{row['dice'][name]:.3f}" for row in metrics["rows"]), end_section=name == metrics["classes"][-1])
    console = Console()
    console.print(table)
    console.print(f"report: {metrics['report']}", soft_wrap=True)
