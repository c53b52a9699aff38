"""Which weights are kept: the last ones, those of the best validation, or their moving average."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from medssm import cli
from medssm.errors import UserError
from medssm.segment import loop, networks
from medssm.segment.averaging import WeightAverage
from medssm.segment.images import read_label
from medssm.segment.predict import predict
from medssm.segment.train import train
from tests.segment.synthetic import UNET, WORDS, nnunet_folder
from tests.segment.test_train import FAST, Stop

NORMED = {**FAST, "model_kwargs": {**UNET, "norm": "batch"}, "lr": 0.05}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return nnunet_folder(tmp_path_factory.mktemp("small"), cases=2, shape=(20, 18, 16))


def averaged(weights: list[np.ndarray], decay: float) -> np.ndarray:
    mean = weights[0]
    for t, new in enumerate(weights[1:], 1):
        kept = min(decay, (1 + t) / (10 + t))
        mean = kept * mean + (1 - kept) * new
    return mean


def test_the_average_is_its_formula():
    torch.manual_seed(0)
    network, weights = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double(), []
    average = WeightAverage(network, 0.5)
    for _ in range(12):
        network(torch.randn(4, 3, dtype=torch.float64))
        with torch.no_grad():
            network[0].weight.normal_()
        weights.append(network[0].weight.detach().numpy().copy())
        average.update_parameters(network)
        np.testing.assert_allclose(average.module[0].weight.numpy(), averaged(weights, 0.5), rtol=1e-12)
    assert torch.equal(average.module[1].running_mean, network[1].running_mean) and average.module[1].num_batches_tracked == 12


@pytest.fixture
def seen(monkeypatch):
    """The weights of the network after each step."""
    found: list[dict[str, np.ndarray]] = []
    update = WeightAverage.update_parameters

    def record(self, network):
        found.append({name: value.detach().numpy().copy() for name, value in network.named_parameters()})
        update(self, network)

    monkeypatch.setattr(WeightAverage, "update_parameters", record)
    return found


def test_what_is_kept_is_the_average(small, tmp_path, seen, capsys):
    words = [*WORDS, "--lr", "0.05"]
    assert cli.main(["train", str(small), str(tmp_path / "a"), *words, "--max-steps", "5", "--ema", "0.2"]) == 0
    assert "moving average, with the decay 0.2" in capsys.readouterr().err
    kept = load_file(tmp_path / "a" / networks.WEIGHTS)
    assert len(seen) == 5 and not any(np.allclose(kept[name], seen[-1][name], rtol=1e-4) for name in seen[0] if seen[0][name].ndim > 1)
    for name in seen[0]:
        np.testing.assert_allclose(kept[name], averaged([weights[name] for weights in seen], 0.2), rtol=1e-4, atol=1e-6)


def test_a_stop_does_not_change_the_average(small, tmp_path, monkeypatch):
    train(small, tmp_path / "whole", max_steps=8, ema=0.9, **NORMED)
    with monkeypatch.context() as patched:
        patched.setattr("medssm.segment.train.Patches", Stop)
        with pytest.raises(loop.Interrupted):
            train(small, tmp_path / "stopped", max_steps=8, ema=0.9, **NORMED)
    with pytest.raises(UserError, match=r"was trained with ema 0\.9, now None"):
        train(small, tmp_path / "stopped", max_steps=8, resume=True, **NORMED)
    train(small, tmp_path / "stopped", max_steps=8, ema=0.9, resume=True, **NORMED)
    whole, stopped = (load_file(tmp_path / name / networks.WEIGHTS) for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


@pytest.mark.parametrize("ema", [0.0, 1.0, -1.0])
def test_a_decay_lies_between_zero_and_one(small, tmp_path, ema):
    with pytest.raises(UserError, match="ema: expected more than 0 and less than 1"):
        train(small, tmp_path / "a", ema=ema, **FAST)


@pytest.mark.parametrize("stop", [None, 9, 11])  # in step 5, or in step 6, after which a validation is due
def test_the_best_weights_are_those_of_the_best_validation(small, tmp_path, monkeypatch, capsys, stop):
    dice, validated = iter([0.5, 0.9, 0.9, 0.6, 0.9]), []  # once more at the end, with the best weights, for their post-processing

    def validate(self, network, show=False, last=False):
        validated.append({name: value.clone() for name, value in network.state_dict().items()})
        return {"ball": 0.0, "mean": next(dice)}

    monkeypatch.setattr("medssm.segment.train.Validation.__call__", validate)
    monkeypatch.setattr("medssm.segment.train.Validation.postprocessing", lambda self: ({}, {}))
    monkeypatch.setattr("medssm.segment.train.Validation.rows", lambda self: [])
    monkeypatch.setattr("medssm.segment.train.Validation.volumes", lambda self, steps: {})
    out, options = tmp_path / "run", {**NORMED, "max_steps": 8, "fold": 0, "folds": 2, "validations": 4}
    if stop:
        with monkeypatch.context() as patched:
            patched.setattr("medssm.segment.train.Patches", Stop)
            patched.setattr(Stop, "at", stop)
            with pytest.raises(loop.Interrupted):
                train(small, out, **options)
        assert len(validated) == 2  # the better one of the two is known after the stop
    result = train(small, out, resume=True, **options)
    assert result["best"] == {"step": 4, "mean": 0.9} and result["validation"]["mean"] == 0.6 and len(validated) == 5
    for file, i in ((networks.BEST, 1), (networks.WEIGHTS, 3)):
        kept = load_file(out / file)
        assert all(torch.equal(kept[name], value) for name, value in validated[i].items())


def test_predict_takes_the_last_or_the_best_weights(trained, folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained / "fold_0", run)
    network = networks.load(run)
    with torch.no_grad():
        for value in network.parameters():
            value.zero_()  # every class is equally likely, so the first one is taken
    networks.save_weights(run / networks.BEST, network)
    scan = folder / "imagesTr" / "case_0_0000.nii.gz"
    for name, options in (("last", {}), ("same", {"weights": "last"}), ("best", {"weights": "best"})):
        predict(run, scan, tmp_path / f"{name}.nii.gz", device="cpu", quiet=True, **options)
    last, same, best = (read_label(tmp_path / f"{name}.nii.gz")[0] for name in ("last", "same", "best"))
    assert (last == same).all() and len(np.unique(last)) == 3 and not best.any()
    with pytest.raises(UserError, match="weights: expected best or last, got 'first'"):
        predict(run, scan, tmp_path / "out", weights="first", device="cpu", quiet=True)
    (run / networks.BEST).unlink()
    with pytest.raises(UserError, match=r"model_best\.safetensors: no such file \(it was trained without validation\)"):
        predict(run, scan, tmp_path / "out", weights="best", device="cpu", quiet=True)
