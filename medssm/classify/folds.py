"""Folds of groups, with the classes spread evenly: all images of a group are in one part."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from medssm.classify.table import Sample, groups_by_class
from medssm.errors import UserError


def split(samples: Sequence[Sample], fold: int | None, folds: int, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(training, held out); no fold trains on all.

    Raises UserError where there are fewer groups than folds, of all images or of a class, or there is no such fold.
    """
    if fold is None:
        return list(samples), []
    units = {sample.unit for sample in samples}
    what = "images" if samples[0].group is None else "groups"
    if not 2 <= folds <= len(units):
        raise UserError(f"folds: expected 2 to {len(units)} (the number of {what}), got {folds}")
    if not 0 <= fold < folds:
        raise UserError(f"fold: expected 0 to {folds - 1}, got {fold}")
    for name, count in groups_by_class(samples).items():
        if count < folds:
            raise UserError(
                f"folds: the class {name} has {count} {what[:-1] if count == 1 else what}, fewer than the {folds} folds: fewer folds, or --fold null"
            )
    parts = assign([str(sample.label) for sample in samples], [sample.unit for sample in samples], folds, seed)
    sides: tuple[list[Sample], list[Sample]] = ([], [])
    for sample, part in zip(samples, parts, strict=True):
        sides[part == fold].append(sample)
    for name in groups_by_class(samples):
        for side, which in zip(sides, ("to train on", "held out"), strict=True):
            if name not in groups_by_class(side):
                raise UserError(f"folds: fold {fold} of {folds} leaves no image of the class {name} {which}: another --seed, or fewer folds")
    return sides


def assign(labels: Sequence[str], groups: Sequence[str], parts: int, seed: int) -> list[int]:
    """For each image its part, 0 to parts - 1. A group is in one part, whatever its images.

    The groups, those of the most uneven classes first and equal ones in an order that the seed draws, go one by one where they leave the shares of
    the classes most even over the parts; the rule is that of scikit-learn's StratifiedGroupKFold. The order of the images changes nothing.
    """
    classes = {name: i for i, name in enumerate(sorted(set(labels)))}
    counts: dict[str, np.ndarray] = {group: np.zeros(len(classes)) for group in sorted(set(groups))}
    for label, group in zip(labels, groups, strict=True):
        counts[group][classes[label]] += 1
    names = list(counts)
    random.Random(seed).shuffle(names)
    names.sort(key=lambda name: -counts[name].std())
    total, sums, part_of = sum(counts.values()), np.zeros((parts, len(classes))), {}
    for name in names:
        uneven = []
        for part in range(parts):
            shares = sums / total
            shares[part] += counts[name] / total
            uneven.append((round(float(shares.std(0).mean()), 12), sums[part].sum(), part))
        part_of[name] = min(uneven)[2]
        sums[part_of[name]] += counts[name]
    return [part_of[group] for group in groups]
