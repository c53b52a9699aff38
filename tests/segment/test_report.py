"""What train writes to look at: curves while it runs, and a report with the held-out cases that went best and worst."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medssm.segment import curves, report, validation
from medssm.segment.cases import Case
from medssm.segment.preprocess import Fitted
from medssm.segment.train import train
from medssm.segment.validation import Validation
from tests.segment.synthetic import UNET, nnunet_folder, write

FITTED = Fitted(("MR",), (1.0, 1.0, 1.0), ({"scheme": "zscore"},), {"background": 0, "near": 1, "far": 2}, None, (8, 8, 8))


def box(start: int, stop: int, value: int = 1) -> torch.Tensor:
    label = torch.zeros(8, 8, 8, dtype=torch.int16)
    label[start:stop] = value
    return label


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Four cases with a right, a half right, a wrong and an empty answer."""
    answers = {
        "half": (box(0, 4), box(2, 6)),
        "right": (box(0, 4), box(0, 4)),
        "empty": (box(0, 0), box(0, 0)),
        "wrong": (box(0, 2, 2), box(6, 8, 2)),
    }
    cases = [Case(name, (write(tmp_path / f"{name}.nii.gz", np.zeros((8, 8, 8), np.float32)),), tmp_path / name) for name in answers]
    found = iter(list(answers.values()))
    monkeypatch.setattr(validation, "probabilities", lambda *_, **__: torch.nn.functional.one_hot(next(found)[1].long(), 3).movedim(-1, 0).float())
    fabric = SimpleNamespace(world_size=1, device=torch.device("cpu"))
    images = [torch.arange(512.0).reshape(1, 8, 8, 8)] * 4
    held_out = Validation(cases, list(zip(images, [label for label, _ in answers.values()], strict=True)), FITTED, fabric)
    assert held_out(torch.nn.Identity()) == {"near": 0.75, "far": 0.0, "mean": 0.375}
    return held_out.rows()


def test_each_case_has_its_dice_and_the_best_comes_first(rows):
    assert [(row["name"], row["mean"]) for row in rows] == [("right", 1.0), ("half", 0.5), ("wrong", 0.0), ("empty", None)]
    assert [row["dice"] for row in rows] == [{"near": 1.0}, {"near": 0.5}, {"far": 0.0}, {}]
    assert all(row["picture"].startswith("data:image/jpeg;base64,") for row in rows)


def test_the_report_shows_the_best_and_the_worst(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_PICTURES", 1)
    (tmp_path / "log.jsonl").write_text('{"step": 1, "seconds": 1.0, "loss": 2.0}\n')
    curves.draw(tmp_path / "log.jsonl", tmp_path / "curves.png")
    result = {"model": "net", "parameters": 1234, "cases": 1, "steps": 5, "seconds": 2.0, "validation_cases": 4}
    scores = {"validation": {"mean": 0.375}, "best": {"step": 3, "mean": 0.4}}
    training = [Case("<b>one", (tmp_path / "one.nii.gz",))]
    report.write(tmp_path / "report.html", result | scores, {"patch": "8 x 8 x 8"}, "lr: 0.1\n", tmp_path / "curves.png", rows, training)
    text = (tmp_path / "report.html").read_text()
    best, worst = text.index("<h3>Best</h3>"), text.index("<h3>Worst</h3>")
    assert "right in slices" in text[best:worst] and "wrong in slices" in text[worst:] and "half in slices" not in text
    assert "<b>0.375</b>" in text and "0.400 at step 3" in text and "lr: 0.1" in text and "8 x 8 x 8" in text and "&lt;b&gt;one" in text
    assert {address[:11] for address in re.findall(r'(?:src|href)="([^"]*)', text)} == {"data:image/"}
    report.write(tmp_path / "none.html", result | {"validation": {}, "best": {}}, {}, "", tmp_path / "curves.png", [], training)
    assert "No case was held out" in (tmp_path / "none.html").read_text()


def test_a_training_leaves_its_report(trained):
    text = (trained / "fold_0" / "report.html").read_text()
    (held_out,) = json.loads((trained / "fold_0" / "cases.json").read_text())["validation"]
    last = json.loads((trained / "fold_0" / "metrics.jsonl").read_text().splitlines()[-1])["finished"]
    assert f"{held_out['name']} in slices" in text and f"<b>{last['validation']['mean']:.3f}</b>" in text
    assert "max_steps: 60" in text and "The 3 case(s) that were trained on" in text


def test_curves_are_drawn_while_it_trains(tmp_path, monkeypatch):
    drawn, draw = [], curves.draw
    monkeypatch.setattr(curves, "draw", lambda log, picture, *names: (drawn.append(len(log.read_text().splitlines())), draw(log, picture, *names)))
    monkeypatch.setattr("medssm.segment.loop._LOG_SECONDS", 0.0)
    monkeypatch.setattr(curves.Live.__init__, "__defaults__", (0.0, curves.SEGMENTATION))
    folder = nnunet_folder(tmp_path / "data", cases=2, shape=(20, 18, 16))
    fast = {"model": "monai.networks.nets.UNet", "model_kwargs": UNET, "patch": (16, 16, 16), "device": "cpu", "quiet": True}
    train(folder, tmp_path / "run", max_steps=3, **fast)
    assert drawn == [1, 2, 4]  # after the second and the third step, and at the end; the first one has no log yet


def test_a_library_that_cannot_draw_ends_no_training(tmp_path, monkeypatch, caplog):
    tried = []

    def fail(log, picture, *names):
        tried.append(picture)
        raise ValueError("no fonts")

    monkeypatch.setattr(curves, "draw", fail)
    monkeypatch.setattr("medssm.segment.loop._LOG_SECONDS", 0.0)
    monkeypatch.setattr(curves.Live.__init__, "__defaults__", (0.0, curves.SEGMENTATION))
    folder = nnunet_folder(tmp_path / "data", cases=2, shape=(20, 18, 16))
    fast = {"model": "monai.networks.nets.UNet", "model_kwargs": UNET, "patch": (16, 16, 16), "device": "cpu", "quiet": True}
    assert train(folder, tmp_path / "run", max_steps=5, **fast)["steps"] == 5 and (tmp_path / "run/model.safetensors").exists()
    assert len(tried) == 2 and caplog.text.count("cannot be drawn (ValueError: no fonts)") == 2  # once while it trains, and at the end


def test_curves_are_drawn_once_a_minute(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(curves.time, "monotonic", lambda: clock[0])
    drawn = []
    monkeypatch.setattr(curves, "draw", lambda log, picture, *names: drawn.append(clock[0]))
    (tmp_path / "log").write_text("")
    live = curves.Live(tmp_path / "log", tmp_path / "png")
    for clock[0] in (1.0, 59.0, 60.0, 61.0, 119.0, 125.0):
        live()
    assert drawn == [60.0, 125.0]
