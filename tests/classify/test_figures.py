"""The figures of a classifier, against torchmetrics and by hand."""

import numpy as np
import pytest
import torch
from torchmetrics import functional as metrics

from medssm.classify.calibration import cross_scaled, scaled, temperature
from medssm.classify.figures import confusion, figures, recalls, reliability, weighted


def drawn(n: int = 300, classes: int = 4, seed: int = 0):
    random = np.random.default_rng(seed)
    labels = random.integers(classes, size=n)
    logits = torch.from_numpy(random.normal(size=(n, classes)) + 1.5 * np.eye(classes)[labels])
    probabilities = (logits * 4).round().div(4).softmax(1).numpy()  # rounded: ties
    return labels, probabilities


def test_they_are_those_of_torchmetrics():
    labels, probabilities = drawn()
    value = {name: figure["value"] for name, figure in figures(labels, probabilities, ["one"] * len(labels)).items()}
    target, predicted, options = torch.from_numpy(labels), torch.from_numpy(probabilities), {"task": "multiclass", "num_classes": 4}
    assert value["accuracy"] == pytest.approx(metrics.accuracy(predicted, target, average="micro", **options).item(), abs=1e-6)
    assert value["balanced_accuracy"] == pytest.approx(metrics.accuracy(predicted, target, average="macro", **options).item(), abs=1e-6)
    assert value["f1"] == pytest.approx(metrics.f1_score(predicted, target, average="macro", **options).item(), abs=1e-6)
    assert value["auroc"] == pytest.approx(metrics.auroc(predicted, target, average="macro", **options).item(), abs=1e-6)
    assert value["ece"] == pytest.approx(metrics.calibration_error(predicted, target, n_bins=15, norm="l1", **options).item(), abs=1e-6)
    assert value["nll"] == pytest.approx(torch.nn.functional.nll_loss(predicted.log(), target).item(), abs=1e-9)
    assert confusion(labels, probabilities.argmax(1), 4) == metrics.confusion_matrix(predicted, target, **options).tolist()


def test_by_hand():
    labels = np.array([0, 0, 0, 1])
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]])
    value = {name: figure["value"] for name, figure in figures(labels, probabilities, list("abcd")).items()}
    assert value["accuracy"] == 0.75 and value["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert value["auroc"] == 1.0 and value["f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    # bins of 1/15: 0.9, 0.8 and 0.7 are right, 0.6 is wrong; each is alone in its bin
    assert value["ece"] == pytest.approx((0.1 + 0.2 + 0.6 + 0.3) / 4)
    assert recalls(labels, probabilities.argmax(1), ["a", "b", "c"]) == {"a": pytest.approx(2 / 3), "b": 1.0}
    assert [row["n"] for row in reliability(labels, probabilities)] == [1, 1, 1, 1]
    bounds = [(row["low"], row["high"]) for row in reliability(np.array([0, 0]), np.array([[1.0, 0.0], [0.8, 0.2]]))]
    assert bounds == [pytest.approx((11 / 15, 12 / 15)), pytest.approx((14 / 15, 1.0))]  # an edge belongs to the bin below it


def test_an_image_that_counts_twice_is_as_two_images():
    labels, probabilities = drawn(60)
    times = np.random.default_rng(1).integers(0, 3, 60)
    twice = {name: value[0] for name, value in weighted(labels, probabilities, times[None].astype(float)).items()}
    repeated = np.repeat(np.arange(60), times)
    for name, figure in figures(labels[repeated], probabilities[repeated], ["one"] * len(repeated)).items():
        assert twice[name] == pytest.approx(figure["value"], abs=1e-12), name


def test_intervals_are_over_groups():
    """Twenty copies of ten images are no more evidence than the ten."""
    labels, probabilities = drawn(10, 2)
    groups = [f"g{i}" for i in range(10)]
    once = figures(labels, probabilities, groups)["accuracy"]
    copies = figures(np.tile(labels, 20), np.tile(probabilities, (20, 1)), groups * 20)["accuracy"]
    alone = figures(np.tile(labels, 20), np.tile(probabilities, (20, 1)), [f"g{i}" for i in range(200)])["accuracy"]
    assert (once["low"], once["high"]) == (copies["low"], copies["high"])
    assert alone["high"] - alone["low"] < 0.5 * (once["high"] - once["low"])
    assert figures(labels, probabilities, ["a", "b", "c", "d", "d", "d", "d", "d", "d", "d"])["accuracy"]["low"] is None


def test_the_interval_of_the_accuracy_is_that_of_the_binomial():
    labels = np.zeros(400, int)
    right = np.arange(400) % 10 != 0
    accuracy = figures(labels, np.where(right[:, None], [[0.8, 0.2]], [[0.3, 0.7]]), [str(i) for i in range(400)])["accuracy"]
    spread = 1.96 * (0.9 * 0.1 / 400) ** 0.5
    assert accuracy["low"] == pytest.approx(0.9 - spread, abs=0.006) and accuracy["high"] == pytest.approx(0.9 + spread, abs=0.006)


def test_a_class_that_no_image_has_counts_in_no_mean():
    value = figures(np.array([0, 1]), np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]]), ["a", "b"])
    assert value["balanced_accuracy"]["value"] == 1.0 and value["f1"]["value"] == 1.0 and value["auroc"]["value"] == 1.0
    assert figures(np.array([0, 0]), np.array([[0.8, 0.2], [0.6, 0.4]]), ["a", "b"])["auroc"] == {"value": None, "low": None, "high": None}


