"""A volume over two processes of one thread each, against one process of two threads: seconds and memory of a process.

    python bench/ranks.py [--edge 96] [--ranks 2] [--size tiny] [--mixer ss_nd] [--repeats 3] [--out FOLDER]

Both run medssm_unet on one volume, forward under inference_mode and a training step: the best of the repeats. Memory is the largest resident set of a
process in one step above what it had before; a small volume went before, so what libraries take at their first call is not in it. Prints both and
their ratios. --out puts them into results.json and results.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from record import record

from medssm import create_model
from medssm.bench.measure import peak_above
from medssm.parallel import Slabs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edge", type=int, default=96)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--mixer", default="ss_nd")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    one, shared = measured(args, 1, args.ranks), measured(args, args.ranks, 1)
    ratios = {key: round(shared[key] / one[key], 3) for key in one}
    entry = {"ranks": args.ranks, "one process": one, "ranks of one thread": shared, "ratio": ratios}
    print(json.dumps(entry, indent=1))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        name = f"{args.size}, {args.mixer}, {args.edge}^3, {args.ranks} ranks"
        record(args.out, name, entry, "A volume over several processes", ("medssm_unet", "step", "one process", "a rank", "ratio"), lines)


def lines(name: str, found: dict[str, Any]) -> list[tuple[str, ...]]:
    """The lines of the table."""
    one, shared, ratios = found["one process"], found["ranks of one thread"], found["ratio"]
    return [(name, step, str(one[step]), str(shared[step]), str(ratios[step])) for step in one]


def measured(args: argparse.Namespace, ranks: int, threads: int) -> dict[str, float]:
    """The slowest rank's seconds, and the largest memory of a rank in MB."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (args, ranks, threads, folder), nprocs=ranks, start_method="spawn")
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    return {key: max(one[key] for one in found) for key in found[0]}


def work(rank: int, args: argparse.Namespace, ranks: int, threads: int, folder: str) -> None:
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    network = create_model("medssm_unet", spatial_dims=3, in_channels=1, out_channels=2, size=args.size, mixer=args.mixer)
    small, whole = (steps(network, shape, ranks) for shape in ((32 * args.ranks, 32, 32), (args.edge,) * 3))
    found: dict[str, float] = {}
    for name, step in whole.items():
        small[name]()
        memory = peak_above(step)
        seconds = []
        for _ in range(args.repeats):
            dist.barrier()
            begun = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begun)
        found |= {f"{name}, s": round(min(seconds), 3), f"{name}, MB": round((memory or 0) / 2**20)}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def steps(network: torch.nn.Module, shape: tuple[int, int, int], ranks: int) -> dict[str, Callable[[], None]]:
    """Prediction and a training step on this rank's part of a volume."""
    slabs = Slabs(network, shape)
    x = slabs.padded(torch.randn(1, 1, slabs.rows.stop - slabs.rows.start, *shape[1:]))
    block: Any = slabs if ranks > 1 else contextlib.nullcontext()

    def predict() -> None:
        network.eval()
        with torch.inference_mode(), block:
            network(x)

    def train() -> None:
        network.train().zero_grad(set_to_none=True)
        with block:
            y = network(x)
        y.square().mean().backward()
        slabs.add_gradients(network)

    return {"predict": predict, "train": train}


if __name__ == "__main__":
    main()
