"""medssm view: a scan with label maps over it as one HTML page that needs no network, shown by NiiVue out of the package ipyniivue."""

from __future__ import annotations

import base64
import gzip
import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import nibabel as nib
import numpy as np
import torch

from medssm.errors import UserError, install_command
from medssm.files import protect, write_text
from medssm.options import Option
from medssm.segment import pages
from medssm.segment.data import load_classes
from medssm.segment.images import read_image, read_label, strip_ending
from medssm.segment.intensity import looks_like_ct

_GENERATOR = "medssm view"
_VOXELS = 384 * 384 * 256  # of a page: more would take a browser too much memory
_CLASS = re.compile(r"Creating new Niivue instance.{0,200}?new ([\w$]+)\(")  # NiiVue's class in the widget's script
_EXPORT = re.compile(r"export\s*\{[^{}]*\};?\s*$")


class NotInstalled(UserError):
    """NiiVue is not there."""


def view(
    scan: Path | str,
    *labels: Path | str,
    out: Annotated[Path | str, Option(short="-o")],
    classes: Mapping[str, int] | Path | str | None = None,
    modality: Literal["ct", "mri", "other"] | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write one HTML page that shows a scan with label maps over it: three slices and a rendering, offline.

    Args: Files
        scan: image file; of several channels the first is shown
        labels: label maps on the scan's grid, as a prediction and its reference; where there are two, their differences are shown too
        out: the .html file
        overwrite: write over a file of other origin
    Args: Shown
        classes: dataset.json or weights folder that names the classes, or {name: value} (default: every value in the files)
        modality: ct offers windows in Hounsfield units (default: by the values)

    Returns:
        {"page", "overlays": [names], "classes": {name: value}, "windows": {name: [black, white]}, "steps": every how many voxels one is shown}.

    Raises:
        UserError: a file cannot be read, a label map lies on another grid, or ipyniivue is missing.
    """
    protect(Path(out), reads=[Path(scan), *map(Path, labels)], made=lambda path: pages.is_made_by(_GENERATOR, path), overwrite=overwrite)
    content = contents(Path(scan), [Path(file) for file in labels], classes, modality)
    write_text(out, viewer(content))
    names = [volume["name"] for volume in content["shown"]["volumes"][1:]]
    return {"page": str(out), "overlays": names, **{key: content[key] for key in ("classes", "windows", "steps")}}


def show(result: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Print where the page is, and what of the scan it leaves out."""
    if max(result["steps"]) > 1:
        print(f"shown: every {' x '.join(map(str, result['steps']))} th voxel along the file's axes: the scan is too large for a page")
    print(f"written: {result['page']}")


def viewer(content: Mapping[str, Any]) -> str:
    """The page with what `contents` gives, as text."""
    return pages.page("view.html", _GENERATOR, **content)


def contents(
    scan: Path, labels: Sequence[Path], classes: Mapping[str, int] | Path | str | None = None, modality: str | None = None
) -> dict[str, Any]:
    """What a page shows; the arguments are those of `view`. Raises UserError as `view` does."""
    library, licence, version = _niivue()
    data, file = read_image([scan], nan=0.0)
    grey, affine = data[0], file.affine.copy()
    maps = [read_label(path, file)[0] for path in labels]
    table = _classes(classes, maps)
    steps = _steps(grey.shape, file.spacing)
    every = tuple(slice(None, None, step) for step in steps)
    affine[:3, :3] *= steps
    windows = _windows(grey, modality)
    first = next(iter(windows.values()))
    volumes = [{"name": scan.name, "data": _nifti(_integers(grey[every]), affine), "low": first[0], "high": first[1]}]
    drawn = [np.searchsorted(list(table.values()), values[every]).astype(np.uint16 if len(table) > 255 else np.uint8) for values in maps]
    for name, values in zip(_distinct(labels), drawn, strict=True):
        volumes.append({"name": name, "data": _nifti(values, affine), "opacity": 0.5, "labels": True})
    for other in drawn[1:]:
        differs = (drawn[0] != other).astype(np.uint8)
        volumes.append({"name": f"differences: {int(differs.sum()):,} voxels", "data": _nifti(differs, affine), "opacity": 0, "labels": False})
    colours = ["#000000", *(pages.COLOURS[i % len(pages.COLOURS)] for i in range(len(table) - 1))]
    cross = float((np.array(grey.shape) * file.spacing).max()) / 300
    at = _inside(nib.orientations.apply_orientation(drawn[0] if drawn else grey[every] * 0, nib.io_orientation(affine)))
    shown = {"volumes": volumes, "names": list(table), "colours": colours, "at": at, "cross": cross, "plane": 1 in grey.shape}
    return {
        "title": scan.name,
        "shown": shown,
        "classes": table,
        "windows": windows,
        "steps": list(steps),
        "library": library,
        "licence": licence,
        "version": version,
    }


def _niivue() -> tuple[str, str, str]:
    """NiiVue's script with the class as the global name NiiVue, its licence, and ipyniivue's version. The package's files are read, not imported."""
    spec = importlib.util.find_spec("ipyniivue")
    if spec is None or spec.origin is None:
        raise NotInstalled(f"needs the package ipyniivue: {install_command('view')}")
    distribution = importlib.metadata.distribution("ipyniivue")
    script = (Path(spec.origin).parent / "static" / "widget.js").read_text(encoding="utf-8")
    found, export = _CLASS.search(script), _EXPORT.search(script)
    if not found or not export:
        raise NotInstalled(f"ipyniivue {distribution.version}: no NiiVue found in its script; 2.4.4 has it")
    library = script[: export.start()] + f"globalThis.NiiVue={found[1]};"
    return library.replace("</script", "<\\/script"), distribution.read_text("licenses/LICENSE") or "BSD 2-Clause", distribution.version


def _classes(classes: Mapping[str, int] | Path | str | None, maps: Sequence[np.ndarray]) -> dict[str, int]:
    """{name: value} by value, background first, for every value in the label maps; those that `classes` does not name are called by their values.

    A region of several values names none of them.
    """
    named = {} if classes is None else dict(classes) if isinstance(classes, Mapping) else load_classes(Path(classes))[0]
    values = {name: (value,) if isinstance(value, int) else value for name, value in named.items()}
    names = {value[0]: name for name, value in values.items() if len(value) == 1}
    found = {int(value) for values in maps for value in np.unique(values)}
    return {names.get(value, "background" if value == 0 else str(value)): value for value in sorted({0, *found, *names})}


def _windows(grey: np.ndarray, modality: str | None) -> dict[str, tuple[float, float]]:
    """{name: (black, white)}, the one to begin with first."""
    ct = looks_like_ct(torch.from_numpy(grey)) if modality is None else modality == "ct"
    low, high = np.percentile(grey.reshape(-1)[:: max(1, grey.size // 2**20)], (0.5, 99.5)).tolist()
    own = {"99 % of the voxels": (low, max(high, low + 1e-6)), "all": (float(grey.min()), max(float(grey.max()), float(grey.min()) + 1e-6))}
    return {**pages.CT_WINDOWS, **own} if ct else own


def _steps(shape: Sequence[int], edges: np.ndarray) -> tuple[int, int, int]:
    """Every how many voxels along each axis one is shown, so that no more than _VOXELS are."""
    steps = np.ones(3, int)
    while np.prod(np.ceil(np.array(shape) / steps)) > _VOXELS:
        steps[np.argmin(np.where(np.array(shape) > 1, edges * steps, np.inf))] += 1
    x, y, z = steps.tolist()
    return x, y, z


def _inside(label: np.ndarray) -> list[int]:
    """A voxel of a class, in the row that has most of the slice that has most; the middle where there are none. NiiVue counts along the RAS axes."""
    inside = label > 0
    if not inside.any():
        return [size // 2 for size in label.shape]
    z = _most(inside.sum((0, 1)))
    y = _most(inside[:, :, z].sum(0))
    return [_most(inside[:, y, z]), y, z]


def _most(counts: np.ndarray) -> int:
    """The middle one of the places where there is most."""
    places = np.flatnonzero(counts == counts.max())
    return int(places[len(places) // 2])


def _integers(grey: np.ndarray) -> np.ndarray:
    """The intensities in the type that takes least space: whole numbers as int16 where they fit."""
    whole = np.rint(grey)
    return whole.astype(np.int16) if (whole == grey).all() and abs(grey).max() < 2**15 else grey


def _nifti(data: np.ndarray, affine: np.ndarray) -> str:
    """A NIfTI file with nothing but voxels and their places, compressed, in base64. Intensities that are no whole numbers are kept to 1/65536."""
    image = nib.Nifti1Image(data, affine)
    image.set_data_dtype(np.int16 if data.dtype.kind == "f" else data.dtype)
    image.header.set_xyzt_units("mm")
    return base64.b64encode(gzip.compress(image.to_bytes(), 6)).decode()


def _distinct(files: Sequence[Path]) -> list[str]:
    """The names of files, with their folders where two are equal."""
    names = [strip_ending(file) for file in files]
    return [f"{file.resolve().parent.name}/{name}" if names.count(name) > 1 else name for file, name in zip(files, names, strict=True)]
