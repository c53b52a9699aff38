"""What the scans of a trained network see, and whether the maps of `medssm predict --explain` say anything, over held-out cases:

    medssm train DATASET RUN --fold 0
    python bench/explain.py RUN [--cases 8] [--out bench/results/accuracy-explain]

Every class is explained in held-out cases, spread evenly over those of RUN/cases.json. Writes explain.json: for each class the mean over the
cases, the least and the most, with the machine, the versions and the commit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medssm.bench import origin as about
from medssm.segment.explain.maps import METHODS
from medssm.segment.predict import predict
from medssm.segment.preprocess import Fitted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "accuracy-explain")
    args = parser.parse_args()
    held_out = json.loads((args.run / "cases.json").read_text())["validation"]
    chosen = held_out[:: max(1, len(held_out) // args.cases)][: args.cases]
    config = json.loads((args.run / "config.json").read_text())
    results: dict[str, Any] = {**about(), "network": config, "cases": [Path(case["label"]).name.partition(".")[0] for case in chosen], "classes": {}}
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "cases.json"
        listed.write_text(json.dumps([{**case, "images": [str((args.run / file).resolve()) for file in case["images"]]} for case in chosen]))
        for name in Fitted.load(args.run / "fitted.json").structures:
            found = predict(args.run, listed, Path(folder) / name, explain=name, device="cpu", quiet=True)
            if found["failed"]:
                raise SystemExit("\n".join(found["failed"].values()))
            explained = [case for case in found["explained"].values() if case["voxels"]]
            results["classes"][name] = {"explained": len(explained), "seconds": found["seconds"], **summary(explained)}
            print(json.dumps({name: results["classes"][name]["sanity"]}, indent=1), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "explain.json").write_text(json.dumps(results, indent=1) + "\n")


def summary(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of one class over its cases."""
    layers = []
    for several in zip(*(case["reach"]["layers"] for case in cases), strict=True):
        orders = []
        for same in zip(*(layer["orders"] for layer in several), strict=True):
            distances = {key: value for key, value in same[0].items() if isinstance(value, dict)}
            spreads = {key: {share: spread(order[key][share] for order in same) for share in shares} for key, shares in distances.items()}
            orders.append({"order": same[0]["order"], **spreads})
        layers.append({key: several[0][key] for key in ("layer", "op", "shape", "voxel_mm")} | {"orders": orders})
    checks = {
        method: {
            "rank_correlation": {of: spread(case["sanity"]["rank_correlation"][method][of] for case in cases) for of in ("values", "sizes")},
            "area": spread(case["sanity"]["deletion"][method]["area"] for case in cases),
            "random_area": spread(case["sanity"]["deletion"][method]["random_area"] for case in cases),
            "faster_than_random": sum(c["sanity"]["deletion"][method]["area"] < c["sanity"]["deletion"][method]["random_area"] for c in cases),
        }
        for method in METHODS
    }
    residues = spread(case["integrated gradients"]["residue_share"] for case in cases)
    return {"probability": spread(case["probability"] for case in cases), "residue_share": residues, "sanity": checks, "reach": layers}


def spread(values: Iterable[float]) -> dict[str, float]:
    """The mean, the least and the most, to four digits."""
    found = list(values)
    return {name: float(f"{value:.4g}") for name, value in (("mean", statistics.fmean(found)), ("least", min(found)), ("most", max(found)))}


if __name__ == "__main__":
    main()
