"""What a run costs where it is used: calibration of its probabilities, and seconds and memory of a new process that segments one scan."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from medssm.errors import UserError
from medssm.files import read_json, write_json
from medssm.segment.cases import Case
from medssm.segment.data import load_classes
from medssm.segment.uncertainty.reliability import Reliability
from medssm.segment.uncertainty.sums import PROBABILITIES, map_of
from medssm.segment.uncertainty.worth import Pair, add_probabilities

PREDICT = (sys.executable, "-m", "medssm", "predict")


def calibration(run: Path, predictions: Mapping[str, Path], references: Mapping[str, Path], ignore: int | None) -> dict[str, float | None]:
    """{"ece", "ece_unsure"}: the expected calibration error over the voxels of all cases (`Reliability`), as the mean over the foreground classes.

    The probabilities beside the predictions are read and removed.
    """
    table, ignored = load_classes(run)
    names = {name: (values,) if isinstance(values, int) else tuple(values) for name, values in table.items()}
    found: dict[str, Reliability] = {}
    for case, file in predictions.items():
        if case in references:
            add_probabilities(found, Pair.read(file, references[case], ignored if ignore is None else ignore), names)
        map_of(file, PROBABILITIES).unlink(missing_ok=True)
    results = [counts.result() for counts in found.values()]
    columns = {name: [value for result in results if (value := result[name]) is not None] for name in ("ece", "ece_unsure")}
    return {name: mean(values) if values else None for name, values in columns.items()}


def cold_start(run: Path, case: Case, device: str) -> dict[str, float | None]:
    """{"cold_seconds", "peak_bytes"}: of a new process, from its start to the label map of one scan, and its largest memory.

    Raises UserError where the process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        scans = Path(folder) / "scan.json"
        write_json(scans, {"test": [{"name": "scan", "image": [str(file.resolve()) for file in case.images]}]})
        words = [str(run), str(scans), str(Path(folder) / "scan.nii.gz"), "--device", device, "--postprocessing", "none", "--quiet"]
        _, seconds, memory = alone([*PREDICT, *words])
    return {"cold_seconds": seconds, "peak_bytes": memory}


# Runs a command and writes [its status, its seconds, its largest memory] into a file. It is small, for a process begins with the peak of its parent.
_WATCH = """
import json, os, subprocess, sys, time
begun = time.perf_counter()
process = subprocess.Popen(sys.argv[2:])
if hasattr(os, "wait4"):
    _, status, usage = os.wait4(process.pid, 0)
    code, memory = os.waitstatus_to_exitcode(status), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
else:
    code, memory = process.wait(), None
seconds = time.perf_counter() - begun
with open(sys.argv[1], "w") as file:
    json.dump([code, seconds, memory], file)
"""


def alone(command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[str, float, int | None]:
    """What a new process prints, its seconds, and its largest memory in bytes; None where the system does not count it.

    Raises UserError with what it said where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        watch = [sys.executable, "-c", _WATCH, str(found), *command]
        done = subprocess.run(watch, env=environment and {**os.environ, **environment}, capture_output=True, text=True)
        code, seconds, memory = read_json(found) if found.exists() else (done.returncode, 0.0, None)
    if code:
        raise UserError(f"{' '.join(command)}: failed: {done.stderr.strip()[-500:]}")
    return done.stdout, seconds, memory
