"""medssm predict: segment images with trained weights; the label map comes back on the input's own grid.

Each image is read as in training (its orientation, spacing and intensities are in fitted.json), segmented by a sliding window, and the
probabilities are resampled back before the largest is taken. Several weight folders, the folds of one training, are averaged.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from medssm import machine
from medssm.compress.fold import fold as fold_norms
from medssm.errors import UserError
from medssm.files import first_line, protect
from medssm.options import Option
from medssm.parallel import RankError
from medssm.scratch import Scratch, Store, slabs
from medssm.segment import networks, postprocess
from medssm.segment import ranks as over_ranks
from medssm.segment.cases import Case
from medssm.segment.data import FITTED
from medssm.segment.explain.case import Explainer, summary
from medssm.segment.explain.sight import Run
from medssm.segment.images import (
    Image,
    check_nan,
    check_output,
    far_apart,
    files_of,
    is_made_here,
    lengths,
    nifti,
    open_channels,
    open_image,
    ras_grid,
    read_label,
    write_image,
)
from medssm.segment.inference import OVERLAP, Pace, stored_probabilities
from medssm.segment.inputs import cases_of
from medssm.segment.preprocess import Fitted
from medssm.segment.progress import progress
from medssm.segment.regions import decided, structures
from medssm.segment.resample import on_spacing, ras, resampled
from medssm.segment.stored import OnFile, read_stored
from medssm.segment.stream import check_streamed, streamed_probabilities
from medssm.segment.targets import has_label_map
from medssm.segment.targets import targets as targets_of
from medssm.segment.uncertainty.ensemble import Ensemble
from medssm.segment.uncertainty.members import Member, dropping
from medssm.segment.uncertainty.sums import MAPS, PROBABILITIES, map_of
from medssm.segment.volumetry import VOLUMES, Volumes, is_volumes, read_volumes, volumes, voxel_ml, write_volumes

Infer: TypeAlias = "Callable[..., Store]"  # (network, image, fitted, scratch, show=...) -> probabilities (x, outputs or more, y, z)

_PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # Lightning's names, as in train


def predict(
    run: Path | str | Sequence[Path | str],
    inputs: Annotated[Path | str | Sequence[Path | str], Option(several=True)],
    out: Path | str,
    *,
    more_runs: Sequence[Path | str] = (),
    weights: Literal["best", "last"] = "last",
    section: str | None = None,
    format: Literal["nifti", "nrrd", "mha", "png", "tiff", "dicom-seg"] | None = None,
    device: str = "auto",
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto",
    overlap: float = OVERLAP,
    mirror: bool = False,
    batch: int | None = None,
    nan: float | None = None,
    stream: bool = False,
    ranks: int = 1,
    rank_timeout: float = 600.0,
    explain: str | int | None = None,
    explain_at: tuple[float, float, float] | None = None,
    scratch: Path | str | None = None,
    postprocessing: Literal["auto", "none"] = "auto",
    uncertainty: Annotated[Literal["auto", "folds", "mirror", "dropout"] | None, Option(alone="auto")] = None,
    level: float = 0.9,
    save_probabilities: bool = False,
    overwrite: bool = False,
    skip_existing: bool = False,
    model: nn.Module | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Segment images, folders or lists of them; each label map lies on its image's own grid.

    A file that is read is never written over. Nor is any other file that medssm predict did not write, without `overwrite`.

    Args: Files
        run: folder written by medssm train, or a folder of such folders (fold_0, fold_1, ...); in Python also a list of them
        inputs: image files (NIfTI, NRRD, MetaImage, PNG, JPEG, TIFF, DICOM); folders, with all below them, of images or of DICOM series; datalists
            (.json) or text files of paths (.txt); an image's channels are CASE_0000.nii.gz, CASE_0001.nii.gz, ... where all of them are there, or
            in one file
        out: file for one case, whose ending says the format; else a folder for CASE.nii.gz, in the folders that CASE has below the input, and for
            volumes.csv
        more_runs: further folders written by medssm train; the probabilities of all are averaged
        weights: those of the end of the training, or those with the best validation
        section: of a datalist (default: testing or test, or the only one)
        format: of the label maps in a folder (default: NIfTI; that of the image where it is NRRD, MetaImage or a picture, with PNG for JPEG)
        save_probabilities: also write CASE_probabilities.nii.gz, float32 with the classes on the last axis
        overwrite: write over files of other origin in `out`
        skip_existing: leave out the cases whose label map is in `out` already
    Args: Uncertainty
        uncertainty: also write CASE_entropy.nii.gz and CASE_mutual-information.nii.gz, and intervals into volumes.csv, from the spread of several
            runs (folds), of the mirrorings that the network was trained with (mirror), or of ten passes with its dropout on (dropout); auto is the
            first of these that there is
        level: of the conformal intervals on volumes, more than 0 and less than 1
    Args: Explanation
        explain: a class, by its name or its value: CASE_integrated-gradients.nii.gz and CASE_occlusion.nii.gz show what it depends on,
            CASE_reach-LAYER.nii.gz what the scans of a layer see, and CASE_explained.html all of that; for it the package captum is needed
        explain_at: the point that the scans are asked about, in millimetres of the image's own coordinates (default: the middle of the class)
    Args: Inference
        overlap: of neighbouring windows, 0 to less than 1
        mirror: average over the mirrorings that the network was trained with
        batch: windows at a time (default: 1, 2 or 4, whichever is fastest on the first windows; 1 where they are large)
        stream: run the network over the whole volume at once, in slabs that bound the memory, instead of windows; for medssm_unet in 3D
        ranks: processes that share each volume, which the network then sees at once, without windows: on this machine, or those that torchrun
            started; for medssm_unet in 3D
        rank_timeout: seconds after which a process that waits for another one gives up
        scratch: folder for temporary files, where memory cannot hold probabilities or maps (default: the folder of the output)
        postprocessing: auto does what raised the Dice of the held-out cases in training (postprocessing.json; of several runs, what did so in each)
        nan: number that takes the place of voxels that are not finite (default: such an image is an error)
        device: auto, cpu, cuda, cuda:1 or mps
        precision: auto is 16-mixed on CUDA, else 32-true
        model: the module to load the weights into, where `train` was given one

    Returns:
        {"cases": {name: file}, "volumes": {name: {class: {"voxels", "ml"}}}, "failed": {name: reason}, "skipped": [names], "seconds": ...}: of
        several cases one that fails does not stop the others. With `uncertainty` a class also has "members_low_ml", "members_high_ml" (the smallest
        and the largest volume that a member found) and, where there are bounds, "conformal_low_ml", "conformal_high_ml", "conformal_level"; and
        "uncertainty" says what the members are, and what the bounds are from. With `explain` also {"explained": {name: what docs/guides/explain.md
        says}}.

    Raises:
        UserError: where nothing can be predicted, or the only case is bad.
    """
    if not 0 <= overlap < 1:
        raise UserError(f"overlap: expected 0 to less than 1, got {overlap}")
    if batch is not None and batch < 1:
        raise UserError(f"batch: expected 1 or more, got {batch}")
    check_nan(nan)
    if not 0 < level < 1:
        raise UserError(f"level: expected more than 0 and less than 1, got {level}")
    if ranks < 1 or rank_timeout <= 0:
        raise UserError(f"ranks: expected 1 or more, and a rank_timeout above 0, got {ranks} and {rank_timeout}")
    place, begun = device_of(device), time.perf_counter()
    half = half_of(precision, place)
    folders = folders_of([*listed(run), *more_runs])
    if ranks > 1 and over_ranks.joined(_networks, (folders, model, weights, place), rank_timeout):
        return {"cases": {}, "volumes": {}, "failed": {}, "skipped": [], "seconds": round(time.perf_counter() - begun, 2)}
    folds = [_load(folder, model, weights, place) for folder in folders]
    _check_alike(folds)
    explainer = None
    if explain is not None:
        runs = [Run(fold.network, fold.fitted) for fold in folds]
        where = None if scratch is None else Path(scratch)
        explainer = Explainer(
            explain, runs, device=place, overlap=overlap, batch=batch or 1, at=explain_at, nan=nan, scratch=where, overwrite=overwrite
        )
    steps = _postprocessing(folds, postprocessing, weights)
    if not quiet and any(steps.values()):
        print(f"post-processing: {postprocess.described(steps)}", file=sys.stderr)
    members, ensemble = [Member(i, mirror) for i in range(len(folds))], None
    if uncertainty is not None:
        options = {"--weights best": weights == "best", "--mirror": mirror, "--stream": stream, "--overlap": overlap != OVERLAP}
        unlike = [name for name, given in (options | {"--postprocessing none": postprocessing == "none"}).items() if given]
        ensemble = Ensemble.of(uncertainty, folds, mirror, level, unlike, weights if postprocessing == "auto" else None)
        members = list(ensemble.members)
        if stream and any(member.seed is not None for member in members):
            raise UserError("stream: dropout is not streamed: leave --stream out")
        if not quiet:
            print(f"uncertainty: from {'; '.join(ensemble.said)}", file=sys.stderr)
    if ranks > 1:
        if stream or any(member.seed is not None for member in members):
            raise UserError("ranks: neither stream nor dropout is possible over ranks: leave --ranks out")
        for fold in folds:
            over_ranks.check(fold.network, fold.fitted)
    cases = cases_of([Path(path) for path in listed(inputs)], len(folds[0].fitted.channels), out=Path(out), section=section)
    targets = targets_of(cases, Path(out), format)
    table = None if Path(out) in targets.values() else Path(out) / VOLUMES
    there = [case for case in cases if skip_existing and targets[case.name].exists()]
    skipped = [case.name for case in there]
    cases = [case for case in cases if case not in there]
    read = [file for case in cases for image in case.images for file in files_of(image)]
    beside = [*([PROBABILITIES] if save_probabilities else []), *(MAPS if ensemble else ())]
    outputs = [file for case in cases for file in (targets[case.name], *(map_of(targets[case.name], what) for what in beside))]
    outputs += [file for case in cases if explainer for file in explainer.maps(targets[case.name])]
    for file, times in Counter(outputs).items():
        if times > 1:  # of a case that has the name of another one's map
            raise UserError(f"out: {file}: expected one file of that name, got two: name one of the images otherwise")
        protect(file, reads=read, made=is_made_here, overwrite=overwrite)
    for case in cases:
        if explainer:
            explainer.protect(targets[case.name], read)
    if table:
        protect(table, made=is_volumes, overwrite=overwrite)
    if stream:
        for fold in folds:
            check_streamed(fold.network, fold.fitted, fold.fitted.patch)
        infer: Infer = partial(streamed_probabilities, device=place, half=half, say=_silent if quiet else _said)
    else:
        pace = Pace(batch, _silent if quiet else _said)
        infer = partial(stored_probabilities, device=place, half=half, overlap=overlap, batch=pace)
    written: dict[str, str] = {}
    said: set[tuple[str, ...]] = set()

    def say(file: Image) -> None:
        """What was read, once for each format and each thing that was assumed."""
        if not quiet and (file.format, *file.notes) not in said:
            said.add((file.format, *file.notes))
            about = f"{file.format}, {' x '.join(map(str, file.shape))} voxels of {lengths(file.spacing)} mm"
            print("; ".join([f"{file.path}: {about}", *file.notes]), file=sys.stderr)

    explained: dict[str, dict[str, Any]] = {}
    measured, failed = _measured_before(there, targets, structures(folds[0].fitted.classes, folds[0].fitted.regions), table)
    with contextlib.ExitStack() as others, _written_at_the_end(table, measured), progress("predicting", quiet) as show:
        if ranks > 1:
            every = over_ranks.ranks(ranks, _networks, (folders, model, weights, place), [fold.network for fold in folds], rank_timeout)
            infer = partial(others.enter_context(every).probabilities, half=half)
        for i, case in enumerate(cases):

            def show_case(part: float, i: int = i, case: Case = case) -> None:
                show((i + part) / len(cases), case.name)

            try:
                target = targets[case.name]
                room = target.parent if scratch is None else Path(scratch)
                measured[case.name] = _predict_case(
                    case, folds, ensemble, members, target, save_probabilities, nan, room, steps, say, infer, show_case
                )
                written[case.name] = str(target)
                if explainer:
                    explained[case.name] = explainer(case, target, show_case)
                    if not quiet:
                        print(summary(case.name, explained[case.name]), file=sys.stderr)
            except UserError as error:
                if len(cases) == 1 and not skipped:
                    raise
                failed[case.name] = str(error)
            except RankError:  # there is no one to go on with
                raise
            except (MemoryError, OSError, RuntimeError) as error:  # torch reports a lack of memory as RuntimeError
                failed[case.name] = f"{case.images[0]}: {type(error).__name__}: {first_line(error)}"
    result = {"cases": written, "volumes": measured, "failed": failed, "skipped": skipped, "seconds": round(time.perf_counter() - begun, 2)}
    if ensemble:
        result["uncertainty"] = dict(zip(("members", "intervals"), ensemble.said, strict=True))
    return {**result, "explained": explained} if explainer else result


