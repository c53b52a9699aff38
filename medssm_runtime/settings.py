"""What an exported file says of itself: the JSON text that `medssm.export.metadata` writes, checked once when it is read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medssm_runtime.errors import UserError

KEY = "medssm"  # in metadata_props of an ONNX file, in rt_info of an OpenVINO file
SCHEMA = 1
_SCHEMES = ("ct", "none", "picture", "zscore")
_STEPS = ("fill_holes", "largest_component", "smallest_ml")


@dataclass(frozen=True)
class Settings:
    """All axes are RAS.

    channels        for each {"name", "scheme"} and, where the scheme is ct or picture, {"low", "high", "mean", "deviation"}
    classes         {name: value in the label map}, background first
    regions         {name: its values}, each an output with a sigmoid; empty where the outputs are the classes, with a softmax
    written         the value that is written for each region, later ones over earlier ones
    spacing         millimetres along x, y and z; 0 keeps an axis as it is
    patch           voxels, an entry for each of the network's axes
    slice_axis      the axis across a 2D network's slices, None in 3D
    overlap         of neighbouring windows
    average         whether predictions of mirrored windows are averaged
    axes            the axes that are mirrored then
    sides           pairs of classes, by position, that change places when left and right are mirrored
    postprocessing  {class or region: {step: True, or its millilitres}}
    custom_ops      {"domain", "version"} of operators that the engine lacks; None where it has all
    """

    model: str
    channels: tuple[dict[str, Any], ...]
    classes: dict[str, int]
    regions: dict[str, tuple[int, ...]]
    written: tuple[int, ...]
    spacing: tuple[float, ...]
    patch: tuple[int, ...]
    slice_axis: int | None
    overlap: float
    average: bool
    axes: tuple[int, ...]
    sides: tuple[tuple[int, int], ...]
    postprocessing: dict[str, dict[str, float]]
    custom_ops: dict[str, Any] | None

    @property
    def outputs(self) -> int:
        """The number of the network's output channels."""
        return len(self.regions or self.classes)

    @property
    def volume_patch(self) -> tuple[int, ...]:
        """The patch in the volume: (x, y, z), one slice thick for a 2D network."""
        return self.patch if self.slice_axis is None else (*self.patch[: self.slice_axis], 1, *self.patch[self.slice_axis :])

    @property
    def mirrored_outputs(self) -> list[int]:
        """For each output the one that it becomes when left and right are mirrored."""
        found = list(range(self.outputs))
        for left, right in self.sides:
            found[left], found[right] = right, left
        return found

    @property
    def structures(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """{name: (its values in the label map, the value that is written for it)} of all that is segmented."""
        if self.regions:
            return {name: (values, written) for (name, values), written in zip(self.regions.items(), self.written, strict=True)}
        return {name: ((value,), value) for name, value in self.classes.items() if value}


@dataclass(frozen=True)
class ClassSettings:
    """Of a classifier. All axes are RAS.

    channels     as `Settings` has them
    classes      their names, in the order of the outputs
    shape        voxels that every image is brought to, an entry for each of the network's axes
    sizes        how: "resize", or "pad" (padded and cropped about the middle)
    spacing      millimetres along x, y and z that an image is resampled to before; None leaves its own
    temperature  that the network divides its logits by; None where none was fitted, so that the probabilities are not calibrated
    custom_ops   as `Settings` has it
    """

    model: str
    channels: tuple[dict[str, Any], ...]
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    sizes: str
    spacing: tuple[float, ...] | None
    temperature: float | None
    custom_ops: dict[str, Any] | None


def parse(text: str | None, path: Path) -> Settings | ClassSettings:
    """The settings in the file `path`. Raises UserError where it carries none, those of another schema, or damaged ones."""
    if not text:
        raise UserError(f"{path}: nothing in it says how a scan is prepared: expected a file of medssm export")
    try:
        table = json.loads(text)
        schema = table["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: its metadata {KEY!r} are damaged: expected a JSON object with the entry schema") from error
    if schema != SCHEMA:
        raise UserError(f"{path}: its metadata have the schema {schema}, this medssm_runtime reads {SCHEMA}: install the version of the export")
    try:
        return _READERS[table.get("task", "segment")](table)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # a task that is not known here too
        what = f"no entry {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path}: its metadata {KEY!r} are damaged: {what}") from error


