"""bench/compression.py: MONAI's networks at equal latency, and the whole of it for one step."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from medssm.segment import networks
from tests.segment.synthetic import UNET, nnunet_folder

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--patch", "16", "16", "16", "--max-steps", "1", "--device", "cpu")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("compression")


def weights(network, shape):
    """Stands for the seconds of an inference: it grows with the width."""
    return float(sum(p.numel() for p in network.parameters()))


def test_a_network_gets_the_width_of_the_nearest_latency(bench, monkeypatch):
    monkeypatch.setattr(bench, "seconds", weights)
    sizes = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
    for name in bench.CONTROLS:
        found = bench.at_latency(name, 20_000.0, (32, 32, 32), sizes)
        network = networks.build(name, **sizes, **found["kwargs"])
        assert found["seconds"] == weights(network, ()) and 10_000 < found["seconds"] < 40_000, name


def test_seconds_are_those_of_one_inference(bench):
    network, threads = torch.nn.Conv3d(1, 4, 3), torch.get_num_threads()
    assert 0 < bench.seconds(network, (1, 1, 8, 8, 8)) < 5 and torch.get_num_threads() == threads


def test_a_control_is_trained_for_one_step(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "seconds", weights)
    data = nnunet_folder(tmp_path / "data", shape=(20, 18, 16))
    bench.run(tmp_path / "best", "train", data, "--model", "monai.networks.nets.UNet", "--model-kwargs", json.dumps(UNET), "--folds", "4", *SMALL)
    found = bench.controls(tmp_path, "best", "best")
    assert list(found) == list(bench.CONTROLS) and json.loads((tmp_path / "controls.json").read_text())["like"] == "best"
    monkeypatch.setattr(bench, "seconds", None)
    assert bench.controls(tmp_path, "best", "best") == found  # found once
    for name in bench.CONTROLS[:1]:
        bench.run(tmp_path / name, "train", data, "--folds", "4", *SMALL, *found[name])
        assert json.loads((tmp_path / name / "config.json").read_text())["model"] == name


@pytest.mark.thorough  # new processes
def test_all_of_it_in_one_step(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "CONTROLS", bench.CONTROLS[2:])
    small = {"features": [8, 16], "depths": [1, 1], "decoder_depths": [1], "strides": [1, 2], "mixer": "none"}
    words = (*SMALL, "--model-kwargs", json.dumps(small))
    monkeypatch.setattr(bench, "SETTINGS", {"medssm_unet": ("small", words, {"int8": ("--int8", "--batches", "1")})})
    data, results = nnunet_folder(tmp_path / "data", shape=(20, 18, 16)), tmp_path / "results"
    (results / "accuracy").mkdir(parents=True)
    names = [f"case_{i}" for i in range(4)]
    (results / "accuracy/splits.json").write_text(json.dumps([{"train": names[1:], "val": names[:1]}]))
    monkeypatch.setattr(bench, "RESULTS", results)
    arguments = ["compression.py", str(data), str(tmp_path / "work"), "--controls", "int8", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", arguments)
    bench.main()
    entry = json.loads((tmp_path / "out/results.json").read_text())["medssm_unet"]
    assert list(entry["sides"]) == ["small", "int8", "monai_segresnet"]
    side = entry["sides"]["int8"]
    assert list(side["disturbed"]) == ["noise", "bias-field", "thick-slices"] and side["cold_seconds"] > 0 and side["file_bytes"] > 0
    table = (tmp_path / "out/results.md").read_text().splitlines()
    assert all(line.count("|") == table[2].count("|") for line in table[3:]) and len(table) == 7


def test_results_of_before_are_still_a_table(bench):
    kept = json.loads((ROOT / "bench/results/compression/results.json").read_text())
    for name, entry in kept.items():
        for row in bench.lines(name, entry):
            assert len(row) == len(bench.HEAD)
