"""medssm train --task classify: what it writes, a stop and a resumption, volumes, other libraries' networks, and what goes wrong."""

import csv
import json
import os
import signal
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from torch import nn

from medssm import cli, options, tasks
from medssm.classify.samples import Samples
from medssm.classify.train import train
from medssm.errors import UserError
from medssm.segment import networks
from medssm.segment.loop import Interrupted
from medssm.segment.train import train as train_to_segment
from tests.classify.pictures import SMALL, folder, volumes
from tests.segment.browser import needs_browser, screenshot
from tests.segment.synthetic import nnunet_folder

FAST = {"model_kwargs": SMALL, "max_steps": 4, "batch": 4, "folds": 4, "validations": 1, "device": "cpu", "precision": "32-true", "quiet": True}


def read(path):
    return json.loads(path.read_text())


def weights(out):
    return safetensors.torch.load_file(out / "model.safetensors")


def test_the_command_writes_what_it_says(runs):
    out = runs / "fold_0"
    assert {file.name for file in out.iterdir()} == {
        "model.safetensors",
        "model_best.safetensors",
        "calibration.json",
        "config.json",
        "fitted.json",
        "cases.json",
        "figures.json",
        "predictions.csv",
        "train.yaml",
        "metrics.jsonl",
        "curves.png",
        "report.html",
    }
    config, fitted = read(out / "config.json"), read(out / "fitted.json")
    assert config["model"] == "vmamba" and config["kwargs"] == {"spatial_dims": 2, "in_channels": 3, "out_channels": 3, **SMALL}
    assert fitted["task"] == "classify" and fitted["classes"] == ["bar", "dark", "disc"] and fitted["shape"] == [32, 32]
    finished = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["finished"]
    assert finished["steps"] == 40 and finished["validation"]["mean"] > 0.8
    assert finished["figures"]["balanced_accuracy"]["value"] == pytest.approx(finished["validation"]["mean"])
    assert np.sum(finished["confusion"]) == finished["validation_images"] == 12


def test_no_group_is_on_two_sides(runs, cells):
    held_out = []
    for fold in range(2):
        cases = read(runs / f"fold_{fold}" / "cases.json")
        sides = [{entry["group"] for entry in cases[side]} for side in ("training", "validation")]
        assert not sides[0] & sides[1] and len(sides[1]) == 2 and all(os.path.exists(entry["image"]) for entry in cases["training"])
        held_out.append(sides[1])
    assert not held_out[0] & held_out[1]


def test_what_is_written_belongs_together(runs):
    """figures.json is of predictions.csv, and its labels are those of cases.json."""
    out = runs / "fold_0"
    with open(out / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    truth = {entry["image"]: entry["label"] for entry in read(out / "cases.json")["validation"]}
    right = [row["label"] == truth[row["path"]] for row in rows]
    assert np.mean(right) == pytest.approx(read(out / "figures.json")["figures"]["accuracy"]["value"])
    assert list(rows[0]) == ["path", "group", "label", "p_bar", "p_dark", "p_disc"]
    table = read(out / "calibration.json")
    assert 0 < table["temperature"]["last"] < 20 and set(table["temperature"]) == {"last", "best"} and table["images"] == 12
    assert table["temperature"]["last"] == read(out / "figures.json")["temperature"]


def test_the_report(runs, tmp_path):
    text = (runs / "fold_0" / "report.html").read_text()
    assert "Worst images first" in text and text.count("<figcaption>") == 12 and "Reliability plot" in text and "max_steps: 40" in text
    own = [float(part.split("</b> ")[1][:5]) for part in text.split("<figcaption>")[1:]]
    assert own == sorted(own)
    assert 'src="data:image/' in text and "http" not in text.replace("http-equiv", "")


@needs_browser
def test_a_browser_shows_the_report(runs, tmp_path):
    seen = screenshot(runs / "fold_0" / "report.html", tmp_path, height=2600)
    rows = seen.reshape(seen.shape[0], -1, 3).astype(int)
    blue = (abs(rows - np.array([31, 119, 180])).sum(2) < 40).sum()  # of the reliability plot
    assert blue > 50 and (seen.std((1, 2)) > 1).mean() > 0.5


def test_the_command_trains_again_from_its_arguments(runs, tmp_path):
    again = tmp_path / "again"
    assert cli.main(["train", "--config", str(runs / "fold_0" / "train.yaml"), "--out", str(again), "--quiet"]) == 0
    for name, value in weights(runs / "fold_0").items():
        torch.testing.assert_close(weights(again)[name], value, rtol=0, atol=0)
    assert yaml.safe_load((again / "train.yaml").read_text())["task"] == "classify"


class Stop(Samples):
    """Samples that end the training with a signal when they come to one of them."""

    at = 9

    def __getitem__(self, index):
        if index == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


def test_resumed_equals_uninterrupted(cells, tmp_path, monkeypatch):
    options = {**FAST, "mixup": 0.2, "ema": 0.5, "class_weights": "balanced", "smoothing": 0.1, "validations": 2}
    whole = train(cells, tmp_path / "whole", **options)
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["medssm.classify.train"], "Samples", Stop)
        with pytest.raises(Interrupted, match="saved after 3 steps"):
            train(cells, tmp_path / "parts", **options)
    with pytest.raises(UserError, match="has a training: pass resume to go on with it, or overwrite"):
        train(cells, tmp_path / "parts", **options)
    with pytest.raises(UserError, match=r"was trained with mixup 0\.2, now 0\.3"):
        train(cells, tmp_path / "parts", resume=True, **{**options, "mixup": 0.3})
    parts = train(cells, tmp_path / "parts", resume=True, **options)
    for name, value in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "parts")[name], value, rtol=0, atol=0)
    different = ("out", "seconds")
    assert {k: v for k, v in whole.items() if k not in different} == {k: v for k, v in parts.items() if k not in different}
    assert (tmp_path / "whole" / "predictions.csv").read_text() == (tmp_path / "parts" / "predictions.csv").read_text()
    assert train(cells, tmp_path / "parts", resume=True, **options) == parts  # finished: nothing is trained


