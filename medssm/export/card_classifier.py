"""The model card of an exported classifier: as `card` has it of a network that segments, with classes, figures with intervals and the calibration.

It names no person, no image and no path: of the images it has their number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medssm.classify.calibration import CALIBRATION
from medssm.classify.figures import FIGURES
from medssm.classify.scores import SCORES
from medssm.export.card import described_file, finished_training, heading, licence, path_of, runtime
from medssm.files import read_json, write_text
from medssm.segment import networks
from medssm.segment.intensity import SCHEMES
from medssm.segment.runs import CASES

_LIMITS = """- It knows only images like those that it was trained on. Another scanner, stain, protocol, contrast, resolution, age or disease may
  give a wrong class with a large probability.
- It gives one of its classes to every image that has the right number of channels, also to one of something else.
- Probabilities follow how often each class occurred in the images that they were calibrated with. Where classes occur more or less
  often, they are wrong.
- Classes with few images are found less well than the mean over all says."""


def write(file: Path | str, run: Path | str, table: Mapping[str, Any], *, license: Path | str | None = None, use: str = "", needs: str = "") -> Path:
    """Write FILE.md, as net.onnx.md, beside an exported file, and return its path; arguments and errors as `card.write`."""
    path = path_of(file)
    write_text(path, card(Path(file), Path(run), table, license=license, use=use, needs=needs))
    return path


def card(file: Path, run: Path, table: Mapping[str, Any], *, license: Path | str | None = None, use: str = "", needs: str = "") -> str:
    """The text of the card, in Markdown; arguments as `write`."""
    classes, channels = ", ".join(table["classes"]), ", ".join(channel["name"] for channel in table["channels"])
    shape = " x ".join(map(str, table["shape"]))
    scaled = "; ".join(f"{channel['name']} {SCHEMES[channel['scheme']]}" for channel in table["channels"])
    at = f"resampled to {' x '.join(f'{edge:g}' for edge in table['spacing'])} mm, " if table["spacing"] else ""
    how = "resized" if table["sizes"] == "resize" else "padded and cropped about the middle"
    return f"""{heading(file)}
Says of a {table["spatial_dims"]}D image of {channels} which of these classes it is: {classes}. **Not a medical device.**

{described_file(file, table, f"whole images of {shape} voxels", needs)}

## Intended use
Research on {classes} in images like those that it was trained on. It is not a medical device: nobody has assessed or approved it for patients, and no
decision about a patient may rest on it. A person who knows such images looks at every one before its class is used.

## Input and output
Images are turned to RAS, {at}scaled ({scaled}) and {how} to {shape} voxels. The output is a logit for each class, in the order
{classes}, divided by the temperature; the softmax of it is the probabilities.
{use or runtime(file, "IMAGES FOUND.csv")}

## Training data
{_data(run, table["classes"])}

## Validation
{_validation(run, table)}

## Calibration
{_calibration(run, table)}

## Limits
{_LIMITS}

## Licence of the weights
{licence(license)}
"""


def _data(run: Path, classes: list[str]) -> str:
    if not (run / CASES).is_file():
        return "The folder of the training does not say."
    cases = read_json(run / CASES)
    lines = [f"{_counted(cases['training'], classes)} to train on; {_counted(cases['validation'], classes)} held out."]
    if not all("group" in case for part in cases.values() for case in part):
        lines.append("It is not known whether two of them are of one person.")
    return " ".join([*lines, "Where they come from, whom they show and how they were labelled is for the authors to add."])


def _counted(cases: list[dict[str, Any]], classes: list[str]) -> str:
    counts, groups = Counter(case["label"] for case in cases), {case["group"] for case in cases if "group" in case}
    each = f" ({', '.join(f'{name} {counts[name]}' for name in classes)})" if cases else ""
    return f"{len(cases)} image(s){f' of {len(groups)} group(s)' if groups else ''}{each}"


def _validation(run: Path, table: Mapping[str, Any]) -> str:
    """The figures that the folder has, with what they are of."""
    finished = finished_training(run)
    if not (run / SCORES).is_file() or not finished.get("validation"):
        return "Not measured: no image was held out, or the folder of the training does not say."
    figures = read_json(run / SCORES)["figures"]
    rows = "\n".join(f"| {name} | {_figure(figures[key])} |" for key, name in FIGURES.items())
    recall = "\n".join(f"| found of {name} | {value:.3f} |" for name, value in finished["validation"].items() if name != "mean")
    more = len(table["compression"]) > len(read_json(run / networks.CONFIG).get("compression", []))
    before = ", before its numbers became 8-bit integers" if more else ""
    images, groups = finished["validation_images"], finished["validation_groups"]
    return f"""On the {images} held-out image(s) of {groups} group(s), by the network in PyTorch{before}.
In brackets 95 % intervals over the groups, where there are five or more. These are no figures of other data.

| | |
|---|---|
{rows}
{recall}"""


def _figure(values: Mapping[str, float | None]) -> str:
    if values["value"] is None:
        return "-"
    return f"{values['value']:.3f}" + ("" if values["low"] is None else f" [{values['low']:.3f}, {values['high']:.3f}]")


def _calibration(run: Path, table: Mapping[str, Any]) -> str:
    if table["temperature"] is None:
        return "None: no image was held out for it, so the probabilities need not be as large as the share of images that are right."
    found = read_json(run / CALIBRATION)
    images, groups = found["images"], found["groups"]
    return f"""The temperature {table["temperature"]:.4g} was fitted to {images} held-out image(s) of {groups} group(s).
The ECE and NLL above are of temperatures that were fitted to the other half of these images."""
