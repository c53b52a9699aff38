"""Files in, label maps or a table of classes out: what `python -m medssm_runtime` does."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssm_runtime import images, scans, table
from medssm_runtime.classifier import Classifier
from medssm_runtime.errors import UserError, first_line
from medssm_runtime.network import Network, load


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
    """Segment NIfTI files, each label map on its scan's own grid; or, with a classifier, write a CSV of classes. A file that is read is never lost.

    Args:
        model: FILE.onnx or FILE.xml, written by medssm export
        inputs: files, or folders of files; the channels of a scan are CASE_0000.nii.gz, CASE_0001.nii.gz, ... or in one file; a classifier takes each
            file as an image, PNG and JPEG too
        out: file for one case, else a folder for CASE.nii.gz; of a classifier FILE.csv
        threads, ops: see `load`
        overlap, mirror: see `Network.segment`
        overwrite: write over files of other origin in `out`
        quiet: print nothing

    Returns:
        {"cases": {name: file}, "failed": {name: reason}, "seconds": {"open", "read", "network", "write"}}: of several cases one that fails does not
        stop the others; "network" is from the voxels to the label map. A classifier has "images": {path: {"label", "probabilities": {class: value}}}
        in place of "cases".

    Raises:
        UserError: where nothing can be predicted, or the only case is bad.
    """
    clock = _Clock()
    network = load(model, threads=threads, ops=ops)
    clock.lap("open")
    paths, out = [Path(inputs)] if isinstance(inputs, (str, Path)) else [Path(path) for path in inputs], Path(out)
    if isinstance(network, Classifier):
        for name, value in (("overlap", overlap), ("mirror", mirror)):
            if value is not None:
                raise UserError(f"{name}: {network.path} classifies: it sees each image once, as a whole")
        return _classified(network, paths, out, overwrite, quiet, clock)
    return _segmented(network, paths, out, overlap, mirror, overwrite, quiet, clock)


def _segmented(
    network: Network, paths: list[Path], out: Path, overlap: float | None, mirror: bool | None, overwrite: bool, quiet: bool, clock: _Clock
) -> dict[str, Any]:
    channels = len(network.settings.channels)
    cases = scans.cases_of(paths, channels, out)
    targets = scans.targets(cases, out, overwrite)
    written: dict[str, str] = {}
    failed: dict[str, str] = {}
    for case in cases:
        try:
            data, affine, like = scans.read(case, channels)
            clock.lap("read")
            labels = network.segment(data, affine, overlap=overlap, mirror=mirror)
            clock.lap("network")
            scans.write(targets[case.name], labels, like)
            clock.lap("write")
            written[case.name] = str(targets[case.name])
        except (UserError, MemoryError) as error:
            failed[case.name] = _line(error, case.files[0], alone=len(cases) == 1)
        if not quiet and case.name in written:
            print(f"{case.files[0]}: {written[case.name]}", file=sys.stderr)
    return {"cases": written, "failed": failed, "seconds": clock.seconds}


def _classified(network: Classifier, paths: list[Path], out: Path, overwrite: bool, quiet: bool, clock: _Clock) -> dict[str, Any]:
    classes = network.settings.classes
    files = images.images_of(paths)
    table.check(out, files, overwrite)
    if network.settings.temperature is None and not quiet:
        print("temperature: none was fitted, since no image was held out in training: the probabilities are not calibrated", file=sys.stderr)
    rows: dict[str, np.ndarray] = {}
    failed: dict[str, str] = {}
    for file in files:
        try:
            data, affine = images.read(file)
            clock.lap("read")
            rows[str(file)] = network.classify(data, affine)
            clock.lap("network")
        except (UserError, MemoryError) as error:
            failed[str(file)] = _line(error, file, alone=len(files) == 1)
    if not rows:
        raise UserError(next(iter(failed.values())))
    table.write(out, rows, classes)
    clock.lap("write")
    found = {
        path: {"label": classes[int(row.argmax())], "probabilities": dict(zip(classes, map(float, row), strict=True))} for path, row in rows.items()
    }
    return {"images": found, "failed": failed, "seconds": clock.seconds}


def _line(error: BaseException, file: Path, alone: bool) -> str:
    """An error as one line that names the file; where nothing else is to be done, it is raised."""
    line = str(error) if str(error).startswith(str(file)) else f"{file}: {first_line(error)}"
    if alone:
        raise UserError(line) from error
    return line


class _Clock:
    """Seconds of each part."""

    def __init__(self) -> None:
        self._sums = dict.fromkeys(("open", "read", "network", "write"), 0.0)
        self._since = time.perf_counter()

    def lap(self, what: str) -> None:
        now = time.perf_counter()
        self._sums[what] += now - self._since
        self._since = now

    @property
    def seconds(self) -> dict[str, float]:
        return {what: round(value, 3) for what, value in self._sums.items()}
