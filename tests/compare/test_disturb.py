"""Disturbed scans: noise, a bias field, thick slices."""

import json
import sys

import numpy as np
import pytest

from medssm.compare import disturb, figures
from medssm.compare.cost import alone, calibration
from medssm.errors import UserError
from medssm.segment.cases import Case
from medssm.segment.images import read_image
from tests.segment.synthetic import write

EDGES = (1.0, 1.0, 1.0)


@pytest.fixture
def image():
    return np.random.default_rng(0).uniform(100, 300, (2, 20, 18, 16)).astype(np.float32)


@pytest.mark.parametrize("kind", disturb.KINDS)
def test_a_seed_gives_one_disturbance(image, kind):
    one, same, other = (disturb.disturbed(image, EDGES, kind, seed) for seed in (1, 1, 2))
    assert one.dtype == np.float32 and one.shape == image.shape and not np.array_equal(one, image)
    np.testing.assert_array_equal(one, same)
    assert np.array_equal(one, other) == (kind == "thick-slices")


def test_noise_is_a_twentieth_of_each_channels_range(image):
    image[1] *= 10
    noise = disturb.disturbed(image, EDGES, "noise", 0) - image
    for channel, added in zip(image, noise, strict=True):
        low, high = np.percentile(channel, (0.5, 99.5))
        assert added.std() == pytest.approx(0.05 * (high - low), rel=0.03) and abs(added.mean()) < 0.1 * added.std()


def test_a_bias_field_is_the_exponential_of_a_cubic_for_all_channels(image):
    field = np.log(disturb.disturbed(image, EDGES, "bias-field", 0) / image)
    np.testing.assert_allclose(field[0], field[1], atol=1e-5)
    for axis in (1, 2, 3):
        assert np.abs(np.diff(field, 4, axis=axis)).max() < 1e-4 < np.abs(np.diff(field, 1, axis=axis)).max()
    assert 0.05 < field.std() < 2


def test_thick_slices_are_means_of_three_along_the_widest_spacing():
    profile = np.array([1.0, 5, 3, 9, 2, 4, 8, 8, 2], np.float32)
    image = np.broadcast_to(profile[None, None, :, None], (1, 4, 9, 5)).copy()
    found = disturb.disturbed(image, (1.0, 3.0, 1.0), "thick-slices", 0)
    np.testing.assert_allclose(found, np.broadcast_to(found[:, :1, :, :1], found.shape), atol=1e-6)
    low, middle, high = 3.0, 5.0, 6.0
    wanted = [low, low, low + 2 / 3, low + 4 / 3, middle, middle + 1 / 3, middle + 2 / 3, high, high]
    np.testing.assert_allclose(found[0, 0, :, 0], wanted, atol=1e-5)
    last = disturb.disturbed(np.moveaxis(image, 2, 3), EDGES, "thick-slices", 0)  # of equal spacings the last axis
    np.testing.assert_allclose(last[0, 0, 0], wanted, atol=1e-5)
    with pytest.raises(UserError, match=r"disturb: thick-slices: expected a volume, got one slice of 4 x 9 voxels"):
        disturb.disturbed(image[..., :1], (1.0, 1.0, 5.0), "thick-slices", 0)


def test_scans_are_written_on_their_own_grid(tmp_path):
    affine, random = np.diag([2.0, 1.5, 3.0, 1.0]), np.random.default_rng(0)
    files = [write(tmp_path / f"a_{i:04d}.nii.gz", random.uniform(0, 9, (6, 5, 7)).astype(np.float32), affine) for i in range(2)]
    bad = write(tmp_path / "b.nii.gz", np.full((6, 5, 7), np.nan, np.float32), affine)
    listed, failed = disturb.write([Case("a", tuple(files)), Case("b", (bad, bad))], 2, "noise", tmp_path / "scans", 0)
    (entry,) = json.loads(listed.read_text())[disturb.SECTION]
    data, image = read_image([listed.parent / entry["image"]], 2)
    assert entry["name"] == "a" and list(failed) == ["b"] and "finite" in failed["b"] and data.shape == (2, 6, 5, 7)
    np.testing.assert_allclose(image.affine, affine)
    again, _ = disturb.write([Case("a", tuple(files))], 2, "noise", tmp_path / "again", 0)
    np.testing.assert_array_equal(read_image([json.loads(again.read_text())[disturb.SECTION][0]["image"]])[0], data)
    with pytest.raises(UserError, match=r"b.nii.gz.*finite"):
        disturb.write([Case("b", (bad, bad))], 2, "noise", tmp_path / "none", 0)


def test_calibration_error_of_known_probabilities(tmp_path):
    """Half of the voxels are of the class, and all are given 0.8: an error of 0.3. Those of the ignored value do not count."""
    truth = np.zeros((4, 4, 4), np.uint8)
    truth[:2], truth[3] = 1, 9
    truth[2, 0] = 0
    share = 32 / 48
    p = np.full((*truth.shape, 2), 0.0, np.float32)
    p[..., 1], p[..., 0] = 0.8, 0.2
    write(tmp_path / "reference" / "a.nii.gz", truth)
    write(tmp_path / "found" / "a.nii.gz", np.ones_like(truth))
    write(tmp_path / "found" / "a_probabilities.nii.gz", p)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "one": 1, "ignore": 9}}))
    found = calibration(tmp_path, {"a": tmp_path / "found" / "a.nii.gz"}, {"a": tmp_path / "reference" / "a.nii.gz"}, None)
    assert found == {name: pytest.approx(0.8 - share, abs=1e-6) for name in ("ece", "ece_unsure")}
    assert not (tmp_path / "found" / "a_probabilities.nii.gz").exists()


def test_a_process_alone_is_measured():
    code = "import os, time; x = b'1' * (200 * 2**20); time.sleep(0.3); print(os.environ['SAID'])"
    printed, seconds, memory = alone([sys.executable, "-c", code], {"SAID": "yes"})
    assert printed == "yes\n" and 0.3 < seconds < 60 and (memory is None or 200 * 2**20 < memory < 280 * 2**20)
    held = np.ones(2**26)  # 512 MiB of this process are none of the other one's
    *_, memory = alone([sys.executable, "-c", "pass"])
    assert held.all() and (memory is None or 2**20 < memory < 2**26)
    with pytest.raises(UserError, match=r"(?s)failed: .*ZeroDivisionError"):
        alone([sys.executable, "-c", "1 / 0"])


def test_the_front_has_what_nothing_else_beats():
    assert figures.front([(1, 0.5), (2, 0.4), (2, 0.9), (3, 0.9), (0.5, 0.5)]) == [4, 2]
