"""What `medssm train` finds after half an hour, with nothing chosen:

    python bench/half_hour.py DATASET WORK [--seconds 1800] [--fold 0] [--out FOLDER]

Trains on every fold but one, predicts the cases of that one from their files, and records their Dice with 95 % intervals over patients. WORK/run is
the training: one that is finished is taken as it is, one that was stopped goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from record import record

from medssm.files import read_json
from medssm.segment.evaluate import evaluate
from medssm.segment.predict import predict
from medssm.segment.train import train

DIGITS = (("dice", 4), ("hd95", 2))
HEAD = ("network", "held out", "steps", "seconds", "class", "Dice", "HD95, mm")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "accuracy-default")
    args = parser.parse_args(argv)
    run, predictions = args.work / "run", args.work / "predictions"
    trained = train(args.dataset, run, fold=args.fold, max_seconds=args.seconds, resume=run.exists())
    predict(run, [case["images"][0] for case in read_json(run / "cases.json")["validation"]], predictions, skip_existing=True)
    found = evaluate(predictions, run / "cases.json", section="validation", classes=run)
    if found["failed"]:
        raise SystemExit(f"failed: {found['failed']}")
    kept = {key: trained[key] for key in ("model", "parameters", "cases", "validation_cases", "steps", "seconds", "patch", "lr")}
    entry = {**kept, "fold": args.fold, "classes": found["classes"], "mean": found["mean"], "patients": found["cases"]}
    record(args.out, f"{args.seconds:g} s, fold {args.fold}", entry, "medssm train with nothing chosen", HEAD, rows)


def rows(size: str, entry: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, scores in {**entry["classes"], "mean": entry["mean"]}.items():
        found = (interval(scores[metric], digits) for metric, digits in DIGITS)
        yield (entry["model"], str(entry["validation_cases"]), f"{entry['steps']:,}", f"{entry['seconds']:.0f}", name, *found)


def interval(score: dict[str, float], digits: int) -> str:
    mean, low, high = (f"{score[key]:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


if __name__ == "__main__":
    main()
