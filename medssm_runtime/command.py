"""Files in, label maps out: what `python -m medssm_runtime` does."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medssm_runtime import scans
from medssm_runtime.errors import UserError, first_line
from medssm_runtime.network import load


def predict(
    model: Path | str,
    inputs: Path | str | Sequence[Path | str],
    out: Path | str,
    *,
    threads: int | None = None,
    overlap: float | None = None,
    mirror: bool | None = None,
    ops: Path | str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Segment NIfTI files; each label map lies on its scan's own grid. A file that is read is never written over.

    Args:
        model: FILE.onnx or FILE.xml, written by medssm export
        inputs: files, or folders of files; the channels of a scan are CASE_0000.nii.gz, CASE_0001.nii.gz, ... or in one file
        out: file for one case, else a folder for CASE.nii.gz
        threads, ops: see `load`
        overlap, mirror: see `Network.segment`
        overwrite: write over files of other origin in `out`
        quiet: print nothing

    Returns:
        {"cases": {name: file}, "failed": {name: reason}, "seconds": {"open", "read", "network", "write"}}: of several cases one that fails does not
        stop the others; "network" is from the voxels to the label map.

    Raises:
        UserError: where nothing can be predicted, or the only case is bad.
    """
    seconds = dict.fromkeys(("open", "read", "network", "write"), 0.0)
    since = time.perf_counter()

    def lap(what: str) -> None:
        nonlocal since
        now = time.perf_counter()
        seconds[what] += now - since
        since = now

    network = load(model, threads=threads, ops=ops)
    lap("open")
    paths = [Path(inputs)] if isinstance(inputs, (str, Path)) else [Path(path) for path in inputs]
    channels = len(network.settings.channels)
    cases = scans.cases_of(paths, channels, Path(out))
    targets = scans.targets(cases, Path(out), overwrite)
    written: dict[str, str] = {}
    failed: dict[str, str] = {}
    for case in cases:
        try:
            data, affine, like = scans.read(case, channels)
            lap("read")
            labels = network.segment(data, affine, overlap=overlap, mirror=mirror)
            lap("network")
            scans.write(targets[case.name], labels, like)
            lap("write")
            written[case.name] = str(targets[case.name])
        except (UserError, MemoryError) as error:
            line = str(error) if str(error).startswith(str(case.files[0])) else f"{case.files[0]}: {first_line(error)}"
            if len(cases) == 1:
                raise UserError(line) from error
            failed[case.name] = line
        if not quiet and case.name in written:
            print(f"{case.files[0]}: {written[case.name]}", file=sys.stderr)
    return {"cases": written, "failed": failed, "seconds": {what: round(value, 3) for what, value in seconds.items()}}
