"""Where the time of each network goes, in inference: python bench/where.py [PATTERN] [--out FOLDER] [--resume]

Shares of the wall-clock time of one call at the network's listed input, in float32 on the CPU, by torch.profiler: what an operator takes without
those that it calls. Our kernels, which PyTorch does not see, are marked for it. The rest is Python between the operators.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from record import record
from torch.profiler import ProfilerActivity, profile, record_function

from medssm.bench.networks import build
from medssm.files import read_json
from medssm.machine import commit
from medssm.models import list_models
from medssm.ops.op import Op

# The words by which an operator's name is known, one of which it contains; the first kind that fits.
KINDS = {
    "our kernels": "medssm::",
    "convolutions": "conv",
    "matrix products": "mm linear dot_product softmax attention",
    "norms": "norm aten::mean aten::var",
    "resizing": "upsample pool",
    "copies": "copy cat clone contiguous pad index gather roll shuffle flip repeat zero fill stack",
    "element-wise": "gelu relu silu sigmoid add sub mul div tanh elu exp clamp sqrt pow hardswish",
}
OTHER = "Python and others"
OURS_TO_FUSE = ("copies", "element-wise")
HEAD = ("network", "input", "time", *KINDS, OTHER, "largest of copies and element-wise passes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="*")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true", help="leave out those that FOLDER has of this commit")
    args = parser.parse_args()
    file = args.out and args.out / "results.json"
    done = read_json(file) if args.resume and file and file.exists() else {}
    for name in list_models(args.pattern):
        if done.get(name, {}).get("commit") == commit():
            continue
        found = shares(name)
        for row in rows(name, found):
            print(" | ".join(row), flush=True)
        if args.out:
            record(args.out, name, found, "Where the time goes, in inference", HEAD, rows)


def shares(name: str) -> dict[str, Any]:
    """{"input", "seconds", "threads", "kinds": {kind: share}, "operators": {operator: share}} of a network."""
    model, x = build(name, quick=False)
    model.eval()
    with torch.no_grad(), _marked():
        model(x)
        begun = time.perf_counter()
        model(x)
        rounds = max(1, min(10, round(1 / (time.perf_counter() - begun))))
        taken, whole = Counter[str](), []
        for _ in range(rounds):
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                begun = time.perf_counter()
                model(x)
                whole.append(time.perf_counter() - begun)
            taken.update({event.key: event.self_cpu_time_total * 1e-6 for event in profiled.key_averages()})
    kinds, operators = dict.fromkeys((*KINDS, OTHER), 0.0), {}
    for operator, seconds in taken.items():
        share = seconds / sum(whole)
        kinds[kind(operator)] += share
        operators[operator] = share
    kinds[OTHER] += max(0.0, 1 - sum(kinds.values()))
    largest = dict(sorted(operators.items(), key=lambda item: -item[1])[:12])
    return {"input": list(x.shape), "seconds": statistics.median(whole), "threads": torch.get_num_threads(), "kinds": kinds, "operators": largest}


def kind(operator: str) -> str:
    return next((kind for kind, words in KINDS.items() if any(word in operator for word in words.split())), OTHER)


def rows(name: str, found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    kinds = [f"{100 * share:.0f} %" for share in found["kinds"].values()]
    largest = [f"{operator.split('::')[-1]} {100 * share:.0f} %" for operator, share in found["operators"].items() if kind(operator) in OURS_TO_FUSE]
    yield name, " x ".join(map(str, found["input"][1:])), f"{1e3 * found['seconds']:.0f} ms", *kinds, ", ".join(largest[:3])


@contextlib.contextmanager
def _marked() -> Iterator[None]:
    """Each call of an op of ours is an operator to the profiler."""
    call = Op.__call__

    def marked(self: Op, *args: Any, **options: Any) -> Any:
        with record_function(f"medssm::{self.name}"):
            return call(self, *args, **options)

    with mock.patch.object(Op, "__call__", marked):
        yield


if __name__ == "__main__":
    main()
