"""medssm plan: spacing, patch, batch, strides and kernels for a data set and a machine, as a file that `medssm train --config` takes.

The rules are nnU-Net's (Isensee et al., Nature Methods 2021, supplementary note 2), but for the patch: it is the largest one whose training step was
really run and stayed within the memory. `--from` takes all of it from nnU-Net's own plans.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import nibabel as nib
import numpy as np
import torch

from medssm import machine
from medssm.errors import UserError
from medssm.files import begins_with, protect, read_json, write_text
from medssm.models import list_models
from medssm.models.facts import Plan
from medssm.models.plans import inherited, options_from_plan, read_plan
from medssm.models.registry import model_options
from medssm.options import Option, as_yaml
from medssm.segment import networks
from medssm.segment.cases import Case
from medssm.segment.data import Dataset, load_dataset, read_for
from medssm.segment.fit import check_units, fit_slice_axis, resampled_shapes, shrinking_patches
from medssm.segment.images import open_image
from medssm.segment.preprocess import Fitted
from medssm.segment.probe import step_memory
from medssm.segment.progress import progress
from medssm.segment.stages import patch_multiples, strides_and_kernels, supervised
from medssm.segment.train import criterion_for, fabric_for

_MADE = "# medssm plan"  # the first words of the file
_ANISOTROPIC = 3.0  # a coarse axis: its spacing is so many times the others'
_STAGES = 8  # more than any network has
_SHARE = 0.05  # of the data set's voxels that a step sees at most, where it has more than the smallest batch
_LARGEST_BATCH = 64
_MULTIPLE = 32  # of a patch's edges, for a network that does not tell its strides
_BATCH = {2: 12, 3: 2}
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def plan(
    dataset: Path | str,
    *,
    out: Annotated[Path | str, Option(short="-o")],
    memory: str | None = None,
    plans: Annotated[Path | str | None, Option(flag="--from")] = None,
    model: str = "medssm_unet",
    model_kwargs: Mapping[str, Any] | None = None,
    size: str | None = None,
    mixer: str | None = None,
    spatial_dims: Literal[2, 3] = 3,
    device: str = "auto",
    precision: str = "auto",
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Choose spacing, patch, batch, strides and kernels for a data set and this machine, and write them for `medssm train --config`.

    Args: Files
        dataset: folder with dataset.json (nnU-Net), or a MONAI datalist's JSON file
        out: the .yaml file
        plans: nnU-Net's plans: its 3d_fullres configuration (2d with `spatial_dims` 2) in place of rules and measurements
        overwrite: write over a file of other origin
    Args: Network
        model: one of `medssm models`, or one of MONAI's as monai.networks.nets.NAME
        model_kwargs: more keywords for the model's constructor, which win over the plan's
        size: the model's size, where it has several, as tiny, small or base (default: small for medssm_unet)
        mixer: the mixer of a model that has several
        spatial_dims: 2 plans for slices
    Args: Machine
        memory: that a training step may take at its peak, as 8GB or 8GiB, of the GPU's or for a CPU of the machine's (default: nine tenths of
            what is free)
        device: auto, cpu, cuda, cuda:1 or mps
        precision: Lightning's, as for `medssm train`

    Returns:
        {"plan", "options": {option of train: value}, "reasons": {option: why}, "steps": [{"patch", "batch", "bytes", "seconds"}]}; the steps were
        measured.

    Raises:
        UserError: the data set cannot be read, the smallest patch does not fit, or the plans are not nnU-Net's.
    """
    out = Path(out)
    if plans is not None and memory is not None:
        raise UserError("memory: --from takes the patch from nnU-Net's plans, and nothing is measured: name one of the two")
    table = load_dataset(dataset)
    protect(out, reads=[*read_for(dataset, table), *([Path(plans)] if plans else [])], made=_is_plan, overwrite=overwrite)
    check_units(table.cases)
    named = {name: value for name, value in (("size", size), ("mixer", mixer)) if value is not None}
    if model == "medssm_unet" and "features" not in (model_kwargs or {}):
        named.setdefault("size", "small")
    given = {**(model_kwargs or {}), **named}
    steps: list[dict[str, Any]] = []
    if plans is None:
        options, reasons = _ruled(table, model, given, spatial_dims, _bytes(memory), device, precision, steps, quiet)
    else:
        options, reasons = _taken(table, Path(plans), model, given, spatial_dims)
    if model_kwargs:
        options["model_kwargs"] = {**options.get("model_kwargs", {}), **model_kwargs}
    options = {"model": model, **named, "spatial_dims": spatial_dims, **options}
    reasons = {**dict.fromkeys(options, "as asked"), **({} if size or "size" not in options else {"size": "the default"}), **reasons}
    heading = f"{_MADE} {Path(dataset).resolve()}\n# medssm train DATASET OUT --config THIS_FILE trains with it\n"
    write_text(out, heading + as_yaml(options, reasons))
    return {"plan": str(out), "options": options, "reasons": reasons, "steps": steps}