def test_volumes(tmp_path):
    root = volumes(tmp_path / "volumes")
    result = train(root, tmp_path / "run", **{**FAST, "max_steps": 12, "lr": 0.01}, group=r"(p\d)", shape=(32, 32, 32), model="vmamba")
    assert result["shape"] == [32, 32, 32] and result["groups"] == 3 and result["validation"]["mean"] == 1.0
    assert read(tmp_path / "run" / "config.json")["kwargs"]["spatial_dims"] == 3


@pytest.mark.parametrize(
    ("model", "kwargs", "written"),
    [
        ("medssm_unet", {"size": "tiny"}, "encoder:medssm_unet"),
        ("medmamba", SMALL, "medmamba"),
        ("vim", {"features": 16, "depth": 2, "image_size": 32, "patch": 8}, "vim"),
        ("monai.networks.nets.EfficientNetBN", None, None),
    ],
)
def test_other_networks(cells, tmp_path, model, kwargs, written):
    options = {**FAST, "max_steps": 1, "model": model, "model_kwargs": kwargs}
    if written is None:
        with pytest.raises(UserError, match=r"model: monai\.networks\.nets\.EfficientNetBN with"):
            train(cells, tmp_path / "run", **options)
        return
    train(cells, tmp_path / "run", **options)
    assert read(tmp_path / "run" / "config.json")["model"] == written
    network = networks.load(tmp_path / "run").eval()
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


def test_a_network_of_timms(cells, tmp_path):
    pytest.importorskip("timm")
    train(cells, tmp_path / "run", **{**FAST, "max_steps": 1, "model": "timm:resnet10t", "model_kwargs": None})
    assert type(networks.load(tmp_path / "run")).__module__ == "timm.models.resnet"
    for name, message in (
        ("resnet81", "timm .* has no network 'resnet81', did you mean resnet"),
        ("hf-hub:someone/net", "has no network 'hf-hub:someone/net'"),
        ("vit_tiny_patch16_224", r"shape: the model does not take \(32, 32\)"),
    ):
        with pytest.raises(UserError, match=message):
            train(cells, tmp_path / "other", **{**FAST, "model": f"timm:{name}", "model_kwargs": None})
    with pytest.raises(UserError, match="timm's networks take planes, and spatial_dims is 3"):
        train(volumes(tmp_path / "volumes"), tmp_path / "other", **{**FAST, "model": "timm:resnet10t", "model_kwargs": None})


def test_timm_is_not_required(cells, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="model: timm:resnet18 needs the package timm: pip install timm"):
        train(cells, tmp_path / "run", **{**FAST, "model": "timm:resnet18", "model_kwargs": None})


