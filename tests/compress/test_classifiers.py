"""medssm compress of classifiers: pruned, in low rank, taught, in 8 bits; predicted like any other."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from medssm import cli
from medssm.classify import calibration
from medssm.classify.images import Fitted, prepared
from medssm.classify.predict import predict
from medssm.classify.predictions import read_predictions
from medssm.classify.train import train
from medssm.classify.validation import logits_of
from medssm.compress.command import compress
from medssm.errors import UserError
from medssm.segment import networks
from medssm.segment.distil import Distillation
from tests.classify.pictures import folder

KWARGS = {"features": [32, 64], "depths": [1, 1], "decoder_depths": [1], "mixer": "linear_attention", "strides": [2, 2]}
CPU = torch.device("cpu")
FAST = {"max_steps": 4, "batch": 8, "folds": 4, "validations": 1, "device": "cpu", "precision": "32-true", "quiet": True}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("cells"))


@pytest.fixture(scope="module")
def classifier(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    train(pictures, out, model="medssm_unet", model_kwargs=KWARGS, **FAST)
    return out


def logits(run):
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return networks.load(run).eval()(x)


def test_a_pruned_classifier_is_a_run_like_any_other(classifier, pictures, tmp_path, capsys):
    out = tmp_path / "small"
    words = [
        "compress",
        classifier,
        out,
        "--prune",
        "0.5",
        "--low-rank",
        "0.7",
        "--distil",
        classifier,
        "--steps",
        "2",
        "--batches",
        "2",
        "--multiple",
        "8",
    ]
    assert cli.main(list(map(str, words))) == 0
    assert "balanced accuracy of held-out images" in capsys.readouterr().out
    result = json.loads((out / "compression.json").read_text())
    assert result["steps"] == ["prune", "factorize"] and result["after"]["multiply_adds"] <= 0.5 * result["before"]["multiply_adds"]
    assert result["after"]["parameters"] == sum(p.numel() for p in networks.load(out).parameters()) < result["before"]["parameters"]
    for name in ("cases.json", "fitted.json"):
        assert json.loads((out / name).read_text()) == json.loads((classifier / name).read_text())
    found = predict(out, sorted((pictures / "disc").iterdir())[0], tmp_path / "found.csv", device="cpu", quiet=True)
    (row,) = found["images"].values()
    assert sum(row["probabilities"].values()) == pytest.approx(1) and found["temperature"][0] > 0
    assert (out / "calibration.json").is_file() and f"distil: {classifier}" in (out / "train.yaml").read_text()
    assert train(pictures, out, resume=True, quiet=True)["steps"] == 2


def test_eight_bits_and_low_rank_without_training(classifier, tmp_path):
    result = compress(classifier, tmp_path / "int8", int8=True, batches=1, quiet=True)
    one, two = logits(tmp_path / "int8"), logits(classifier)
    assert result["steps"] == ["int8"] and result["after"]["file"] < 0.6 * result["before"]["file"]
    assert 0 < (one - two).abs().max() < 0.2 * two.std()
    assert (tmp_path / "int8/calibration.json").is_file()
    with pytest.raises(UserError, match=r"^start: its network has the step int8, which is for inference alone"):
        train("nowhere", tmp_path / "no", start=tmp_path / "int8")
    compress(classifier, tmp_path / "low", low_rank=0.5, steps=0, quiet=True)
    assert not (tmp_path / "low/calibration.json").exists()  # the temperature is of another network


def test_figures_and_predictions_are_those_of_the_8_bit_network(classifier, tmp_path):
    """After training and without it."""
    before = json.loads((classifier / "figures.json").read_text())["uncalibrated"]["nll"]
    for name, options in (("untrained", {}), ("trained", {"prune": 0.7, "criterion": "magnitude", "multiple": 8, "steps": 1})):
        out = tmp_path / name
        result = compress(classifier, out, int8=True, batches=1, quiet=True, **options)
        scores, end = json.loads((out / "figures.json").read_text()), json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["finished"]
        cases = json.loads((out / "cases.json").read_text())["validation"]
        network = networks.load(out).eval()
        logits = logits_of(network, [prepared(Path(case["image"]), Fitted.load(out / "fitted.json")) for case in cases], range(len(cases)), CPU)
        labels = torch.tensor([scores["classes"].index(case["label"]) for case in cases])
        assert scores["temperature"] == pytest.approx(calibration.temperature(logits, labels)) == pytest.approx(end["temperature"])
        assert scores["temperature"] == json.loads((out / "calibration.json").read_text())["temperature"]["last"]
        assert sum(scores["confusion"][i][i] for i in range(3)) == int((logits.argmax(1) == labels).sum())
        nll = float(torch.nn.functional.cross_entropy(logits, labels))
        assert scores["uncalibrated"]["nll"] == pytest.approx(nll, abs=1e-6) != pytest.approx(before, abs=1e-6)
        found = read_predictions(out / "predictions.csv")
        assert [sample.path for sample in found[0]] == [Path(case["image"]) for case in cases]
        assert result["validation"] == end["validation"] and result["measured"] and end["best"]["mean"] == end["validation"]["mean"]
        assert not (out / "report.html").exists() and not (out / "model_best.safetensors").exists()


def test_what_cannot_be_compressed_is_one_clear_line(classifier, pictures, tmp_path):
    def refused(message, run=classifier, **options):
        with pytest.raises(UserError, match=message):
            compress(run, tmp_path / "out", **{"prune": 0.5, "criterion": "magnitude", "steps": 1, "quiet": True, **options})
        assert not (tmp_path / "out").exists()

    refused(r"^data: .*: expected the 36 training images of .*, got 9: ", data=folder(tmp_path / "fewer", groups=4, each=1))
    refused(
        r"^dataset: expected the classes that the network was trained for, bar, dark, disc, got dark, disc",
        data=folder(tmp_path / "two", classes=("disc", "dark")),
    )
    teacher = tmp_path / "teacher"
    shutil.copytree(classifier, teacher)
    cases = json.loads((teacher / "cases.json").read_text())
    (teacher / "cases.json").write_text(json.dumps({"training": cases["training"] + cases["validation"], "validation": []}))
    refused(r"^distil: .* was trained on 12 of the images that are held out, ", distil=teacher)
    fitted = json.loads((teacher / "fitted.json").read_text())
    (teacher / "fitted.json").write_text(json.dumps({**fitted, "shape": [16, 16]}))
    refused(r"^distil: expected a teacher with the shape \(32, 32\), got \(16, 16\)", distil=teacher)
    other, dense = tmp_path / "other", {"init_features": 8, "growth_rate": 8, "block_config": [1, 1]}
    train(pictures, other, model="monai.networks.nets.DenseNet", model_kwargs=dense, **{**FAST, "max_steps": 1})
    refused(r"^prune: DenseNet does not say which of its channels belong together", run=other)


def test_a_classifier_learns_from_a_teachers_logits():
    """The loss is that of the labels, and temperature^2 KL(teacher || student), the mean over the images."""
    student, teacher = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    loss = Distillation(torch.nn.CrossEntropyLoss(), student, teacher, temperature=2.0)
    x, label = torch.rand(5, 4), torch.eye(3)[[0, 1, 2, 0, 1]]
    output = student(x)
    p, q = (teacher(x) / 2).softmax(1), (output / 2).softmax(1)
    wanted = torch.nn.functional.cross_entropy(output, label) + 4 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(loss(output, label), wanted)