def sharpened(factor: float, n: int = 20_000):
    """Labels drawn from softmax(z), and the logits factor * z."""
    random = np.random.default_rng(0)
    logits = torch.from_numpy(random.normal(size=(n, 3)) * 1.5)
    labels = torch.multinomial(logits.softmax(1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    return factor * logits, labels


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_temperature_finds_a_known_factor(factor):
    logits, labels = sharpened(factor)
    assert temperature(logits, labels) == pytest.approx(factor, rel=0.03)


def test_temperature_calibrates_and_changes_no_class():
    logits, labels = sharpened(3.0)
    groups = [str(i // 2) for i in range(len(labels))]
    before = scaled(logits, 1.0)
    after = cross_scaled(logits, labels, groups, seed=0)
    assert (before.argmax(1) == after.argmax(1)).all()
    ece = [figures(labels.numpy(), table, ["one"] * len(labels))["ece"]["value"] for table in (before, after)]
    assert ece[0] > 0.1 and ece[1] < 0.015
    assert cross_scaled(logits, labels, ["one"] * len(labels), seed=0) is None


def test_a_half_is_judged_with_the_temperature_of_the_other_one():
    """Half of the groups are twice as sharp; each half gets what fits the other one."""
    logits, labels = sharpened(1.0, 4000)
    groups = [f"g{i // 4}" for i in range(4000)]
    from medssm.classify.folds import assign

    half = torch.tensor(assign([str(label) for label in labels.tolist()], groups, 2, 0))
    logits = torch.where(half[:, None] == 1, 2 * logits, logits)
    found = cross_scaled(logits, labels, groups, seed=0)
    ones, zeros = half == 1, half == 0
    np.testing.assert_allclose(found[ones], scaled(logits[ones], temperature(logits[zeros], labels[zeros])))
    np.testing.assert_allclose(found[zeros], scaled(logits[zeros], temperature(logits[ones], labels[ones])))


def test_a_few_right_answers_are_no_certainty():
    """Where nothing is wrong the NLL alone has no minimum: T would be 0 and every probability 1."""
    logits, labels = 4 * torch.eye(3)[torch.arange(30) % 3], torch.arange(30) % 3
    t = temperature(logits, labels)
    assert 0.3 < t < 0.8 and scaled(logits, t).max() < 0.9999
    nearby = [30 * torch.nn.functional.cross_entropy(logits / value, labels).item() + np.log(value) ** 2 / 2 for value in (0.99 * t, t, 1.01 * t)]
    assert nearby[1] == min(nearby)
    assert 1 < temperature(logits, (labels + 1) % 3) < 1000
