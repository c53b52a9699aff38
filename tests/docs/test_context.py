"""docs/examples/context.py: the marker alone decides, runs go on, and the page's tables are those of the committed results."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("monai")

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "bench/results/accuracy-context", ROOT / "docs/context.md"
EVERY = [(task, distance) for task, distances in (("kind", (7, 17, 27)), ("side", (7, 27))) for distance in distances]


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs/examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


context, results = script("context"), script("context_results")


def both(task, distance, seed, dims=2):
    """The two pictures of one draw."""
    return [context.draw(task, distance, kind, np.random.default_rng(seed), dims) for kind in (1, 2)]


@pytest.mark.parametrize(("task", "distance"), EVERY)
def test_the_two_kinds_differ_in_the_markers_alone(task, distance):
    for seed, dims in ((0, 2), (1, 2), (2, 3)):
        one, two = both(task, distance, seed, dims)
        assert np.array_equal(one.label > 0, two.label > 0) and set(np.unique(one.label)) == {0, 1} and set(np.unique(two.label)) == {0, 2}
        changed = np.argwhere(one.image != two.image)
        nearest = np.min([np.abs(changed - at).max(1) for at in one.markers], 0)
        assert len(changed) and nearest.max() <= context.EDGE
        assert len(one.markers) == (1 if task == "kind" else 2)


@pytest.mark.parametrize(("task", "distance"), EVERY)
def test_markers_are_as_far_as_asked(task, distance):
    for seed in range(20):
        one = context.draw(task, distance, 1, np.random.default_rng(seed))
        assert [np.linalg.norm(at - one.disc) for at in one.markers] == pytest.approx([distance] * len(one.markers), abs=0.75)
        assert one.label[tuple(one.disc)] == 1 and (one.label > 0).sum() == 29


def test_pictures_depend_on_the_seed_alone():
    for same, different in zip(context.batch("kind", 4, 0, 3), context.batch("kind", 4, 0, 4), strict=True):
        assert same.shape == (4, 1, 32, 32) and not torch.equal(same, different)
    first, again = context.batch("side", 4, 7, 3, patch=16), context.batch("side", 4, 7, 3, patch=16)
    assert all(map(torch.equal, first, again)) and first[0].shape == (4, 1, 16, 16)
    assert (first[1] > 0).flatten(1).sum(1).tolist() == [29] * 4  # the whole disc in every part
    assert all(map(torch.equal, context.tests("kind", 7, 3), context.tests("kind", 7, 5))) is False
    assert torch.equal(context.tests("kind", 7, 3)[0], context.tests("kind", 7, 5)[0][:3])


def test_the_class_is_that_of_the_first_marker():
    """On task "side" both pictures hold the same, a bright and a dark square; they have changed places."""
    for one in both("side", 17, 5):
        brightness = [one.image[context._box(at)].mean() for at in one.markers]
        assert brightness == pytest.approx([2, -2] if one.label.max() == 1 else [-2, 2], abs=0.3)
        assert one.markers[0][1] < one.disc[1] < one.markers[1][1] and one.markers[0][0] == one.markers[1][0]


def right_by_least_squares(crops: np.ndarray, kinds: np.ndarray) -> float:
    """The share that a linear classifier names rightly of the second half, fitted on the first."""
    x = np.hstack([crops.reshape(len(crops), -1), np.ones((len(crops), 1))])
    half = len(x) // 2
    fitted = np.linalg.solve(x[:half].T @ x[:half] + 10 * np.eye(x.shape[1]), x[:half].T @ (2.0 * kinds[:half] - 3))
    return float(((x[half:] @ fitted > 0) == (kinds[half:] == 2)).mean())


def test_what_lies_about_the_disc_says_nothing_and_the_marker_all():
    kinds = np.arange(1200) % 2 + 1
    drawn = [context.draw("kind", 17, kind, np.random.default_rng(i)) for i, kind in enumerate(kinds)]

    def crops(radius, centre):
        padded = [np.pad(one.image, 16) for one in drawn]
        return np.stack(
            [image[tuple(slice(c + 16 - radius, c + 17 + radius) for c in centre(one))] for one, image in zip(drawn, padded, strict=True)]
        )

    assert right_by_least_squares(crops(8, lambda one: one.disc), kinds) == pytest.approx(0.5, abs=0.08)  # three standard errors
    assert right_by_least_squares(crops(2, lambda one: one.markers[0]), kinds) > 0.95


def test_a_network_sees_as_far_as_its_kernels_reach():
    """Two 3 x 3 convolutions are a reach of 2 pixels; the network's is by the gradient what its kernels and strides add up to."""
    two = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.Conv2d(2, 3, 3, padding=1))
    assert context.field(two, 2) == 2
    assert context.field(context.NETWORKS["none"](2), 2) == 13 and context.field(context.NETWORKS["ss_nd"](2), 2) == 96


