"""The model card of an exported file: what it is, what it was trained on, how well it did there, what it is for and what it is not for.

It names no person, no case and no path: of the cases it has their number.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from medssm.errors import UserError
from medssm.export.metadata import sha256
from medssm.files import read_json, read_json_lines, write_text
from medssm.segment.intensity import SCHEMES
from medssm.segment.loop import LOG
from medssm.segment.networks import BEST
from medssm.segment.postprocess import described
from medssm.segment.runs import CASES

_NO_LICENCE = "No licence was stated for these weights. Ask their authors before you use or share them."
_STEPS = {"prune": "channels or states removed", "factorize": "layers of low rank", "fold": "batch norms folded", "int8": "8-bit integers"}
_LIMITS = """- It knows only images like those that it was trained on. Another scanner, protocol, contrast, resolution, age or disease may give wrong
  labels, without a sign of it in the label map.
- It does not say when it is unsure, and it labels every image that has the right number of channels, also one of another part of the body.
- Other engines, processors and number types give other labels in voxels whose two most probable classes are nearly equal.
- Small and rare structures are found less well than the mean Dice says."""


def write(file: Path | str, run: Path | str, table: Mapping[str, Any], *, license: Path | str | None = None, use: str = "", needs: str = "") -> Path:
    """Write FILE.md, as net.onnx.md, beside an exported file, and return its path.

    Args:
        file: the exported file; of OpenVINO the .xml, beside its .bin
        run: folder written by medssm train or medssm compress, which was exported
        table: what `metadata` gave for it
        license: text file, the weights' licence; without it the card says that none was stated
        use: a sentence that says how the file is used (default: with medssm_runtime)
        needs: what the file needs (default: an inference engine, with medssm's operators where `table` says so)

    Raises:
        UserError: what cannot be read or written.
    """
    path = path_of(file)
    write_text(path, card(Path(file), Path(run), table, license=license, use=use, needs=needs))
    return path


def card(file: Path, run: Path, table: Mapping[str, Any], *, license: Path | str | None = None, use: str = "", needs: str = "") -> str:
    """The text of the card, in Markdown; arguments as `write`."""
    structures = ", ".join(table["regions"]["values"] if table["regions"] else [name for name, value in table["classes"].items() if value])
    channels = ", ".join(channel["name"] for channel in table["channels"])
    scaled = "; ".join(f"{channel['name']} {SCHEMES[channel['scheme']]}" for channel in table["channels"])
    spacing = " x ".join(f"{edge:.3g}" if edge else "the image's own" for edge in table["spacing"])
    values = ", ".join(f"{value} {name}" for name, value in table["classes"].items())
    return f"""{heading(file)}
Segments {structures} in {len(table["spacing"]) if table["spatial_dims"] == 3 else "slices of 3"}D images of {channels}. **Not a medical device.**

{described_file(file, table, f"windows of {' x '.join(map(str, table['patch']))} voxels", needs)}

## Intended use
Research on {structures} in images of {channels} like those that it was trained on. It is not a medical device: nobody has assessed or approved it
for patients, and no decision about a patient may rest on it. A person who knows the anatomy looks at every label map before it is used.

## Input and output
Images are turned to RAS, resampled to {spacing} mm and scaled: {scaled}. Labels: {values}. Post-processing: {described(table["postprocessing"])}.
{use or runtime(file, "SCAN LABELS")}

## Training data
{_data(run)}

## Validation
{_validation(run, table)}

## Limits
{_LIMITS}

## Licence of the weights
{licence(license)}
"""


def path_of(file: Path | str) -> Path:
    """Where the card of an exported file is: beside it, and not that of another file of the same stem."""
    return Path(file).with_name(f"{Path(file).name}.md")


def heading(file: Path) -> str:
    """The first line of the card of an exported file."""
    return f"# {file.name}\n"


def runtime(file: Path, words: str) -> str:
    """How a file for `medssm_runtime` is used."""
    return f"`python -m medssm_runtime {file.name} {words}` does all of this, and the metadata in the file say it to other programs."


def described_file(file: Path, table: Mapping[str, Any], sees: str, needs: str = "") -> str:
    """Two tables: the files with their hashes, and what network is in them. sees: what the network takes at a time; needs: as for `write`."""
    files = "\n".join(f"| {part.name} | {part.stat().st_size / 2**20:.1f} MiB | {sha256(part)} |" for part in parts(file))
    ops = table["custom_ops"]
    needs = needs or (f"the operators {ops['domain']}, version {ops['version']}, of medssm" if ops else "an inference engine, no operators of medssm")
    compressed = ", ".join(_STEPS.get(kind, kind) for kind in table["compression"]) or "no"
    return f"""| file | size | SHA-256 |
|---|---|---|
{files}

| | |
|---|---|
| network | {table["model"]}, {table["spatial_dims"]}D, {sees} |
| compressed | {compressed} |
| weights | {table["weights"]["file"]}, SHA-256 {table["weights"]["sha256"]} |
| needs | {needs} |
| written by | medssm {table["medssm"]}, torch {torch.__version__.partition("+")[0]} |"""


def parts(file: Path) -> list[Path]:
    """The file, and what belongs to it: OpenVINO's weights, ONNX's external data."""
    beside = [file.with_suffix(".bin")] if file.suffix == ".xml" else [file.with_name(f"{file.name}.data")]
    return [file, *(part for part in beside if part.is_file())]


def _data(run: Path) -> str:
    if not (run / CASES).is_file():
        return "The folder of the training does not say."
    cases = read_json(run / CASES)
    lines = [f"{_counted(cases['training'])} to train on, {_counted(cases['validation'])} held out."]
    if not all("patient" in case for part in cases.values() for case in part):
        lines.append("It is not known whether two of them are of one person.")
    return " ".join([*lines, "Where they come from, whom they show and how they were labelled is for the authors to add."])


def _counted(cases: list[dict[str, Any]]) -> str:
    patients = {case["patient"] for case in cases if case.get("patient") is not None}
    return f"{len(cases)} case(s){f' of {len(patients)} patient(s)' if patients else ''}"


def _validation(run: Path, table: Mapping[str, Any]) -> str:
    """The Dice that the folder of the training has, with what it is."""
    finished = finished_training(run)
    dice = finished.get("validation")
    if not dice:
        return "Not measured: no case was held out, or the folder of the training does not say."
    held_out = f"the {finished['validation_cases']} held-out case(s)"
    network = f"the network in PyTorch{', before its weights became 8-bit integers,' if 'int8' in table['compression'] else ''}"
    if table["weights"]["file"] == BEST:
        best = finished["best"]
        return f"""Mean Dice {best["mean"]:.3f} on {held_out}, by {network} after step {best["step"]:,}. That step was chosen because it was the
best one on these cases, so the figure is too high. It is no figure of other data."""
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in dice.items())
    return f"""Mean Dice on {held_out}, by {network} at the end of its training, before post-processing, which was chosen on the same
cases. These are no figures of other data.

| | Dice |
|---|---|
{rows}"""


def finished_training(run: Path) -> dict[str, Any]:
    """What the training of a folder returned; nothing where its log does not say."""
    ends = [line["finished"] for line in read_json_lines(run / LOG) if "finished" in line] if (run / LOG).is_file() else []
    return ends[-1] if ends else {}


def licence(path: Path | str | None) -> str:
    """The text of a licence. Raises UserError where it cannot be read."""
    if path is None:
        return _NO_LICENCE
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"license: {path}: not a readable text file ({error})") from error
