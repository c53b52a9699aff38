"""medssm models: the networks that create_model builds, with their size, their cost at a stated input, and where they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from medssm.errors import UserError
from medssm.models import create_model, list_models, list_upstream, model_facts

MEASURED = Path(__file__).with_name("measured.json")  # what `medssm bench --networks` wrote
Row = dict[str, Any]  # what is said of one network
_WAYS = ("native", "native, bf16", "native, compiled", "upstream's arithmetic in PyTorch")  # of inference, as the benchmark names them
_COLUMNS = (
    "network",
    "dimensions",
    "parameters",
    "input",
    "multiply-adds",
    "memory",
    "CPU",
    "bf16",
    "compiled",
    "in PyTorch",
    "source",
    "licence",
    "parity",
)


def models(pattern: str = "*", /, *, markdown: bool = False) -> dict[str, Any]:
    """The networks that create_model builds, with their size, their cost at a stated input, and where they come from.

    Sizes are counted without allocating; costs are those measured for this release.

    Args: Options
        pattern: shell pattern of model names, for instance 'umamba*'
        markdown: print the table as Markdown, as the docs have it

    Returns:
        {"models": a dictionary for each, "measured": the machine and the day that the costs were measured on}
    """
    names = list_models(pattern)
    if not names:
        raise UserError(f"no model matches {pattern!r}; the models are {', '.join(list_models())}")
    measured = json.loads(MEASURED.read_text()) if MEASURED.is_file() else {"networks": {}}
    rows = [_row(name, measured["networks"].get(name)) for name in names]
    return {"models": rows, "measured": {k: v for k, v in measured.items() if k != "networks"}}


def show(result: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Print the table, as text or as Markdown."""
    rows, note = result["models"], _note(result["measured"])
    if options["markdown"]:
        print(markdown(rows, note))
        return
    table = _table(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print("\n".join("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in table))
    print(note)


def markdown(rows: list[Row], note: str) -> str:
    """The docs' page."""
    head, *body = (f"| {' | '.join(cells)} |" for cells in _table(rows))
    lines = [
        "# Networks",
        "",
        "`medssm models` prints this table, `medssm models --markdown` this page.",
        "",
        head,
        f"|{'---|' * (head.count('|') - 1)}",
    ]
    return "\n".join([*lines, *body, "", note])


def _table(rows: list[Row]) -> list[list[str]]:
    """The head and each network's cells, without the columns that are empty."""
    body = [_cells(row) for row in rows]
    kept = [i for i in range(len(_COLUMNS)) if any(cells[i] for cells in body)]
    return [[cells[i] for i in kept] for cells in (_COLUMNS, *body)]


def _row(name: str, measured: Row | None) -> Row:
    """name, parameters in 3D and 2D (1 input channel, 2 classes; None where the network needs a library that is missing or reads values as it
    is built), the facts, and what was measured."""
    facts = model_facts(name)
    sizes: dict[int, int | None] = {}
    for dims in facts.dims:
        try:
            with torch.device("meta"):
                sizes[dims] = sum(p.numel() for p in create_model(name, dims).parameters())
        except (ValueError, RuntimeError):
            sizes[dims] = None
    compared = any(upstream == name or upstream.startswith(f"{name}_") for upstream in list_upstream())
    return {
        "name": name,
        "task": facts.task,
        "dimensions": list(facts.dims),
        "parameters": {f"{dims}d": count for dims, count in sizes.items()},
        "paper": facts.paper,
        "source": facts.source,
        "licence": facts.licence,
        "parity": facts.parity or ("outputs and weight names" if compared else ""),
        "measured": measured,
    }


def _cells(row: Row) -> list[str]:
    m, dims = row["measured"], ", ".join(map(str, row["dimensions"]))
    archive = "doi" if row["paper"].startswith("10.") else "arXiv"
    source = row["source"] + (f" ({archive} {row['paper']})" if row["paper"] else "")
    if m is None:
        sizes = ", ".join(_millions(n) for n in row["parameters"].values() if n is not None)
        return [row["name"], dims, sizes, *[""] * (3 + len(_WAYS)), source, row["licence"], row["parity"]]
    times = (f"{m['inference'][way]['median'] * 1e3:.0f} ms" if way in m["inference"] else "" for way in _WAYS)
    costs = [f"{m['multiply_adds'] / 1e9:.1f} G", f"{m['memory'] / 2**20:.0f} MiB", *times]
    size = " x ".join(map(str, m["input"][1:]))
    return [row["name"], dims, _millions(m["parameters"]), size, *costs, source, row["licence"], row["parity"]]


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count / 1e3:.0f} k"


def _note(measured: Row) -> str:
    where = measured.get("machine")
    if not where:
        return "Nothing was measured for this release: medssm bench --networks."
    return (
        "Parameters, multiply-adds of convolutions, matrix products and scans, memory above the network's own and median time of one inference: CPU, "
        "in float32; bf16, under autocast, where the processor computes in it; compiled, by torch.compile; in PyTorch, by the source's arithmetic (a "
        "time-chunked scan, attention with a matrix of weights). One input of channels x spatial size; a way that was not measured has no column; "
        f"{where['threads']} threads of {where['processor']}, torch {where['torch']}, {measured['date']}. "
        "Parity: against values recorded from the source's own classes; no released checkpoint has been loaded."
    )
