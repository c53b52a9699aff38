"""What each way to a smaller network costs on patients: python bench/compression.py DATASET WORK [--network medssm_unet] [--fold 0] [--out FOLDER]
[--controls SETTING]

Trains the network, makes it smaller in the ways of SETTINGS, and compares all of them on the cases of the fold that is held out. WORK keeps the runs;
called again, it goes on where it was. Then it writes Dice with intervals over patients, multiply-adds, parameters and the seconds of a scan. The
splits are those of bench/results/accuracy. `more` is the control: the network trained further for as many steps as the others were.

--controls SETTING, as best, adds MONAI's BasicUNet, DynUNet and SegResNet, trained from the beginning for as many steps as the first network, of the
width at which one thread takes as long for a patch as with the network of that setting. WORK/controls.json keeps the widths.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from record import record

from medssm import cli
from medssm.bench.accuracy.specs import PARTS, nearest
from medssm.compare import compare
from medssm.compare.disturb import KINDS
from medssm.compress.fold import fold
from medssm.files import read_json, write_json
from medssm.models import model_facts
from medssm.segment import networks
from medssm.segment.start import Start

RESULTS = Path(__file__).parent / "results"
FURTHER = 300
PRUNED, LAST = ("--prune", "0.35"), ("--steps", str(FURTHER))
LIGHT = {"umamba_bot": '{"features": [16, 32, 64, 128]}', "segmamba": '{"features": [16, 32, 64, 128], "hidden": 128}'}
# The network's name here and words of its training, then ways to a smaller one: words of `medssm compress`, of `medssm train` after "train".
SETTINGS: dict[str, tuple[str, Sequence[str], dict[str, Sequence[str]]]] = {
    "medssm_unet": (
        "small",
        ("--max-steps", "800"),
        {
            "more": ("train", "--start", "{base}", "--max-steps", str(FURTHER)),
            "p35": (*PRUNED, *LAST),
            "r40": ("--low-rank", "0.4", *LAST),
            "int8": ("--int8",),
            "best": (*PRUNED, "--distil", "{base}", "--int8", *LAST),
            "p20": ("--prune", "0.2", "--distil", "{base}", "--int8", *LAST),
            "tiny": ("train", "--size", "tiny", "--max-steps", "800"),
            "student": ("train", "--size", "tiny", "--max-steps", "800", "--distil", "{base}"),
        },
    ),
    **{
        name: (
            short,
            ("--max-steps", "300", "--model-kwargs", kwargs),
            {
                f"{short}-int8": ("--int8",),
                f"{short}-p50": ("--prune", "0.5", "--steps", "150"),
                f"{short}-r50": ("--low-rank", "0.5", "--steps", "150"),
            },
        )
        for (name, kwargs), short in zip(LIGHT.items(), ("umamba", "segmamba"), strict=True)
    },
}
CONTROLS = ("monai_basicunet", "monai_dynunet", "monai_segresnet")
RUNS = 5  # of one inference, of which the fastest counts
HEAD = (
    "network",
    "Dice",
    "difference from the first",
    "verdict",
    "HD95, mm",
    *(f"Dice, {kind}" for kind in KINDS),
    "calibration error, unsure voxels",
    "parameters",
    "multiply-adds",
    "file, MiB",
    "s a scan, 2 threads",
    "over the first",
    "cold start, s",
    "memory, MiB",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--network", choices=SETTINGS, default="medssm_unet")
    parser.add_argument("--fold", default="0")
    parser.add_argument("--out", type=Path, default=RESULTS / "compression")
    parser.add_argument("--controls", metavar="SETTING")
    args = parser.parse_args()
    base, words, settings = SETTINGS[args.network]
    training = ("--splits", str(RESULTS / "accuracy" / "splits.json"), "--fold", args.fold, "--validations", "1")
    run(args.work / base, "train", args.dataset, "--model", args.network, *training, *words)
    for name, way in settings.items():
        command, *rest = (word.format(base=args.work / base) for word in way)
        if command == "train":
            run(args.work / name, "train", args.dataset, *training, *rest)
        else:
            run(args.work / name, "compress", args.work / base, command, *rest)
    if args.controls:
        for name, way in controls(args.work, base, args.controls).items():
            run(args.work / name, "train", args.dataset, *training, *words, *way)
            settings = {**settings, name: way}
    shutil.rmtree(args.work / "compare", ignore_errors=True)
    references = args.work / base / "cases.json"
    sides = [args.work / name for name in (base, *settings)]
    found = compare(sides, references=references, section="validation", out=args.work / "compare", disturb=KINDS, measure=True)
    entry: dict[str, Any] = {
        "base": base,
        "dataset": args.dataset.name,
        "fold": args.fold,
        "patients": found["patients"],
        "training": words,
        "settings": settings,
    }
    record(
        args.out, args.network, entry | {"sides": {name: row(found, name) for name in found["sides"]}}, "Smaller networks on patients", HEAD, lines
    )


def controls(work: Path, base: str, setting: str) -> dict[str, Sequence[str]]:
    """{name: words of its training} of MONAI's networks that take as long for a patch as the run `setting`; the widths are found once."""
    if not (work / "controls.json").exists():
        like = Start.of(work / setting)
        patch = like.fitted.patch
        wanted = seconds(like.network, (1, len(like.fitted.channels), *patch))
        sizes = {"spatial_dims": len(patch), "in_channels": len(like.fitted.channels), "out_channels": len(like.fitted.outputs)}
        found = {name: at_latency(name, wanted, patch, sizes) for name in CONTROLS}
        write_json(work / "controls.json", {"like": setting, "seconds": wanted, "patch": list(patch), "networks": found})
    kept = read_json(work / "controls.json")
    patch = ("--patch", *map(str, kept["patch"]))
    return {name: ("--model", name, "--model-kwargs", json.dumps(way["kwargs"]), *patch) for name, way in kept["networks"].items()}


