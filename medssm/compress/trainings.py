"""The training whose network becomes smaller: of a network that segments, or of a classifier."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from medssm import tasks
from medssm.classify import calibration, folds, samples, scores, table
from medssm.classify import start as classifiers
from medssm.classify import train as classifying
from medssm.classify.figures import recalls
from medssm.classify.images import Images
from medssm.classify.loss import WeightedEntropy
from medssm.classify.validation import logits_of
from medssm.compress import factorize as low_ranks
from medssm.compress import prune as pruning
from medssm.errors import UserError
from medssm.files import first_line, read_json, read_json_lines, write_text
from medssm.segment import networks, postprocess
from medssm.segment import start as segmenters
from medssm.segment import train as segmenting
from medssm.segment.data import FITTED, load_dataset, split
from medssm.segment.loop import LOG
from medssm.segment.patches import Patches
from medssm.segment.runs import ARGUMENTS, CASES
from medssm.segment.uncertainty import conformal
from medssm.segment.volumes import load

_CASES_READ = 16  # for the patches that importance and ranges are found with
Start = segmenters.Start | classifiers.Start


@dataclass(frozen=True)
class Training:
    """A finished training.

    start      its network and what was fitted to its data
    recipe     the arguments that it was called with
    finished   what it returned
    dataset    where its data set is
    example    (1, c, *size), for what is counted and measured
    batches    (count, seed) -> so many pairs of two images and what the loss compares their outputs with, of the images that it learnt from
    loss       of an output and a label
    score      what the mean of its validation is
    train      the function that trains such a network
    of_run     files of its folder that a network made of it has too
    of_network files of its folder that say something of the network as it was
    measure    (folder, network) -> what a training returns of the held-out images, for this network, and the folder's files about them; None where
               that takes another command
    """

    run: Path
    start: Start
    recipe: dict[str, Any]
    finished: dict[str, Any]
    dataset: Path
    example: Tensor
    batches: Callable[[int, int], list[tuple[Tensor, Tensor]]]
    loss: nn.Module
    score: str
    train: Callable[..., dict[str, Any]]
    of_run: Sequence[str]
    of_network: Sequence[str]
    measure: Callable[[Path, nn.Module], dict[str, Any]] | None = None

    @classmethod
    def read(cls, run: Path, data: Path | None, seed: int) -> Training:
        """Raises UserError for a folder that is not that of a finished training, and a data set that is not the one that it was trained on."""
        networks.check_run(run, "run")
        classifies = tasks.is_run(run)
        recipe = _recipe(run / ARGUMENTS, classifying.train if classifies else segmenting.train)
        dataset = Path(recipe["dataset"]) if data is None else data
        if not dataset.exists():
            raise UserError(f"data: {dataset}: no such file or folder: where is the data set that {run} was trained on?")
        return (_classifier if classifies else _segmenter)(run, recipe, dataset, seed)

    def smaller(self, prune: float | None, low_rank: float | None, batches: Sequence[tuple[Tensor, Tensor]] | None, multiple: int) -> Start:
        """The network pruned, by the loss on batches or by its weights, and with layers of low rank."""
        done: list[dict[str, Any]] = list(self.start.config.get("compression", []))
        network = networks.placed(self.start.network, torch.device("cpu"), self.example.ndim - 2)
        if prune is not None:
            loss = None if batches is None else self.loss
            network, step = pruning.prune(network, prune, self.example, batches=batches or (), loss=loss, multiple=multiple)
            done.append(step)
        if low_rank is not None:
            network, step = low_ranks.factorize(network, low_rank)
            done.append(step)
        return self.start._replace(network=network, config={**self.start.config, "compression": done})

    def untrained(self, start: Start, work: Path) -> None:
        """Write what a training would have written, of a network that is not trained further."""
        networks.save(work, start.network, start.config)
        same = len(start.config["compression"]) == len(self.start.config.get("compression", []))
        for name in (FITTED, CASES, ARGUMENTS, *self.of_run, *(self.of_network if same else ())):
            if (self.run / name).is_file():
                shutil.copyfile(self.run / name, work / name)
        add_end(work, {**self.finished, "validation": {}, "best": {}})


def _segmenter(run: Path, recipe: dict[str, Any], dataset: Path, seed: int) -> Training:
    start, found = segmenters.Start.of(run), load_dataset(dataset)
    start.check(found)
    sides = split(found, recipe["fold"], folds=recipe["folds"], splits=recipe["splits"], group=recipe["group"], seed=recipe["seed"])
    _check_same(run, found.name, "cases", [[case.name for case in side] for side in sides])
    fitted = start.fitted

    def batches(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        cases = [sides[0][i] for i in _some(len(sides[0]), seed)]
        volumes = start.volumes(cases, load(cases, found, fitted.spacing, recipe["cache"], recipe["nan"]), seed)
        return _pairs(Patches(volumes, fitted, seed=seed, foreground=recipe["foreground"], augment=False), count)

    return Training(
        run,
        start,
        recipe,
        finished(run),
        dataset,
        _example(len(fitted.channels), fitted.patch, seed),
        batches,
        segmenting.criterion_for(fitted),
        "mean Dice on held-out cases",
        segmenting.train,
        (postprocess.POSTPROCESSING,),
        (conformal.CONFORMAL,),
    )


def _classifier(run: Path, recipe: dict[str, Any], dataset: Path, seed: int) -> Training:
    start = classifiers.Start.of(run)
    columns = table.Columns(recipe["path_column"], recipe["label_column"], recipe["group_column"])
    found, _ = table.load_samples(dataset, columns, recipe["group"])
    start.check(found)
    sides = folds.split(found, recipe["fold"], recipe["folds"], recipe["seed"])
    _check_same(run, str(dataset), "images", [[sample.name for sample in side] for side in sides])
    fitted = start.fitted

    def batches(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        some = [sides[0][i] for i in _some(len(sides[0]), seed)]
        labels = [fitted.classes.index(str(sample.label)) for sample in some]
        return _pairs(samples.Samples(Images(some, fitted, recipe["nan"]), labels, seed=seed, augment=False), count)

    def measure(folder: Path, network: nn.Module) -> dict[str, Any]:
        if not sides[1]:
            return {}
        images = Images(sides[1], fitted, recipe["nan"])
        labels = torch.tensor([fitted.classes.index(str(sample.label)) for sample in sides[1]])
        logits = logits_of(network.eval(), images, range(len(images)), torch.device("cpu"))
        temperature = calibration.temperature(logits, labels)
        found = scores.scored(sides[1], logits, labels, recipe["seed"])
        scores.save(folder, found, sides[1], fitted.classes, {"last": temperature})
        recall = recalls(labels.numpy(), logits.argmax(1).numpy(), fitted.classes)
        mean = sum(recall.values()) / len(recall)
        best = {"step": finished(folder)["steps"], "mean": mean}
        return {"validation": {**recall, "mean": mean}, "best": best, "temperature": temperature, **found.table}

    return Training(
        run,
        start,
        recipe,
        finished(run),
        dataset,
        _example(len(fitted.channels), fitted.shape, seed),
        batches,
        WeightedEntropy(None, 0.0),
        "balanced accuracy of held-out images",
        classifying.train,
        (),
        (calibration.CALIBRATION,),
        measure,
    )


def _check_same(run: Path, name: str, what: str, sides: Sequence[Sequence[str]]) -> None:
    """UserError where the training and held-out names are not those of the run."""
    known = read_json(run / CASES)
    for names, side in zip(sides, ("training", "validation"), strict=True):
        wanted, found = {entry["name"] for entry in known[side]}, set(names)
        if wanted != found:
            other = min(wanted ^ found)
            place = f"{other} is {'not ' if other in wanted else ''}among them"
            raise UserError(f"data: {name}: expected the {len(wanted)} {side} {what} of {run}, got {len(found)}: {place}")


def _some(count: int, seed: int) -> list[int]:
    found: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:_CASES_READ].tolist()
    return found


def _pairs(drawn: Patches | samples.Samples, count: int) -> list[tuple[Tensor, Tensor]]:
    """Images and labels, two at a time."""
    pairs = [(drawn[2 * i], drawn[2 * i + 1]) for i in range(count)]
    return [(torch.stack([a["image"], b["image"]]), torch.stack([a["label"], b["label"]])) for a, b in pairs]


def _example(channels: int, size: Sequence[int], seed: int) -> Tensor:
    return torch.rand(1, channels, *size, generator=torch.Generator().manual_seed(seed))


def _recipe(path: Path, train: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of a training; those that the file says nothing of have their defaults."""
    parameters = inspect.signature(train).parameters
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        unknown = found.keys() - parameters.keys()
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"run: {path}: cannot be read ({first_line(error)})") from error
    if unknown:
        raise UserError(f"run: {path}: medssm train of this version has no option {', '.join(sorted(unknown))}")
    return {name: parameter.default for name, parameter in parameters.items() if parameter.default is not parameter.empty} | found


def finished(run: Path) -> dict[str, Any]:
    """What the training of a folder returned."""
    ends = [line["finished"] for line in read_json_lines(run / LOG) if "finished" in line]
    if not ends:
        raise UserError(f"run: {run / LOG} says nothing of the end of its training")
    result: dict[str, Any] = ends[-1]
    return result


def add_end(work: Path, result: Mapping[str, Any]) -> None:
    """A line about the end of the training, in its log."""
    log = work / LOG
    line = json.dumps({"step": result["steps"], "seconds": result["seconds"], "finished": result}) + "\n"
    write_text(log, (log.read_text(encoding="utf-8") if log.exists() else "") + line)