def show(result: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Print the plan and where it is."""
    print(Path(result["plan"]).read_text(), end="")
    print(f"written: {result['plan']}")


def planned_spacing(edges: np.ndarray) -> tuple[tuple[float, ...], str]:
    """(spacing along the RAS axes, why) from the cases' spacings (cases, 3): the median; along an axis coarser than three times the others the 10th
    percentile, but no less than theirs."""
    spacing = np.median(edges, axis=0)
    coarse = int(spacing.argmax())
    others = np.delete(spacing, coarse).max()
    reason = f"the median of {len(edges)} case(s)"
    if spacing[coarse] > _ANISOTROPIC * others:
        spacing[coarse] = max(np.percentile(edges[:, coarse], 10), others)
        reason += f"; along {('left-right', 'front-back', 'up-down')[coarse]}, more than {_ANISOTROPIC:g} times as coarse, the 10th percentile"
    return tuple(float(f"{edge:.6g}") for edge in spacing), reason


def largest(sizes: Sequence[Any], voxels: Callable[[Any], float], measure: Callable[[Any], int | None], memory: float, probes: int = 8) -> Any:
    """The last of growing `sizes` whose step fits in `memory`, None if the first one does not.

    Args:
        sizes: patches or batches, growing
        voxels: of one of them, which its memory grows with
        measure: gives the bytes of a step, None where there were not enough
        memory: bytes
        probes: how many are measured at most
    """
    first = measure(sizes[0])
    if first is None or first > memory:
        return None
    fits, fails, known = 0, len(sizes), [(voxels(sizes[0]), first)]
    for _ in range(probes - 1):
        if fails - fits == 1:
            break
        if fails < len(sizes):
            guess = (fits + fails) // 2
        else:  # along a line through two measurements, and never far beyond the last one
            (v0, b0), (v1, b1) = (known[0], known[-1]) if len(known) > 1 else ((0.0, 0.0), known[0])
            allowed = min(v1 + 0.98 * (memory - b1) * (v1 - v0) / max(b1 - b0, 1), 6 * v1)
            guess = max(fits + 1, *(i for i in range(len(sizes)) if voxels(sizes[i]) <= allowed))
        found = measure(sizes[guess])
        if found is None or found > memory:
            fails = guess
        else:
            fits = guess
            known.append((voxels(sizes[guess]), found))
    return sizes[fits]


def _ruled(
    table: Dataset,
    model: str,
    given: Mapping[str, Any],
    spatial_dims: int,
    asked: float | None,
    device: str,
    precision: str,
    steps: list[dict[str, Any]],
    quiet: bool,
) -> tuple[dict[str, Any], dict[str, str]]:
    """(train's options, why) by the rules and by measuring, which fills `steps`."""
    fabric = fabric_for(device, 1, "auto", precision)
    cases = table.cases
    edges = np.array([case.ras[0] for case in cases])
    spacing, reason = planned_spacing(edges)
    axes = [axis for axis in range(3) if spatial_dims == 3 or axis != fit_slice_axis(cases)]
    shapes = resampled_shapes(cases, spacing)
    median = np.median(shapes, axis=0)
    free = 0.9 * (torch.cuda.mem_get_info(fabric.device)[0] if fabric.device.type == "cuda" else machine.free_memory())
    memory = free if asked is None or (asked > free and fabric.device.type == "cpu") else asked

    near, size = [spacing[axis] for axis in axes], [median[axis] for axis in axes]
    stages = _stages(model, given, spatial_dims)
    multiples = [_MULTIPLE] * spatial_dims if stages is None else patch_multiples(size, near, stages)
    patches = list(shrinking_patches(size, near, multiples))[::-1]
    fitted = Fitted(table.channels, spacing, (), table.classes, table.ignore, tuple(patches[0]), regions=table.regions)
    criterion = criterion_for(fitted)
    sizes = {"spatial_dims": spatial_dims, "in_channels": len(table.channels), "out_channels": len(fitted.outputs)}
    heads = supervised(model, given)

    def options_of(patch: Sequence[int]) -> dict[str, Any]:
        strides, kernels = strides_and_kernels(patch, near, _STAGES)
        return _network_options(model, given, Plan(list(patch), 2, _features(_STAGES), strides, kernels, [2] * _STAGES, [2] * (_STAGES - 1)))

    with progress("measuring", quiet) as show:

        def measure(patch: Sequence[int], batch: int) -> int | None:
            show(0.0, f"patch {' x '.join(map(str, patch))}, batch {batch}")
            shape, kwargs = (batch, len(table.channels), *patch), {**sizes, **heads, **given, **options_of(patch)}
            found, seconds = step_memory(lambda: networks.build(model, **kwargs), criterion, fabric, shape, len(table.classes))
            steps.append({"patch": list(patch), "batch": batch, "bytes": found, "seconds": round(seconds, 2)})
            return found

        measure(patches[0], 1)
        steps.clear()  # the first step of a process takes memory that no other one does
        batch = _BATCH[spatial_dims]
        patch = largest(patches, math.prod, lambda patch: measure(patch, batch), memory)
        if patch is None:
            took = steps[-1]["bytes"]
            raise UserError(
                f"memory: a step with {batch} patches of {' x '.join(map(str, patches[0]))} voxels takes "
                f"{_gigabytes(took) if took else 'more than there is'}, expected at most {_gigabytes(memory)}"
            )
        voxels = float(shapes.prod(1, dtype=float).sum())
        most = min(_LARGEST_BATCH, max(batch, int(_SHARE * voxels / math.prod(patch))))
        if tuple(patch) == tuple(patches[-1]) and most > batch:
            batch = largest(range(batch, most + 1), float, lambda batch: measure(patch, batch), memory) or batch
    took = next(step for step in reversed(steps) if (step["patch"], step["batch"]) == (list(patch), batch))
    less = f" ({_gigabytes(asked)} are not free)" if asked is not None and asked > memory else ""
    all_of_it = ", the whole of a median case" if tuple(patch) == tuple(patches[-1]) else ""
    why = f"a step takes {_gigabytes(took['bytes'])} of {_gigabytes(memory)}{less} on {fabric.device} and {took['seconds']:.3g} s{all_of_it}"
    reasons = {
        "spacing": f"{reason}; mm along the RAS axes",
        "patch": f"the largest that fits: {why}",
        "batch": f"{'as many as fit' if batch > _BATCH[spatial_dims] else 'the smallest that trains well'}; at most {_SHARE:.0%} of the voxels",
        "model_kwargs": "stride 2 and kernel 3 where voxels are less than twice as long as the shortest",
    }
    return _named(spacing, patch, batch, options_of(patch), reasons)


def _taken(table: Dataset, file: Path, model: str, given: Mapping[str, Any], spatial_dims: int) -> tuple[dict[str, Any], dict[str, str]]:
    """(train's options, why) from nnU-Net's plans."""
    content = read_json(file)
    name = "3d_fullres" if spatial_dims == 3 else "2d"
    known = content.get("configurations") if isinstance(content, dict) else None
    if not isinstance(known, dict) or name not in known:
        raise UserError(f"{file}: expected nnU-Net's plans with the configuration {name}, got {', '.join(known or ()) or 'none'}")
    entry = inherited(known, name)
    theirs = read_plan(f"{file}: {name}", entry)
    spacing = [float(edge) for edge in entry.get("spacing", ())]
    if len(theirs.patch) != spatial_dims or len(spacing) not in (spatial_dims, 3):
        raise UserError(f"{file}: {name}: expected a patch and a spacing with {spatial_dims} entries, got {theirs.patch} and {spacing}")
    places = _ras_axes(table.cases, content.get("transpose_forward") or (0, 1, 2))
    if spatial_dims == 2:
        if places[0] != fit_slice_axis(table.cases):
            raise UserError(f"{file}: {name}: nnU-Net cuts slices across another axis than medssm train does")
        edges = np.median([case.ras[0] for case in table.cases], axis=0)
        spacing = [float(edges[places[0]]), *spacing[-2:]]
    own = np.argsort(places[-spatial_dims:])  # from nnU-Net's axes to ours

    def turned(values: Sequence[Any]) -> list[Any]:
        return [values[i] for i in own]

    ours = theirs._replace(patch=turned(theirs.patch), strides=[turned(s) for s in theirs.strides], kernels=[turned(k) for k in theirs.kernels])
    missing = _STAGES - len(ours.features)  # of networks with more stages: they halve nothing more
    longer = ours._replace(
        features=ours.features + ours.features[-1:] * missing,
        strides=ours.strides + [[1] * spatial_dims] * missing,
        kernels=ours.kernels + ours.kernels[-1:] * missing,
        blocks=ours.blocks + ours.blocks[-1:] * missing,
        decoder_blocks=ours.decoder_blocks + ours.decoder_blocks[-1:] * missing,
    )
    options = _network_options(model, given, longer, len(ours.features))
    source = f"{file.name}: {name}, axes turned to RAS"
    edges_in_ras = [spacing[i] for i in np.argsort(places)]
    return _named(edges_in_ras, ours.patch, ours.batch, options, dict.fromkeys(("spacing", "patch", "batch", "model_kwargs"), source))


def _named(
    spacing: Sequence[float], patch: Sequence[int], batch: int, options: Mapping[str, Any], reasons: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    found: dict[str, Any] = {"spacing": list(spacing), "patch": list(patch), "batch": batch}
    if options:
        found["model_kwargs"] = dict(options)
    return found, {name: reasons[name] for name in found}


def _network_options(model: str, given: Mapping[str, Any], plan: Plan, stages: int | None = None) -> dict[str, Any]:
    """The keywords of a network that follow from a plan of _STAGES stages.

    A network that has no number of its own gets `stages`, by default as many as halve an axis.
    """
    if model not in list_models():
        return {}
    if not {"features", "size"} & given.keys() & set(model_options(model)):
        stages = stages or max(i for i, step in enumerate(plan.strides) if i == 0 or max(step) > 1) + 1
        plan = plan.first(stages)
    try:
        return options_from_plan(model, plan, given)
    except (TypeError, ValueError) as error:
        raise UserError(f"model: {model} with {dict(given)}: {error}") from error


def _stages(model: str, given: Mapping[str, Any], dims: int) -> int | None:
    """The number of a network's maps; None where the model does not tell."""
    n = _STAGES
    longest = Plan([64] * dims, 2, _features(n), [[1] * dims] + [[2] * dims] * (n - 1), [[3] * dims] * n, [2] * n, [2] * (n - 1))
    strides = _network_options(model, given, longest, 6).get("strides")
    return None if strides is None else len(strides)


def _features(stages: int) -> list[int]:
    """Channels per stage as nnU-Net plans them."""
    return [min(32 * 2**stage, 320) for stage in range(stages)]


def _ras_axes(cases: Sequence[Case], transposed: Sequence[int]) -> list[int]:
    """For each axis of nnU-Net's arrays the RAS axis that it runs along: its readers give (z, y, x), `transposed` changes their order."""
    found = Counter(tuple(nib.io_orientation(open_image(case.images[0]).affine)[:, 0].astype(int).tolist()) for case in cases)
    order = found.most_common(1)[0][0]
    return [order[2 - axis] for axis in transposed]


def _bytes(text: str | None) -> float | None:
    """A size such as 8GB in bytes."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if not match or match[2] not in _UNITS or float(match[1]) == 0:
        raise UserError(f"memory: expected a size as in 8GB or 500MB, got {text!r}")
    return float(match[1]) * _UNITS[match[2]]


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def _is_plan(path: Path) -> bool:
    return begins_with(path, _MADE)
