"""One row in a process of its own: memory that the allocator kept from earlier rows would change its times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import torch

from medssm.allocator import keep_freed_memory
from medssm.bench import measure, memory
from medssm.bench.row import COMPILED
from medssm.bench.rows import QUICK, ROWS

_BOUND = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}  # two unbound threads may share a core and are then no faster than one


def row(name: str, seconds: float, quick: bool) -> dict[str, Any]:
    """A row on one and on all threads, each thread bound to a core, and the memory of its sides: {"title", "tokens", "times", "memory"}."""
    return run("apart", name, str(seconds), str(int(quick)))


def run(module: str, *arguments: str) -> dict[str, Any]:
    """Run main() of a module of medssm.bench in another process, each thread bound to a core. Returns the JSON in its last line.

    Raises RuntimeError if it fails.
    """
    command = [sys.executable, "-c", f"from medssm.bench import {module}; {module}.main()", *arguments]
    unbind = _all_cores if "OMP_PROC_BIND" in os.environ and hasattr(os, "sched_setaffinity") else None
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **_BOUND}, preexec_fn=unbind)
    if done.returncode:
        raise RuntimeError(f"bench: {' '.join(arguments)} ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def _all_cores() -> None:
    """Allow all cores: if this process's thread is bound to one core, the row's process would inherit that core alone."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1))


def _measure(name: str, seconds: float, quick: bool) -> dict[str, Any]:
    row, threads = (QUICK if quick else ROWS)[name], torch.get_num_threads()
    if row.kept:
        keep_freed_memory()
    sides = row.sides()
    counts = {"both": sorted({1, threads}), "all": [threads], "one": [1]}[row.threads]
    times = {str(n): measure.times(sides, seconds, n, row.limit) for n in counts}
    result: dict[str, Any] = {"title": row.title, "tokens": row.tokens, "times": times}
    if row.memory:
        del sides
        measured = [side for side in times[str(counts[-1])] if side not in ("ceiling", COMPILED)]
        result["memory"] = {side: memory.peak(name, side, counts[-1], quick) for side in measured}
    return result


def main() -> None:
    """The other process: print the row that the command line names, as JSON."""
    print(json.dumps(_measure(sys.argv[1], float(sys.argv[2]), sys.argv[3] == "1")))