def show(result: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Print how many cases were segmented."""
    counts = {"failed": len(result["failed"]), "skipped": len(result["skipped"])}
    rest = "".join(f", {number} {what}" for what, number in counts.items() if number)
    print(f"{len(result['cases'])} case(s) in {result['seconds']:.1f} s{rest}: {options['out']}")


@dataclass(frozen=True)
class _Fold:
    folder: Path
    network: nn.Module
    fitted: Fitted


def _predict_case(
    case: Case,
    folds: Sequence[_Fold],
    ensemble: Ensemble | None,
    members: Sequence[Member],
    target: Path,
    save_probabilities: bool,
    nan: float | None,
    scratch: Path,
    steps: postprocess.Steps,
    say: Callable[[Image], None],
    infer: Infer,
    show: Callable[[float], None],
) -> Volumes:
    files = open_channels(case.images, len(folds[0].fitted.channels))
    file = files[0]
    say(file)
    check_output(target, file)
    fitted, onto = folds[0].fitted, ras(file.affine, file.shape)
    values, outputs = np.array(list(fitted.classes.values())), len(fitted.outputs)
    with Scratch(_room(case, files, folds), scratch, str(case.images[0])) as stores:
        read = read_stored(files, nan, stores)
        grids = []  # folds on one grid are summed there, so that each grid is resampled back once
        spacings = dict.fromkeys(fold.fitted.spacing for fold in folds)
        images = {spacing: on_spacing(read, onto, spacing, stores) for spacing in spacings}
        if all(image is not read for _, image in images.values()):
            read.close()
        spread = ensemble.begin(file, onto, stores) if ensemble else None
        for spacing, (grid, image) in images.items():
            totals: list[Store] = []
            for i, member in enumerate(members):
                fold = folds[member.run]
                if fold.fitted.spacing != spacing:
                    continue

                def show_member(part: float, i: int = i) -> None:
                    show((i + part) / len(members))

                with dropping(fold.network, member.seed):
                    found = infer(fold.network, image, fold.fitted, stores, mirror=member.mirror, show=show_member)
                if spread:
                    spread.add(member, partial(resampled, _reader(found, outputs), grid, onto))
                    found.close()
                    continue
                totals.append(found)
                if len(totals) == 2:
                    _take_in(totals[0], totals.pop())
            grids += [(grid, total) for total in totals]
            image.close()

        def averaged(rows: slice) -> Tensor:
            return sum((resampled(_reader(total, outputs), grid, onto, rows) for grid, total in grids), torch.zeros(())) / len(folds)

        mean = spread.sums.mean if spread else averaged
        positions = stores.store(*onto.shape, dtype=fitted.position_type)
        kept = stores.store(*onto.shape, outputs) if save_probabilities else None
        for rows in slabs(onto.shape[0], 4 * outputs * math.prod(onto.shape[1:])):
            back = mean(rows)
            positions[rows] = decided(back, values.tolist(), fitted.regions).to(positions.dtype)
            if kept is not None:
                kept[rows] = back.movedim(0, -1)
        postprocess.process(positions, steps, fitted.to_process, voxel_ml(file))
        labels = OnFile(positions, file, values.astype(_smallest(values)))
        write_image(target, labels, file, fitted.classes)
        if kept is not None:
            nifti.write(map_of(target, PROBABILITIES), OnFile(kept, file), file)
        measured = volumes(labels, file, structures(fitted.classes, fitted.regions))
        if spread:
            spread.finish(target, measured)
        return measured


def _postprocessing(folds: Sequence[_Fold], wanted: str, weights: str) -> postprocess.Steps:
    if wanted not in ("auto", "none"):
        raise UserError(f"postprocessing: expected auto or none, got {wanted!r}")
    return postprocess.load([fold.folder for fold in folds], list(folds[0].fitted.structures), weights) if wanted == "auto" else {}


def _measured_before(
    there: Sequence[Case], targets: Mapping[str, Path], classes: Mapping[str, Sequence[int]], table: Path | None
) -> tuple[dict[str, Volumes], dict[str, str]]:
    """The volumes in the label maps that are there already, on the grids of their images, and why one cannot be read.

    The intervals in a row of the table stay where the label map still has as many voxels.
    """
    measured, failed, before = {}, {}, read_volumes(table) if table else {}
    for case in there:
        try:
            found = volumes(*read_label(targets[case.name], open_image(case.images[0])), classes)
            rows = before.get(case.name, {})
            measured[case.name] = {
                name: rows[name] | row if rows.get(name, {}).get("voxels") == row["voxels"] else row for name, row in found.items()
            }
        except UserError as error:
            failed[case.name] = str(error)
    return measured, failed


@contextlib.contextmanager
def _written_at_the_end(table: Path | None, measured: Mapping[str, Volumes]) -> Iterator[None]:
    """Add what was measured to a table of volumes, also where an interrupt ends the block. Rows of label maps that are gone go too."""
    try:
        yield
    finally:
        if table and measured:
            before = {name: rows for name, rows in read_volumes(table).items() if has_label_map(table.parent, name)}
            write_volumes(table, before | dict(measured))


def _take_in(total: Store, other: Store) -> None:
    """Add another store, and give it back."""
    for rows in total.slabs():
        total.add((rows,), other[rows])
    other.close()


def _reader(total: Store, outputs: int) -> Callable[[slice], Tensor]:
    """Rows (outputs, rows, y, z) of what `stored_probabilities` or `streamed_probabilities` gave."""
    return lambda rows: total[rows][:, :outputs].movedim(1, 0).cpu()


def _room(case: Case, files: Sequence[Image], folds: Sequence[_Fold]) -> float:
    """Bytes of memory for what is stored: half of what is free, since the network needs some too.

    UserError where the spacing is far from the network's, as of a wrong unit, or where memory cannot hold a file that is read whole.
    """
    edges, _ = ras_grid(files[0])
    for spacing in dict.fromkeys(fold.fitted.spacing for fold in folds):
        wanted = np.where(np.array(spacing) > 0, np.array(spacing), edges)
        if far_apart(edges, wanted):
            raise UserError(
                f"{case.images[0]}: voxels of {lengths(edges)} mm, where the network was trained at {lengths(wanted)} mm: "
                "a wrong unit of length in its header, or another kind of image"
            )
    needed, free = max((file.bytes for file in files if file.parts is None), default=0.0), machine.free_memory()
    if needed > free:
        raise UserError(
            f"{case.images[0]}: {files[0].format} is read as a whole, which needs {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free: "
            "save it as .nii or .nii.gz"
        )
    return (free - needed) / 2


def _said(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _silent(line: str) -> None:
    pass


def listed(paths: Path | str | Sequence[Path | str]) -> Sequence[Path | str]:
    return [paths] if isinstance(paths, (str, Path)) else paths


def folders_of(runs: Sequence[Path | str]) -> list[Path]:
    """The folders that hold weights; a folder without any stands for those in it."""
    folders: list[Path] = []
    for folder in map(Path, runs):
        if not folder.is_dir():
            raise UserError(f"run: {folder}: no such folder")
        inner = [folder] if (folder / FITTED).exists() else sorted(file.parent for file in folder.glob(f"*/{FITTED}"))
        if not inner:
            raise UserError(f"run: {folder}: no {FITTED} in it: not written by medssm train")
        folders += inner
    return folders


def weights_of(folder: Path, weights: str) -> str:
    """The file of the "last" or the "best" weights of a finished training. Raises UserError where it is not there."""
    if weights not in ("best", "last"):
        raise UserError(f"weights: expected best or last, got {weights!r}")
    if not (folder / networks.WEIGHTS).is_file():
        raise UserError(f"run: {folder / networks.WEIGHTS}: no such file (the training is not finished: go on with --resume)")
    name = networks.BEST if weights == "best" else networks.WEIGHTS
    if not (folder / name).is_file():
        raise UserError(f"weights: {folder / name}: no such file (it was trained without validation)")
    return name


def _load(folder: Path, model: nn.Module | None, weights: str, device: torch.device) -> _Fold:
    name = weights_of(folder, weights)
    fitted = Fitted.load(folder / FITTED)
    network, _ = fold_norms(networks.load(folder, copy.deepcopy(model), name).eval())  # copied: every fold has weights of its own
    return _Fold(folder, networks.placed(network, device, len(fitted.patch)), fitted)


def _networks(folders: Sequence[Path], model: nn.Module | None, weights: str, device: torch.device) -> list[nn.Module]:
    return [_load(folder, model, weights, device).network for folder in folders]


def _check_alike(folds: Sequence[_Fold]) -> None:
    for fold in folds[1:]:
        for what in ("channels", "classes", "regions"):
            first, other = getattr(folds[0].fitted, what), getattr(fold.fitted, what)
            if first != other:
                raise UserError(f"run: {fold.folder} has the {what} {other}, {folds[0].folder} has {first}")


def device_of(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: {name}: {str(error).splitlines()[0]}") from error
    return device


def half_of(precision: str, device: torch.device) -> torch.dtype | None:
    """The type that autocast takes, or None for float32."""
    if precision == "auto":
        return torch.float16 if device.type == "cuda" else None
    if precision not in _PRECISIONS:
        raise UserError(f"precision: expected auto, {', '.join(_PRECISIONS)}, got {precision!r}")
    return _PRECISIONS[precision]


def _smallest(values: np.ndarray) -> np.dtype:
    """uint8 where the labels fit, else an integer type that holds them."""
    return np.result_type(*(np.min_scalar_type(int(value)) for value in (0, values.min(), values.max())))