def at_latency(name: str, wanted: float, patch: Sequence[int], sizes: dict[str, int]) -> dict[str, Any]:
    """{"kwargs", "seconds"} of a network with the width whose seconds for a patch are nearest to those wanted."""
    of_width = model_facts(name).of_width
    assert of_width is not None
    taken: dict[int, float] = {}

    def at(parts: int) -> float:
        if parts not in taken:
            network = networks.build(name, **sizes, **of_width(parts / PARTS, patch))
            taken[parts] = seconds(network, (1, sizes["in_channels"], *patch))
        return taken[parts]

    parts = nearest(at, wanted)
    return {"kwargs": of_width(parts / PARTS, patch), "seconds": taken[parts]}


@torch.inference_mode()
def seconds(network: torch.nn.Module, shape: Sequence[int]) -> float:
    """Of one inference on one thread, as `medssm predict` does it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    network = networks.placed(fold(network.eval())[0], torch.device("cpu"), len(shape) - 2)
    x = torch.rand(tuple(shape)).contiguous(memory_format=networks.memory_format(len(shape) - 2))
    found = []
    for _ in range(RUNS + 1):  # the first one prepares
        begun = time.perf_counter()
        network(x)
        found.append(time.perf_counter() - begun)
    torch.set_num_threads(threads)
    return min(found[1:])


def run(folder: Path, command: str, first: Path, *words: object) -> None:
    """One command into `folder`, if that has not been done; what was interrupted goes on."""
    done = folder.with_name(f"{folder.name}.done")
    if not done.exists():
        print(folder.name, flush=True)
        arguments = [command, first, folder, *words, "--quiet", *(["--resume"] if command == "train" or (folder / "train.yaml").exists() else [])]
        if cli.main(list(map(str, arguments))):
            raise SystemExit(f"{folder.name}: failed")
        done.touch()


def row(found: dict[str, Any], name: str) -> dict[str, Any]:
    """The figures of one network, out of compare's result."""
    side, facts = found["sides"][name], found["sides"][name]["facts"]
    difference = found["differences"].get(name)
    return {
        "scores": {score: side["mean"][score] for score in ("dice", "hd95")},
        "difference": difference and difference["mean"]["dice"],
        "verdict": difference["verdict"] if difference else "",
        "disturbed": {kind: under["sides"][name]["mean"]["dice"] for kind, under in found["disturbed"].items()},
        **{key: facts[key] for key in ("parameters", "multiply_adds", "file_bytes", "inference_seconds", "cold_seconds", "peak_bytes", "ece_unsure")},
    }


def lines(network: str, entry: dict[str, Any]) -> list[tuple[str, ...]]:
    """The lines of the table; "" is not measured."""
    first = entry["sides"][entry["base"]]["inference_seconds"]
    return [
        (
            f"{network}: {name}",
            interval(side["scores"]["dice"], 4),
            interval(side["difference"], 4),
            side["verdict"],
            interval(side["scores"]["hd95"], 2),
            *(interval(side.get("disturbed", {}).get(kind), 4) for kind in KINDS),
            number(side.get("ece_unsure"), 1, 4),
            f"{side['parameters'] / 1e6:.2f} M",
            f"{side['multiply_adds'] / 1e9:.2f} G",
            number(side.get("file_bytes"), 2**20, 2),
            f"{side['inference_seconds']:.3f}",
            f"{side['inference_seconds'] / first:.2f}",
            number(side.get("cold_seconds"), 1, 2),
            number(side.get("peak_bytes"), 2**20, 0),
        )
        for name, side in entry["sides"].items()
    ]


def number(value: float | None, unit: float, digits: int) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"


def interval(score: dict[str, Any] | None, digits: int) -> str:
    """A mean and, where there are patients enough, its 95 % interval."""
    if not score or score["mean"] is None:
        return ""
    return f"{score['mean']:.{digits}f}" + ("" if score["low"] is None else f" [{score['low']:.{digits}f}, {score['high']:.{digits}f}]")


if __name__ == "__main__":
    main()
