"""The table of the mixers' measured cost: a file of its own, and a part of the docs' page between two marks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medssm.files import write_json, write_text

BEGIN, END = "<!-- begin: medssm bench --mixers -->", "<!-- end -->"
_COLUMNS = ("mixer", "parameters", "inference", "memory", "forward and backward", "memory")


def write(results: Mapping[str, Any], out: Path, docs: Path | None) -> None:
    """Write mixers.json and mixers.md into `out`, and the table also into the page `docs`."""
    write_json(out / "mixers.json", results)
    write_text(out / "mixers.md", f"# Mixers on a volume\n\n{table(results)}\n")
    if docs is not None:
        write_text(docs, filled(docs.read_text(), results))


def filled(page: str, results: Mapping[str, Any]) -> str:
    """The page with the table between its marks."""
    before, rest = page.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{rest.split(END, 1)[1]}"


def table(results: Mapping[str, Any]) -> str:
    """A row for each mixer, and below the table what was measured, where and when."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---|" + "---:|" * (len(_COLUMNS) - 1)]
    for name, m in results["mixers"].items():
        cells = [
            f"`{name}`",
            f"{m['parameters'] / 1e3:.1f} k",
            _milliseconds(m["inference"]),
            _mebibytes(m["memory"]),
            _milliseconds(m["training"]),
            _mebibytes(m["training_memory"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    where, commits = results["machine"], sorted({m["commit"] for m in results["mixers"].values()})
    sizes = sorted({" x ".join(map(str, m["size"])) + f" voxels of {m['channels']} channels" for m in results["mixers"].values()})
    return "\n".join(
        [
            *lines,
            "",
            f"One volume of {', '.join(sizes)}, float32; medians; memory: the peak above the mixer's own and its input's. "
            f"{where['threads']} threads of {where['processor']}, torch {where['torch']}, {results['date']}, commit {', '.join(commits)}.",
        ]
    )


def line(name: str, m: Mapping[str, Any]) -> str:
    """A mixer's figures in one line."""
    return (
        f"{name}: inference {_milliseconds(m['inference'])}, {_mebibytes(m['memory'])}; forward and backward {_milliseconds(m['training'])}, "
        f"{_mebibytes(m['training_memory'])}"
    )


def _milliseconds(taken: Mapping[str, float]) -> str:
    return f"{taken['median'] * 1e3:.0f} ms"


def _mebibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.0f} MiB"