def _checked(table: dict[str, Any]) -> Settings:
    regions, mirror = table["regions"] or {"values": {}, "written": []}, table["mirror"]
    found = Settings(
        model=str(table["model"]),
        channels=tuple(dict(channel) for channel in table["channels"]),
        classes={str(name): int(value) for name, value in table["classes"].items()},
        regions={str(name): tuple(map(int, values)) for name, values in regions["values"].items()},
        written=tuple(map(int, regions["written"])),
        spacing=tuple(map(float, table["spacing"])),
        patch=tuple(map(int, table["patch"])),
        slice_axis=None if table["slice_axis"] is None else int(table["slice_axis"]),
        overlap=float(table["overlap"]),
        average=bool(mirror["average"]),
        axes=tuple(map(int, mirror["axes"])),
        sides=tuple((int(left), int(right)) for left, right in mirror["sides"]),
        postprocessing={str(name): dict(steps) for name, steps in table["postprocessing"].items()},
        custom_ops=None if table["custom_ops"] is None else dict(table["custom_ops"]),
    )
    checks = {
        "channels": _are_channels(found.channels),
        "classes": len(found.classes) > 1 and len({*found.classes.values()}) == len(found.classes),
        "regions": len(found.written) == len(found.regions) and {0, *found.written} <= {*found.classes.values()},
        "spacing": len(found.spacing) == 3 and all(0 <= edge < math.inf for edge in found.spacing),
        "patch": len(found.patch) == table["spatial_dims"] and min(found.patch) > 0,
        "slice_axis": (found.slice_axis in (0, 1, 2)) if table["spatial_dims"] == 2 else (table["spatial_dims"] == 3 and found.slice_axis is None),
        "overlap": 0 <= found.overlap < 1,
        "mirror": {*found.axes} <= {0, 1, 2} and all(0 <= side < found.outputs for pair in found.sides for side in pair),
        "postprocessing": found.postprocessing.keys() <= found.structures.keys()
        and all(step in _STEPS for steps in found.postprocessing.values() for step in steps),
    }
    _check(table, checks)
    return found


def _checked_classifier(table: dict[str, Any]) -> ClassSettings:
    spacing, temperature = table["spacing"], table["temperature"]
    found = ClassSettings(
        model=str(table["model"]),
        channels=tuple(dict(channel) for channel in table["channels"]),
        classes=tuple(map(str, table["classes"])),
        shape=tuple(map(int, table["shape"])),
        sizes=str(table["sizes"]),
        spacing=None if spacing is None else tuple(map(float, spacing)),
        temperature=None if temperature is None else float(temperature),
        custom_ops=None if table["custom_ops"] is None else dict(table["custom_ops"]),
    )
    checks = {
        "channels": _are_channels(found.channels),
        "classes": len(found.classes) > 1 and len({*found.classes}) == len(found.classes),
        "shape": len(found.shape) == table["spatial_dims"] in (2, 3) and min(found.shape) > 0,
        "sizes": found.sizes in ("resize", "pad"),
        "spacing": found.spacing is None or (len(found.spacing) == 3 and all(0 < edge < math.inf for edge in found.spacing)),
        "temperature": found.temperature is None or 0 < found.temperature < math.inf,
    }
    _check(table, checks)
    return found


def _are_channels(channels: tuple[dict[str, Any], ...]) -> bool:
    numbers = [channel[key] for channel in channels if channel["scheme"] in ("ct", "picture") for key in ("low", "high", "mean", "deviation")]
    return bool(channels) and all(channel["scheme"] in _SCHEMES for channel in channels) and all(map(math.isfinite, numbers))


def _check(table: dict[str, Any], checks: dict[str, bool]) -> None:
    for entry, right in checks.items():
        if not right:
            raise ValueError(f"{entry}: unexpected {table[entry]!r}")


_READERS: dict[str, Callable[[dict[str, Any]], Settings | ClassSettings]] = {"segment": _checked, "classify": _checked_classifier}
