"""What a run costs where it is used: calibration of its probabilities, and seconds and memory of a new process that segments one scan."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from medssm.errors import UserError
from medssm.files import write_json
from medssm.segment.cases import Case
from medssm.segment.data import load_classes
from medssm.segment.uncertainty.reliability import Reliability
from medssm.segment.uncertainty.sums import PROBABILITIES, map_of
from medssm.segment.uncertainty.worth import Pair, add_probabilities

PREDICT = (sys.executable, "-c", "import sys; from medssm.cli import main; sys.exit(main())", "predict")


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


def alone(command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[str, float, int | None]:
    """What a new process prints, its seconds, and its largest memory in bytes; None where the system does not count it.

    Raises UserError with what it said where it fails.
    """
    begun, memory = time.perf_counter(), None
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, env=environment and {**os.environ, **environment}, stdout=subprocess.PIPE, stderr=said, text=True) as process,
    ):
        assert process.stdout
        printed = process.stdout.read()
        if sys.platform == "win32":
            process.wait()
        else:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            memory = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        said.seek(0)
        if process.returncode:
            raise UserError(f"{' '.join(command)}: failed: {said.read().strip()[-500:]}")
    return printed, time.perf_counter() - begun, memory
