"""The memory of a row's side, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from medssm.bench.measure import peak_above
from medssm.bench.rows import QUICK, ROWS


def peak(row: str, side: str, threads: int, quick: bool) -> int | None:
    """Bytes that one call of a row's side takes above what the process held before it, at its peak; None if the system does not say."""
    command = [sys.executable, "-c", "from medssm.bench import memory; memory.main()", row, side, str(threads), str(int(quick))]
    done = subprocess.run(command, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 and done.stdout else None


def main() -> None:
    """The other process: print the bytes of the side that the command line names."""
    row, side, threads, quick = sys.argv[1:]
    torch.set_num_threads(int(threads))
    for each in QUICK.values():  # libraries and threads that a first call loads are not counted
        for call in each.sides().values():
            call()
    print(json.dumps(peak_above((QUICK if quick == "1" else ROWS)[row].sides()[side])))
