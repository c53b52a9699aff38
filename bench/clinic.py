"""What a smaller network costs from file to file: python bench/clinic.py RUN... --scans FOLDER [--cases 20] [--rounds 2] [--out FOLDER]

For each run, a folder that `medssm train` or `medssm compress` wrote, and each setting (1 thread, 2 threads, 1 thread without AVX-512; bfloat16 for
the first run): the seconds from the start of `medssm predict` in a new process to the label map of one scan (cold start), the seconds of one more
scan in the same process, the largest memory of the process, the size of the weights, and the share of voxels whose label differs between the
instruction sets. A run that is FILE.onnx is segmented by medssm_runtime, without PyTorch. The settings take turns; of the rounds the least time
counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from record import record

from medssm.compare.cost import PREDICT, alone

ENVIRONMENT = {"OMP_PROC_BIND": "true", "CUDA_VISIBLE_DEVICES": ""}
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MEDSSM_CPU_ISA": "v3"}
SETTINGS: dict[str, dict[str, str]] = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "1 thread, AVX2": {"OMP_NUM_THREADS": "1", **AVX2},
}
HALF = "1 thread, bfloat16"
HEAD = ("network", "setting", "cold start, s", "s a scan", "over the first", "memory, MiB", "weights, MiB", "labels that differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--scans", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--name", default="medssm_unet", help="of this table in the results")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "clinic")
    args = parser.parse_args()
    scans = sorted(args.scans.iterdir())[: args.cases]
    settings = [(run, name) for run in args.runs for name in SETTINGS if run.suffix != ".onnx" or name != "1 thread, AVX2"]
    settings.insert(1, (args.runs[0], HALF))
    found: dict[tuple[Path, str], list[dict[str, float]]] = {setting: [] for setting in settings}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for run, name in settings:
                out = Path(folder) / run.name / name
                cold, one, _ = segmented(run, name, scans[:1], out)
                _, every, memory = segmented(run, name, scans, out)
                found[run, name].append({"cold": cold, "scan": (every - one) / (len(scans) - 1), "memory": memory})
                print(run.name, name, found[run, name][-1], flush=True)
        rows = [
            {"network": run.name, "setting": name, **{key: min(row[key] for row in rounds) for key in rounds[0]}, "weights": weights(run)}
            | {"differ": differing(Path(folder) / run.name / "1 thread", Path(folder) / run.name / name)}
            for (run, name), rounds in found.items()
        ]
    first = next(row["scan"] for row in rows if row["setting"] == "1 thread")
    entry = {"cases": len(scans), "rounds": args.rounds, "rows": [{**row, "over": row["scan"] / first} for row in rows]}
    record(args.out, args.name, entry, "From file to file", HEAD, lines)


def lines(_: str, entry: dict[str, Any]) -> list[tuple[str, ...]]:
    """The lines of the table."""
    form = "{network}|{setting}|{cold:.2f}|{scan:.3f}|{over:.2f}|{memory:.0f}|{weights:.2f}|{differ:.4%}"
    return [tuple(form.format(**row).split("|")) for row in entry["rows"]]


def segmented(run: Path, setting: str, scans: Sequence[Path], out: Path) -> tuple[float, float, float]:
    """A new process that segments these scans into the folder `out`: its seconds, those that it says the scans took, its largest memory in MiB."""
    out.mkdir(parents=True, exist_ok=True)
    target = out / scans[0].name.replace("_0000.", ".") if len(scans) == 1 else out
    common = [*map(str, scans), str(target), "--overwrite", "--quiet", "--json"]
    half = setting == HALF
    if run.suffix == ".onnx":
        threads = SETTINGS[setting]["OMP_NUM_THREADS"]
        command = [sys.executable, "-m", "medssm_runtime", str(run), *common, "--threads", threads]
    else:
        command = [*PREDICT, str(run), *common, "--postprocessing", "none", *(["--precision", "bf16-mixed"] if half else [])]
    printed, taken, memory = alone(command, {**ENVIRONMENT, **SETTINGS["1 thread" if half else setting]})
    seconds = json.loads(printed)["seconds"]  # the runtime says them part by part
    return taken, sum(seconds.values()) if isinstance(seconds, dict) else seconds, (memory or 0) / 2**20


def weights(run: Path) -> float:
    """MiB of the weights of a run, or of an exported file."""
    return (run if run.suffix == ".onnx" else run / "model.safetensors").stat().st_size / 2**20


def differing(folder: Path, other: Path) -> float:
    """The share of the voxels of both folders' label maps whose labels differ."""
    different = total = 0
    for file in sorted(folder.glob("*.nii.gz")):
        one, two = (np.asarray(nib.load(each / file.name).dataobj) for each in (folder, other))
        different += int((one != two).sum())
        total += one.size
    return different / total


if __name__ == "__main__":
    main()
