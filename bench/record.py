"""A folder of results: results.json, with one entry for each size, and results.md, its table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from medssm.bench import origin
from medssm.files import read_json, write_json, write_text


def record(
    folder: Path,
    size: str,
    entry: dict[str, Any],
    title: str,
    head: tuple[str, ...],
    rows: Callable[[str, dict[str, Any]], Iterable[tuple[str, ...]]],
) -> None:
    """Put an entry, with where it was measured, beside those of the other sizes; `rows` makes lines of the table from an entry."""
    file = folder / "results.json"
    results = read_json(file) if file.exists() else {}
    results[size] = {**origin(), **entry}
    write_json(file, results)
    lines = [f"# {title}", "", f"| {' | '.join((*head, 'measured'))} |", "|---" * (len(head) + 1) + "|"]
    for name, found in results.items():
        where = f"{found['date']}, commit {found['commit']}, {found['machine']['processor']}"
        lines += [f"| {' | '.join((*row, where))} |" for row in rows(name, found)]
    write_text(folder / "results.md", "\n".join(lines) + "\n")
    print(f"written: {file}")