def test_convolutions_do_at_least_as_many_multiply_adds_as_any_mixer():
    measured = set(context.MIXERS) - {"kda", "gdn2", "rwkv7", "mamba3"}  # these are not in the page's tables
    cost = {name: context.multiply_adds(context.NETWORKS[name](2), torch.zeros(1, 1, 48, 48)) for name in (*measured, "conv")}
    assert cost["conv"] == max(cost.values())


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setattr(context, "SAVE", 2)
    monkeypatch.setitem(context.DISTANCES, "kind", (7, 17))
    options = {"network": "none", "task": "kind", "seed": 3, "steps": 5, "size": 2, "count": 2}
    whole = context.run(tmp_path / "whole.json", **options)
    drawn = context.batch

    def stops(task, size, seed, step, *others):
        if step == 3:
            raise KeyboardInterrupt
        return drawn(task, size, seed, step, *others)

    monkeypatch.setattr(context, "batch", stops)
    with pytest.raises(KeyboardInterrupt):
        context.run(tmp_path / "stopped.json", **options)
    assert not (tmp_path / "stopped.json").exists() and (tmp_path / "stopped.pt").exists()
    monkeypatch.setattr(context, "batch", drawn)
    resumed = context.run(tmp_path / "stopped.json", **options)
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped.json", "whole.json"]
    monkeypatch.setattr(context, "batch", None)  # a run that is there is not run again
    assert context.run(tmp_path / "whole.json", **options) == json.loads((tmp_path / "whole.json").read_text())


def made_up(names: list[list[int]], distance: str = "8") -> "results.Group":
    """Runs that find each disc of 49 pixels and give it these names, one list for each seed."""
    runs = []
    for seed, given in enumerate(names):
        true = [1 + i % 2 for i in range(len(given))]
        columns = {
            "as1": [49 * (name == 1) for name in given],
            "as2": [49 * (name == 2) for name in given],
            "right": [49 * (name == kind) for name, kind in zip(given, true, strict=True)],
            "disc": [49] * len(given),
            "named": [int(name == kind) for name, kind in zip(given, true, strict=True)],
        }
        runs.append({"seed": seed, "tests": {"whole": {distance: {key: " ".join(map(str, column)) for key, column in columns.items()}}}})
    return results.Group(runs)


def test_dice_is_1_for_right_names_and_half_for_coins():
    right, alike = made_up([[1, 2] * 50] * 2), made_up([[1, 1, 2, 2] * 25] * 2)
    assert results.interval(right.scores(8)["dice"]) == results.interval(right.scores(8)["named"]) == (1, 1, 1)
    value, low, high = results.interval(alike.scores(8)["dice"])
    assert value == 0.5 and 0.35 < low < 0.45 and 0.55 < high < 0.65
    assert results.interval(made_up([[1] * 100]).scores(8)["dice"])[0] == pytest.approx(1 / 3)  # one name for all
    assert right.from_distance(alike) == 8 and alike.from_distance(right) is None


def test_the_tables_of_the_page_are_those_of_the_results():
    assert results.filled(PAGE.read_text(), results.read(RESULTS)) == PAGE.read_text()
