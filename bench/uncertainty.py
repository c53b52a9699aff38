"""What the uncertainty of predictions is worth on real patients: python bench/uncertainty.py DATASET WORK [--rotations N] [--steps N] [--kinds folds]

The patients of a data set in nnU-Net's layout are dealt into four groups. In each rotation one group is the test. On the other three, three runs are
trained: each on two groups, with the third one held out. They predict the test group together (--uncertainty folds, bounds by CV+), and the first of
them alone (--uncertainty mirror, bounds by split conformal), so no test patient has trained or calibrated anything. Everything is then evaluated over
the test patients of all rotations. Beside that ("halves"), half of each run's held-out patients are drawn for the bounds of the other half.

WORK keeps runs and predictions; what is there already is not done again, and an interrupted training goes on. Writes uncertainty.json (with splits,
seeds, machine and commit) and the page of each kind into --out.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medssm.bench import origin as about
from medssm.segment.data import load_dataset
from medssm.segment.evaluate import evaluate
from medssm.segment.predict import predict
from medssm.segment.train import train
from medssm.segment.uncertainty.conformal import CONFORMAL, interval, score
from medssm.segment.volumetry import VOLUMES, read_volumes, write_volumes

GROUPS = 4
KINDS = {"folds": "three runs", "mirror": "mirrored passes of one run"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--rotations", type=int, default=GROUPS, choices=range(1, GROUPS + 1))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--level", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "accuracy-uncertainty")
    args = parser.parse_args()
    results: dict[str, Any] = about()  # with the commit that the runs are of
    groups = dealt(args.dataset, args.seed)
    for rotation in range(args.rotations):
        segmented(rotation, groups, args)
    results |= {
        "data": args.dataset.name,
        "network": f"medssm_unet {args.size}",
        "steps": args.steps,
        "batch": args.batch,
        "seed": args.seed,
        "level": args.level,
        "groups": groups,
        "tested": [groups[rotation] for rotation in range(args.rotations)],
        "kinds": {},
    }
    for kind in args.kinds:
        everything = args.work / "all" / kind
        gathered([args.work / f"rotation_{rotation}" / kind for rotation in range(args.rotations)], everything)
        options = {"classes": args.dataset / "dataset.json", "images": args.dataset / "imagesTr", "overwrite": True}
        links = args.work / "all" / "references"
        linked(args.dataset / "labelsTr", [name for group in results["tested"] for name in group], links)
        found = evaluate(everything, links, uncertainty=everything, **options)
        shutil.copy(everything / "uncertainty.html", args.work / f"{kind}.html")
        results["kinds"][kind] = {"what": KINDS[kind], "dice": {name: row["dice"] for name, row in found["classes"].items()}} | short(
            found["uncertainty"]
        )
    runs = [run for rotation in range(args.rotations) for run in sorted((args.work / f"rotation_{rotation}/runs").iterdir())]
    results["halves"] = halves(runs, args.level, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "uncertainty.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: {args.out / 'uncertainty.json'}")


def dealt(dataset: Path, seed: int) -> list[list[str]]:
    """The names of the patients in GROUPS groups."""
    names = sorted(case.name for case in load_dataset(dataset).cases)
    random.Random(seed).shuffle(names)
    return [sorted(names[i::GROUPS]) for i in range(GROUPS)]


def segmented(rotation: int, groups: list[list[str]], args: argparse.Namespace) -> None:
    """Train the runs of a rotation, and predict its test group with both kinds."""
    place = args.work / f"rotation_{rotation}"
    place.mkdir(parents=True, exist_ok=True)
    test, others = groups[rotation], [group for i, group in enumerate(groups) if i != rotation]
    splits = [{"train": [name for group in others if group is not held for name in group], "val": held} for held in others]
    (place / "splits.json").write_text(json.dumps(splits))
    for fold in range(len(others)):
        begun = time.perf_counter()
        run = train(
            args.dataset,
            place / "runs" / f"fold_{fold}",
            splits=place / "splits.json",
            fold=fold,
            size=args.size,
            max_steps=args.steps,
            batch=args.batch,
            validations=1,
            seed=args.seed,
            device="cpu",
            resume=True,
            quiet=True,
        )
        print(f"rotation {rotation}, fold {fold}: {run['validation']}, {time.perf_counter() - begun:.0f} s", flush=True)
    images = [args.dataset / "imagesTr" / f"{name}_0000.nii.gz" for name in test]
    for kind in args.kinds:
        runs = place / "runs" if kind == "folds" else place / "runs" / "fold_0"
        options = {"uncertainty": kind, "level": args.level, "save_probabilities": True, "skip_existing": True, "device": "cpu", "quiet": True}
        result = predict(runs, images, place / kind, **options)
        print(f"rotation {rotation}, {kind}: {result['uncertainty']}, {result['seconds']:.0f} s", flush=True)


def halves(runs: list[Path], level: float, seed: int, draws: int = 200) -> dict[str, Any]:
    """{class: the share of references inside}, half of each run's held-out patients drawn for the bounds of the other half, many times."""
    inside: dict[str, list[bool]] = {}
    generator = random.Random(seed)
    for run in runs:
        cases = list(json.loads((run / CONFORMAL).read_text())["cases"].values())
        half = len(cases) // 2
        for _ in range(draws):
            generator.shuffle(cases)
            for name in cases[0]["volumes"]:
                pairs = [(case["volumes"][name]["found_ml"], case["volumes"][name]["reference_ml"]) for case in cases]
                scores = [score(*pair) for pair in pairs[:half]]
                for found, reference in pairs[half:]:
                    bounds = interval([found], [scores], level)
                    if bounds:
                        inside.setdefault(name, []).append(bounds[0] <= reference <= bounds[1])
    return {name: {"coverage": sum(hits) / len(hits), "runs": len(runs), "draws": draws} for name, hits in inside.items()}


def gathered(folders: list[Path], out: Path) -> None:
    """The predictions of all rotations in one folder, under the names of their references."""
    out.mkdir(parents=True, exist_ok=True)
    table = {}
    for folder in folders:
        for file in folder.glob("*.nii.gz"):
            link = out / file.name
            link.unlink(missing_ok=True)
            link.symlink_to(file.resolve())
        table |= read_volumes(folder / VOLUMES)
    write_volumes(out / VOLUMES, table)


def linked(labels: Path, names: list[str], out: Path) -> None:
    """The references of the test patients in one folder."""
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        link = out / f"{name}.nii.gz"
        link.unlink(missing_ok=True)
        link.symlink_to((labels / link.name).resolve())


def short(found: Mapping[str, Any]) -> dict[str, Any]:
    """The result without curves, and with each case's figures in few digits."""
    kinds = {kind: {key: value for key, value in row.items() if key != "curve"} for kind, row in found["kinds"].items()}
    return rounded({**found, "kinds": kinds})


def rounded(value: Any) -> Any:
    """The same with numbers of five digits."""
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
