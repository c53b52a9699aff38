"""Cine MRI of 45 hearts, each slice with its left ventricle, as a data set of pictures with a split by patients.

    python docs/examples/sunnybrook.py sunnybrook_lv.npz Dataset002_LeftVentricle
    medssm train Dataset002_LeftVentricle run --spatial-dims 2 --splits Dataset002_LeftVentricle/splits_final.json --fold 0

The file holds the Sunnybrook cardiac data (Cardiac Atlas Project, CC0), 420 slices of 64 x 64: `images` and `segs` (slices, rows, columns),
`caseIndices` (a patient's first slice, and the first one after its last), `caseVoxelSize` (x, y, z of each slice in millimetres), `caseCat` (kind of
heart of each slice). Every patient is in one of five parts, and every kind of heart is spread over the parts.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

FOLDS = 5


def write(source: Path, out: Path, seed: int = 0) -> dict[str, list[str]]:
    """Write the data set; returns {patient: its cases}."""
    data = np.load(source)
    for folder in ("imagesTr", "labelsTr"):
        (out / folder).mkdir(parents=True)
    cases: dict[str, list[str]] = {}
    kinds: dict[int, list[str]] = defaultdict(list)
    for number, (first, after) in enumerate(data["caseIndices"]):
        patient = f"patient{number:02d}"
        kinds[int(data["caseCat"][first])].append(patient)
        cases[patient] = [f"{patient}_slice{i:02d}" for i in range(after - first)]
        for name, i in zip(cases[patient], range(first, after), strict=True):
            Image.fromarray(data["images"][i]).save(out / "imagesTr" / f"{name}_0000.png")
            Image.fromarray(data["segs"][i].astype(np.uint8)).save(out / "labelsTr" / f"{name}.png")
            spacing = json.dumps({"spacing": data["caseVoxelSize"][i, ::-1].tolist()})
            for folder in ("imagesTr", "labelsTr"):
                (out / folder / f"{name}.json").write_text(spacing)
    description = {
        "name": "LeftVentricle",
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "ventricle": 1},
        "numTraining": sum(map(len, cases.values())),
        "file_ending": ".png",
    }
    (out / "dataset.json").write_text(json.dumps(description, indent=1))
    dealt = [patient for kind in sorted(kinds) for patient in random.Random(seed).sample(kinds[kind], len(kinds[kind]))]
    parts = [dealt[i::FOLDS] for i in range(FOLDS)]
    splits = [
        {
            "train": [name for patient in sorted(cases) if patient not in part for name in cases[patient]],
            "val": [name for patient in sorted(part) for name in cases[patient]],
        }
        for part in parts
    ]
    (out / "splits_final.json").write_text(json.dumps(splits))
    return cases


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="sunnybrook_lv.npz")
    parser.add_argument("out", type=Path, help="folder to make")
    given = parser.parse_args()
    found = write(given.source, given.out)
    print(f"{given.out}: {sum(map(len, found.values()))} slices of {len(found)} patients")
