"""What python -m medssm_runtime costs besides the network: python bench/start.py [--size tiny] [--calls 8] [--out FOLDER]

A network with random weights is exported to ONNX; the runtime labels one volume of 40 x 52 x 38 voxels with it, in a new process each time, with two
threads. The overhead is the time of the process less what it spent from voxels to labels, as `--json` says: Python's start, the imports, the engine
with the file, reading and writing. The files are in the system's cache. Beside it: the bytes of the weights in float32 and in 8 bits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from record import record

from medssm.compress.int8 import quantize
from medssm.export.onnx import export_onnx
from medssm.segment import networks
from medssm.segment.preprocess import Fitted

SHAPE = (40, 52, 38)
PARTS = ("open", "read", "write")
SHOWN = ("overhead", "start", *PARTS, "network")  # start: Python's own, the imports, and the end of the process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--calls", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "start")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = prepared(folder, args.size)
        calls = [called(folder) for _ in range(args.calls + 1)][1:]
    found = {part: statistics.median(call[part] for call in calls) for part in calls[0]}
    record(
        args.out,
        args.size,
        {"seconds": found, "bytes": sizes, "calls": args.calls},
        "The runtime's overhead, and the bytes of the weights",
        ("medssm_unet", "overhead, s", "start, s", *(f"{part}, s" for part in PARTS), "network, s", "float32, bytes", "8 bits, bytes", "ratio"),
        rows,
    )


def prepared(folder: Path, size: str) -> dict[str, int]:
    """Write model.onnx and scan.nii.gz; the bytes of model.safetensors in float32 and in 8 bits."""
    run, options = folder / "run", {"size": size, "spatial_dims": 3, "in_channels": 1, "out_channels": 3}
    classes = {"background": 0, "anterior": 1, "posterior": 2}
    run.mkdir()
    Fitted(channels=("MR",), spacing=(1.0, 1.0, 1.0), intensity=({"scheme": "zscore"},), classes=classes, ignore=None, patch=(48, 64, 48)).save(
        run / "fitted.json"
    )
    torch.manual_seed(0)
    network = networks.build("medssm_unet", **options)
    networks.save(run, network, networks.describe("medssm_unet", options))
    export_onnx(run, folder / "model.onnx")
    voxels = np.random.default_rng(0).normal(100, 20, SHAPE).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / "scan.nii.gz")
    _, step = quantize(network, [torch.randn(1, 1, 48, 64, 48)])
    (folder / "int8").mkdir()
    networks.save(folder / "int8", network, {**networks.describe("medssm_unet", options), "compression": [step]})
    return {kind: (folder / name / "model.safetensors").stat().st_size for kind, name in (("float32", "run"), ("int8", "int8"))}


def called(folder: Path) -> dict[str, float]:
    """Seconds of the parts of one call."""
    files = [str(folder / name) for name in ("model.onnx", "scan.nii.gz", "labels.nii.gz")]
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "medssm_runtime", *files, "--threads", "2", "--json", "--overwrite"], capture_output=True, check=True
    )
    whole = time.perf_counter() - begun
    parts: dict[str, float] = json.loads(done.stdout)["seconds"]
    overhead = whole - parts["network"]
    return {**parts, "overhead": overhead, "start": overhead - sum(parts[part] for part in PARTS)}


def rows(size: str, found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The line of the table."""
    seconds, sizes = found["seconds"], found["bytes"]
    times = (f"{seconds[part]:.2f}" for part in SHOWN)
    yield size, *times, str(sizes["float32"]), str(sizes["int8"]), f"{sizes['int8'] / sizes['float32']:.3f}"


if __name__ == "__main__":
    main()
