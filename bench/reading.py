"""The share of `medssm predict` that is reading and writing files: python bench/reading.py DATASET [--size SIZE] [--out FOLDER] ...

`medssm_unet` of that size (default: "small", as `medssm train` has it) with random weights, a patch of 48 x 64 x 48 voxels at 1 mm and two
classes segments the first cases of DATASET/imagesTr, of one channel in nnU-Net's layout, on the CPU. Reading opens the files and brings their
voxels into memory; writing is that of label maps and volumes.csv, until the disk has them. One round runs before those that are timed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from record import record

from medssm.segment import networks
from medssm.segment import predict as module
from medssm.segment.data import FITTED
from medssm.segment.preprocess import Fitted

READING, WRITING = ("open_channels", "read_stored"), ("write_image", "write_volumes")  # what predict calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--size", default="small")
    parser.add_argument("--cases", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    files = sorted((args.dataset / "imagesTr").iterdir())[: args.cases]
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder) / "run", args.size)
        rounds = [one_round(run, files, Path(folder) / f"{i}") for i in range(args.repeats + 1)][1:]
    shares = [(row["reading"] + row["writing"]) / row["total"] for row in rounds]
    result: dict[str, Any] = {"data": args.dataset.name, "cases": len(files), "threads": torch.get_num_threads(), "rounds": rounds}
    result["share"] = statistics.median(shares)
    for row, share in zip(rounds, shares, strict=True):
        reading, writing, disk, total = (f"{row[key]:.3f} s" for key in ("reading", "writing", "disk", "total"))
        print(f"reading {reading}, writing {writing} ({disk} of that the disk) of {total}: {100 * share:.1f} %")
    print(f"median share of reading and writing: {100 * result['share']:.1f} %")
    if args.out:
        record(
            args.out,
            args.size,
            result,
            "Reading and writing files, of predict",
            ("medssm_unet", "data", "threads", "seconds a case", "reading and writing"),
            rows,
        )


def rows(size: str, found: dict[str, Any]) -> list[tuple[str, ...]]:
    """The line of the table."""
    seconds = statistics.median(row["total"] for row in found["rounds"]) / found["cases"]
    return [(size, found["data"], str(found["threads"]), f"{seconds:.3f}", f"{100 * found['share']:.1f} %")]


def make_run(folder: Path, size: str) -> Path:
    """A folder as of a training, with random weights."""
    folder.mkdir()
    classes = {"background": 0, "anterior": 1, "posterior": 2}
    Fitted(("MRI",), (1.0, 1.0, 1.0), ({"scheme": "zscore"},), classes, None, (48, 64, 48)).save(folder / FITTED)
    kwargs = {"spatial_dims": 3, "in_channels": 1, "out_channels": len(classes), "size": size}
    torch.manual_seed(0)
    networks.save(folder, networks.build("medssm_unet", **kwargs), networks.describe("medssm_unet", kwargs))
    return folder


def one_round(run: Path, files: list[Path], out: Path) -> dict[str, float]:
    """Seconds of one call of predict: reading, writing, the part of writing that waits for the disk, total."""
    spent = {"reading": 0.0, "writing": 0.0, "disk": 0.0}
    with contextlib.ExitStack() as patched:
        for what, names in (("reading", READING), ("writing", WRITING)):
            for name in names:
                patched.enter_context(mock.patch.object(module, name, timed(getattr(module, name), spent, what)))
        patched.enter_context(mock.patch("os.fsync", timed(os.fsync, spent, "disk")))
        begun = time.perf_counter()
        module.predict(run, files, out, device="cpu", quiet=True)
        return spent | {"total": time.perf_counter() - begun}


def timed(function: Callable[..., Any], spent: dict[str, float], what: str) -> Callable[..., Any]:
    """The function, which adds its seconds to `spent`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _adding(spent, what):
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def _adding(spent: dict[str, float], what: str) -> Iterator[None]:
    begun = time.perf_counter()
    try:
        yield
    finally:
        spent[what] += time.perf_counter() - begun


if __name__ == "__main__":
    main()
