"""What each way to a smaller network costs on patients: python bench/compression.py DATASET WORK [--network medssm_unet] [--fold 0] [--out FOLDER]

Trains the network, makes it smaller in the ways of SETTINGS, and compares all of them on the cases of the fold that is held out. WORK keeps the runs;
called again, it goes on where it was. Then it writes Dice with intervals over patients, multiply-adds, parameters and the seconds of a scan. The
splits are those of bench/results/accuracy. `more` is the control: the network trained further for as many steps as the others were.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import record

from medssm import cli
from medssm.compare import compare

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
HEAD = ("network", "Dice", "difference from the first", "verdict", "HD95, mm", "parameters", "multiply-adds", "s a scan, 2 threads", "over the first")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--network", choices=SETTINGS, default="medssm_unet")
    parser.add_argument("--fold", default="0")
    parser.add_argument("--out", type=Path, default=RESULTS / "compression")
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
    shutil.rmtree(args.work / "compare", ignore_errors=True)
    references = args.work / base / "cases.json"
    found = compare([args.work / name for name in (base, *settings)], references=references, section="validation", out=args.work / "compare")
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
        **{key: facts[key] for key in ("parameters", "multiply_adds", "inference_seconds")},
    }


def lines(network: str, entry: dict[str, Any]) -> list[tuple[str, ...]]:
    """The lines of the table."""
    first = entry["sides"][entry["base"]]["inference_seconds"]
    return [
        (
            f"{network}: {name}",
            interval(side["scores"]["dice"], 4),
            interval(side["difference"], 4) if side["difference"] else "",
            side["verdict"],
            interval(side["scores"]["hd95"], 2),
            f"{side['parameters'] / 1e6:.2f} M",
            f"{side['multiply_adds'] / 1e9:.2f} G",
            f"{side['inference_seconds']:.3f}",
            f"{side['inference_seconds'] / first:.2f}",
        )
        for name, side in entry["sides"].items()
    ]


def interval(score: dict[str, float], digits: int) -> str:
    """A mean and its 95 % interval."""
    return f"{score['mean']:.{digits}f} [{score['low']:.{digits}f}, {score['high']:.{digits}f}]"


if __name__ == "__main__":
    main()