def test_a_module_and_all_images(cells, tmp_path):
    network = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 3))
    result = train(cells, tmp_path / "run", **{**FAST, "model": network, "model_kwargs": None, "fold": None})
    assert result["validation_images"] == 0 and result["validation"] == {} and "figures" not in result
    assert not (tmp_path / "run" / "calibration.json").exists()
    assert "No image was held out" in (tmp_path / "run" / "report.html").read_text()
    with pytest.raises(UserError, match=r"expected logits of the shape \(1, 3\), got"):
        train(cells, tmp_path / "other", **{**FAST, "model": nn.Conv2d(3, 3, 1), "model_kwargs": None})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shape": (32,)}, r"shape: expected 2 or 3 numbers of voxels, got \(32,\)"),
        ({"mixup": -1.0}, "mixup: expected 0 or more, got -1.0"),
        ({"smoothing": 1.0}, "smoothing: expected 0 or more and less than 1, got 1.0"),
        ({"ema": 1.0}, "ema: expected more than 0 and less than 1, got 1.0"),
        ({"batch": 0}, "batch: expected more than 0, got 0"),
        ({"clip": float("nan")}, "clip: expected more than 0, got nan"),
        ({"weight_decay": -1.0}, "weight_decay: expected 0 or more, got -1.0"),
        ({"nan": float("nan")}, "nan: expected a finite number, got nan"),
        ({"mirror": "swap"}, "mirror: expected auto, none or axes"),
        ({"model": "vnamba"}, "model: vnamba with"),
        ({"task": "segment"}, "task: expected classify, got 'segment'"),
        ({"folds": 9}, r"folds: expected 2 to 8 \(the number of groups\), got 9"),
        ({"modality": ["xray"]}, "modality: expected ct, mri"),
    ],
)
def test_bad_arguments_are_one_clear_line(cells, tmp_path, given, message):
    with pytest.raises(UserError, match=message) as error:
        train(cells, tmp_path / "run", **{**FAST, **given})
    assert "\n" not in str(error.value)


def test_nothing_is_left_of_a_training_that_is_overwritten(cells, tmp_path):
    run, held_out = tmp_path / "run", ("model_best.safetensors", "calibration.json", "figures.json", "predictions.csv")
    train(cells, run, **FAST)
    assert all((run / name).exists() for name in held_out)
    train(cells, run, fold=None, overwrite=True, **FAST)
    assert not any((run / name).exists() for name in held_out) and (run / "model.safetensors").exists()


def test_a_library_that_cannot_draw_ends_no_training(cells, tmp_path, monkeypatch, caplog):
    def fail(*arguments):
        raise ValueError("no fonts")

    monkeypatch.setattr("medssm.segment.curves.draw", fail)
    assert train(cells, tmp_path / "run", **FAST)["steps"] == 4 and (tmp_path / "run/model.safetensors").exists()
    assert caplog.text.count("cannot be drawn (ValueError: no fonts)") == 1


def test_mirrored_sides_stay_one_class(tmp_path):
    root = folder(tmp_path / "sides", groups=4, classes=("left lung", "right lung"), each=1)
    train(root, tmp_path / "run", **{**FAST, "max_steps": 1, "folds": 2})
    assert read(tmp_path / "run" / "fitted.json")["mirror"] == [1]


def test_each_task_has_its_own_options(cells, tmp_path, capsys):
    assert cli.main(["train", str(cells), str(tmp_path / "run"), "--task", "classify", "--patch", "8", "8"]) == 2
    assert capsys.readouterr().err.startswith("medssm train (classify): --patch: no such option")
    assert cli.main(["train", str(cells), str(tmp_path / "run"), "--mixup", "0.2"]) == 2
    assert capsys.readouterr().err.startswith("medssm train: --mixup: no such option")
    assert cli.main(["train", str(cells), str(tmp_path / "run"), "--task", "clasify"]) == 2
    assert capsys.readouterr().err == "medssm train: --task: expected one of segment, classify, got 'clasify'\n"
    assert cli.main(["train", str(nnunet_folder(tmp_path / "masks", 1, (8, 8, 8))), str(tmp_path / "run"), "--task", "classify"]) == 2
    assert "a data set of label maps, one for each image: leave out --task classify" in capsys.readouterr().err
    with pytest.raises(UserError, match="task: expected segment, got 'classify'"):
        train_to_segment(cells, tmp_path / "run", task="classify")


def test_the_task_is_found_in_words_and_files(tmp_path):
    def one(task: str = "a", *, alike: int = 0):
        """One."""

    def other(run: str, /, *, task: str = "b", different: int = 0):
        """Other."""

    functions = [one, other]
    assert options.text_of("task", functions, ["--alike", "1", "--task", "c", "--different", "2"]) == "c"
    (tmp_path / "a.yaml").write_text("task: d\n")
    (tmp_path / "b.yaml").write_text("alike: 3\n")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    assert options.text_of("task", functions, files) == "d" and options.text_of("task", functions, [*files, "--task=e"]) == "e"
    assert options.text_of("task", functions, ["--alike", "1"]) is None
    assert options.text_of("run", [other, one], ["--task", "c", "first"]) == "first"
    with pytest.raises(UserError, match="--strange: no such option"):
        options.text_of("task", functions, ["--strange"])


def test_null_trains_on_all():
    assert options.read(train, "medssm train", ["data", "run", "--fold", "null"]).values["fold"] is None


def test_a_run_says_its_task(runs, tmp_path):
    assert tasks.is_run(runs) and tasks.is_run(runs / "fold_0") and not tasks.is_run(tmp_path) and not tasks.is_run(tmp_path / "none")
    (tmp_path / "fitted.json").write_text("[]")
    assert not tasks.is_run(tmp_path)
