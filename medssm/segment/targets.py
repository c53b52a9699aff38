"""Where the label maps of `medssm predict` go, and in which format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medssm.errors import UserError
from medssm.segment.cases import Case
from medssm.segment.images import OUTPUTS, ending_of, output_ending

_OTHER_FORMATS = {".hdr", ".img", ".mgz", ".npy", ".npz", ".gz", ".zst", ".zip", ".bmp", ".gif", ".h5"}  # as the name of a folder a mistake


def targets(cases: Sequence[Case], out: Path, format: str | None = None) -> dict[str, Path]:
    """{name of a case: file of its label map}.

    Args:
        cases: what is predicted
        out: a file for one case, whose ending says the format; else a folder
        format: a key of OUTPUTS for the files of a folder; None takes that of each image

    Raises:
        UserError: `out` is a file where a folder is needed, has an ending that says no format that is written, or is the folder of a DICOM series.
    """
    if ending_of(out) and not out.is_dir():
        if len(cases) != 1:
            raise UserError(f"out: expected a folder for {len(cases)} case(s), got the file {out}")
        if format and ending_of(out).lower() != OUTPUTS[format]:
            raise UserError(f"format: expected a name that ends in {OUTPUTS[format]}, got {out}")
        return {cases[0].name: out}
    if out.is_file() or (out.suffix.lower() in _OTHER_FORMATS and not out.is_dir()):
        raise UserError(f"out: expected a file that ends in {', '.join(OUTPUTS.values())}, or a folder, got {out}")
    for case in cases:
        if out.exists() and case.images[0].is_dir() and out.samefile(case.images[0]):
            raise UserError(f"out: {out} is the folder of a DICOM series, which is read: name another one")
    return {case.name: out / f"{case.name}{output_ending(case.images[0], format)}" for case in cases}


def has_label_map(folder: Path, name: str) -> bool:
    """Whether a folder holds the label map of a case, in any format."""
    return any((folder / f"{name}{ending}").is_file() for ending in OUTPUTS.values())
