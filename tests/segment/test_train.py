"""medssm train: what it writes, a stop and a resumption, and what goes wrong in one clear line."""

import contextlib
import inspect
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
import yaml
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision
from monai.networks.nets import DynUNet
from torch import nn

from medssm import cli
from medssm.errors import UserError
from medssm.nn import SSND
from medssm.segment.loop import Budget, Interrupted, Progress, learning_rate
from medssm.segment.patches import Patches
from medssm.segment.train import _fast_precision, optimizer_for, train, workers_for
from tests.segment.synthetic import UNET, nnunet_folder

FAST = {"model": "monai.networks.nets.UNet", "model_kwargs": UNET, "patch": (16, 16, 16), "device": "cpu", "quiet": True}
COMMAND = ["--model", FAST["model"], "--model-kwargs", json.dumps(UNET), "--patch", "16", "16", "16", "--device", "cpu"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return nnunet_folder(tmp_path_factory.mktemp("small"), cases=2, shape=(20, 18, 16))


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out):
    return safetensors.torch.load_file(out / "model.safetensors")


class Stop(Patches):
    """Patches that end the training with a signal when they come to one of them."""

    at = 11

    def __getitem__(self, index):
        if index == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


def test_the_command_writes_what_it_says(trained):
    out = trained / "fold_0"
    assert {file.name for file in out.iterdir()} == {
        "model.safetensors",
        "model_best.safetensors",
        "postprocessing.json",
        "config.json",
        "fitted.json",
        "cases.json",
        "train.yaml",
        "metrics.jsonl",
        "curves.png",
        "report.html",
        "conformal.json",
    }
    config, log = json.loads((out / "config.json").read_text()), records(out)
    assert config["model"] == "monai.networks.nets.UNet" and config["kwargs"]["out_channels"] == 3
    assert log[-1]["finished"]["steps"] == 60 and log[-1]["finished"]["validation"]["mean"] > 0.85
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "tests" not in json.dumps(json.loads((out / "fitted.json").read_text()))


def test_the_summary_and_json(small, tmp_path, capsys):
    assert cli.main(["train", str(small), str(tmp_path / "a"), *COMMAND, "--max-steps", "2"]) == 0
    assert "parameters, 2 steps in" in capsys.readouterr().out
    assert cli.main(["train", str(small), str(tmp_path / "b"), *COMMAND, "--max-steps", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2


def test_the_folder_keeps_the_arguments_and_they_repeat_the_training(small, tmp_path, monkeypatch, capsys):
    """From any folder, with the defaults that it had."""
    monkeypatch.chdir(small.parent)
    options = ["--max-steps", "3", "--lr", "0.02", "--batch", "1", "--mirror", "0,1", "--no-augment", "--seed", "5"]
    assert cli.main(["train", small.name, str(tmp_path / "a"), *COMMAND, *options, "--quiet"]) == 0
    kept = yaml.safe_load((tmp_path / "a/train.yaml").read_text())
    assert kept["dataset"] == str(small) and kept["out"] == str(tmp_path / "a") and kept["model_kwargs"] == UNET and kept["mirror"] == "0,1"
    assert set(kept) == {*inspect.signature(train).parameters} - {"resume", "overwrite", "quiet"}
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--config", "a/train.yaml"]) == 2
    assert "has a training: pass resume to go on with it, or overwrite" in capsys.readouterr().err
    monkeypatch.setattr("medssm.segment.train._LEARNING_RATES", {"adamw": 9.0})
    assert cli.main(["train", "--config", "a/train.yaml", "--out", "b", "--quiet"]) == 0
    one, same = (weights(tmp_path / name) for name in "ab")
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert yaml.safe_load((tmp_path / "b/train.yaml").read_text()) == {**kept, "out": str(tmp_path / "b")}


def test_what_was_left_open_is_kept_as_it_was_decided(small, tmp_path):
    train(small, tmp_path / "a", **{**FAST, "model": nn.Conv3d(1, 3, 1)}, max_seconds=0.1)
    kept = yaml.safe_load((tmp_path / "a/train.yaml").read_text())
    assert (kept["lr"], kept["batch"], kept["max_steps"], kept["max_seconds"]) == (1e-3, 2, None, 0.1)
    assert kept["model"] == "torch.nn.modules.conv.Conv3d"  # which --config then refuses by name


def test_the_same_seed_gives_the_same_weights_and_another_others(small, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(small, tmp_path / name, max_steps=4, seed=seed, **FAST)
    one, same, other = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(one[key], same[key]) for key in one) and any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_stopped_training_goes_on_as_if_it_never_stopped(small, tmp_path, monkeypatch, optimizer):
    monkeypatch.setattr("medssm.segment.loop._LOG_SECONDS", float("inf"))  # on a slow machine a line more would be logged
    options = {**FAST, "max_steps": 10, "optimizer": optimizer, "model_kwargs": {**UNET, "dropout": 0.2}}
    train(small, tmp_path / "whole", **options)
    with monkeypatch.context() as patched:
        patched.setattr("medssm.segment.train.Patches", Stop)
        with pytest.raises(Interrupted, match="saved after 6 steps: go on with --resume"):
            train(small, tmp_path / "stopped", **options)
    assert not (tmp_path / "stopped/model.safetensors").exists()
    result = train(small, tmp_path / "stopped", resume=True, **options)
    assert result["steps"] == 10 and not (tmp_path / "stopped/checkpoint.pt").exists()
    whole, stopped = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(whole[key], stopped[key]) for key in whole)
    assert [record["step"] for record in records(tmp_path / "stopped")] == [6, 10, 10]


def test_a_finished_training_is_returned_and_not_written_over(small, tmp_path):
    result = train(small, tmp_path / "a", max_steps=2, **FAST)
    before = (tmp_path / "a/model.safetensors").stat().st_mtime_ns
    assert train(small, tmp_path / "a", max_steps=2, resume=True, **FAST) == result
    with pytest.raises(UserError, match="has a training: pass resume to go on with it, or overwrite"):
        train(small, tmp_path / "a", max_steps=2, **FAST)
    assert (tmp_path / "a/model.safetensors").stat().st_mtime_ns == before
    assert train(small, tmp_path / "a", max_steps=3, overwrite=True, **FAST)["steps"] == 3


def test_a_checkpoint_of_another_training_is_refused(small, tmp_path, monkeypatch):
    monkeypatch.setattr("medssm.segment.train.Patches", Stop)
    with pytest.raises(Interrupted):
        train(small, tmp_path / "a", max_steps=10, **FAST)
    with pytest.raises(UserError, match=r"was trained with lr 0\.001, now 0\.5; seed 0, now 7"):
        train(small, tmp_path / "a", max_steps=10, resume=True, lr=0.5, seed=7, **FAST)
    state = torch.load(tmp_path / "a/checkpoint.pt")
    for older in ({key: value for key, value in state.items() if key != "due"}, [1], state | {"network": {"other": torch.zeros(1)}}):
        torch.save(older, tmp_path / "a/checkpoint.pt")
        with pytest.raises(UserError, match=r"checkpoint\.pt was not written by this version of medssm train \(.*\): train anew with --overwrite"):
            train(small, tmp_path / "a", max_steps=10, resume=True, **FAST)
    (tmp_path / "a/checkpoint.pt").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        train(small, tmp_path / "a", max_steps=10, resume=True, **FAST)


def test_sigterm_saves_and_ends_with_one_line(small, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "medssm.cli", "train", str(small), str(out), *COMMAND, "--max-steps", "100000"]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        while running.poll() is None and not (out / "metrics.jsonl").exists():
            time.sleep(0.1)
        running.send_signal(signal.SIGTERM)
        shown = running.communicate(timeout=60)[1]
    assert running.returncode == 130 and "Traceback" not in shown and "steps: go on with --resume" in shown.splitlines()[-1]
    assert {file.name for file in out.iterdir()} == {"checkpoint.pt", "fitted.json", "cases.json", "train.yaml", "metrics.jsonl"}
    step = records(out)[-1]["step"]
    assert train(small, out, max_steps=step + 3, resume=True, **FAST)["steps"] == step + 3


@contextlib.contextmanager
def files_of_at_most(size):
    """The system itself refuses what is longer, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("save", "name"), [("1000", "model.safetensors"), ("0", "checkpoint.pt")])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(small, tmp_path, capsys, save, name):
    with files_of_at_most(20_000):
        assert cli.main(["train", str(small), str(tmp_path / "out"), *COMMAND, "--max-steps", "3", "--save-seconds", save]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert f"{name}: the disk is full" in shown[-1] and shown[-2].startswith("budget:")  # what comes before is the plan
    assert {file.name for file in (tmp_path / "out").iterdir()} <= {"config.json", "fitted.json", "cases.json", "train.yaml", "metrics.jsonl"}


def test_a_full_disk_leaves_the_log_with_whole_lines(small, tmp_path, monkeypatch):
    monkeypatch.setattr("medssm.segment.train.Patches", Stop)
    with pytest.raises(Interrupted):
        train(small, tmp_path / "a", max_steps=10, **FAST)
    log = tmp_path / "a/metrics.jsonl"
    others, before = max((tmp_path / "a" / name).stat().st_size for name in ("fitted.json", "train.yaml")), log.read_bytes()
    monkeypatch.setattr(Stop, "at", None)
    monkeypatch.setattr("medssm.segment.loop._LOG_SECONDS", 0.0)
    with files_of_at_most(max(others, len(before)) + 100), pytest.raises(UserError, match=r"metrics\.jsonl: the disk is full"):
        train(small, tmp_path / "a", max_steps=100, resume=True, **FAST)
    after = log.read_bytes()
    assert after.startswith(before) and after.endswith(b"}\n") and all(map(json.loads, after.splitlines()))


class Breaks(nn.Module):
    """Logits that are not finite for an image with a very bright voxel."""

    def __init__(self, value):
        super().__init__()
        self.value, self.layer = value, nn.Conv3d(1, 3, 1)

    def forward(self, x):
        bright = (x.amax((1, 2, 3, 4), keepdim=True) > 20).float()
        return self.layer(x) + torch.where(bright > 0, self.value, 0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_case(tmp_path, value):
    def mark(seed, image, label):
        image[9, 9, 9] = 1e5 if seed == 1 else 100
        return image, label

    folder = nnunet_folder(tmp_path / "data", cases=3, shape=(16, 16, 16), edit=mark)
    with pytest.raises(UserError, match=r"training: the loss is \S+ at step \d+, case case_1$"):
        train(folder, tmp_path / "out", **{**FAST, "model": Breaks(value)}, batch=3, max_steps=50, augment=False)
    assert not (tmp_path / "out/model.safetensors").exists()


class Explodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


def test_a_gradient_that_is_not_finite_stops_too(small, tmp_path):
    class Network(nn.Conv3d):
        def forward(self, x):
            return Explodes.apply(super().forward(x))

    with pytest.raises(UserError, match=r"the gradient's norm is (nan|inf) at step 1, case case_"):
        train(small, tmp_path / "out", **{**FAST, "model": Network(1, 3, 1)}, max_steps=2)


def test_seconds_end_a_training_and_bring_its_rate_to_zero(small, tmp_path):
    result = train(small, tmp_path / "a", max_seconds=1.0, **FAST)
    assert result["seconds"] >= 1.0 and result["steps"] > 1
    assert next(record["lr"] for record in reversed(records(tmp_path / "a")) if "lr" in record) < 3e-4


def test_the_learning_rate_warms_up_and_ends_at_zero():
    budget = Budget(1000, None)
    rates = [learning_rate(1.0, Progress(step), budget) for step in range(1001)]
    assert rates[0] == pytest.approx(0.05) and max(rates) > 0.99 and rates[-1] == 0
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[20:]))
    assert Budget(1000, 10.0).fraction(Progress(100, 5.0)) == 0.5 and Budget(1000, 10.0).fraction(Progress(900, 5.0)) == 0.9


def test_deep_supervision_is_used_where_the_network_has_it(small, tmp_path):
    network = DynUNet(
        3, 1, 3, kernel_size=[3] * 3, strides=[1, 2, 2], upsample_kernel_size=[2, 2], filters=[4, 8, 8], deep_supervision=True, deep_supr_num=1
    )
    before = {name: value.clone() for name, value in network.named_parameters() if "deep_supervision_heads" in name}
    train(small, tmp_path / "a", **{**FAST, "model": network}, max_steps=2)
    assert before and all(not torch.equal(value, dict(network.named_parameters())[name]) for name, value in before.items())


def test_strides_suit_the_patch_and_every_level_learns(tmp_path):
    folder = nnunet_folder(tmp_path / "data", cases=2, shape=(18, 20, 17))
    kwargs = {"features": [4, 4, 4, 4], "depths": 1, "decoder_depths": 1}
    options = {"device": "cpu", "quiet": True, "max_steps": 1}
    assert train(folder, tmp_path / "a", model_kwargs=kwargs, **options)["patch"] == [20, 20, 20]
    chosen = json.loads((tmp_path / "a/config.json").read_text())["kwargs"]
    assert chosen["strides"] == [[1, 1, 1], [2, 2, 2], [2, 2, 2], [1, 1, 1]] and chosen["deep_supervision"]
    given = {**kwargs, "strides": [1, 2, 2, 2], "deep_supervision": False}
    assert train(folder, tmp_path / "b", model_kwargs=given, **options)["patch"] == [32, 32, 32]
    assert json.loads((tmp_path / "b/config.json").read_text())["kwargs"] == {**given, "spatial_dims": 3, "in_channels": 1, "out_channels": 3}


def test_weights_decay_and_what_has_another_neutral_value_than_zero_does_not():
    network = nn.ModuleDict({"mixer": SSND(4, 2, spatial_dims=3), "conv": nn.Conv3d(4, 4, 1), "norm": nn.BatchNorm3d(4)})
    names = {id(p): name for name, p in network.named_parameters()}
    decayed, others = optimizer_for("adamw", network, 1e-3, 0.1).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    layers = [
        "conv.weight",
        *(f"mixer.{name}" for name in ("conv3d.weight", "dt_projs_weight", "in_proj.weight", "out_proj.weight", "x_proj_weight")),
    ]
    assert sorted(names[id(p)] for p in decayed["params"]) == layers
    assert {"mixer.A_logs", "mixer.Ds", "mixer.dt_projs_bias", "norm.weight", "conv.bias"} <= {names[id(p)] for p in others["params"]}


def test_half_precision(small, tmp_path, capfd, caplog):
    train(small, tmp_path / "a", precision="bf16-mixed", max_steps=3, **FAST)
    assert "bfloat16" not in capfd.readouterr().err and not caplog.records  # Lightning has a line about it, in a quiet training too
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in weights(tmp_path / "a").values())


@pytest.mark.parametrize(
    ("accelerator", "gpu", "bf16", "amx", "precision"),
    [
        ("auto", True, True, False, "bf16-mixed"),
        ("cuda", True, False, True, "16-mixed"),
        ("auto", False, False, True, "bf16-mixed"),
        ("cpu", True, True, True, "bf16-mixed"),
        ("cpu", True, True, False, "32-true"),
        ("mps", False, False, True, "32-true"),
    ],
)
def test_half_precision_is_the_default_where_it_takes_less_time(monkeypatch, accelerator, gpu, bf16, amx, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert _fast_precision(accelerator) == precision


def test_the_machine_changes_no_precision_in_the_middle(small, tmp_path, monkeypatch):
    monkeypatch.setattr("medssm.segment.train.Patches", Stop)
    with pytest.raises(Interrupted):
        train(small, tmp_path / "a", max_steps=10, precision="32-true", **FAST)
    with pytest.raises(UserError, match="was trained with precision '32-true', now 'bf16-mixed'"):
        train(small, tmp_path / "a", max_steps=10, resume=True, precision="bf16-mixed", **FAST)


def test_a_scaler_skips_what_overflows_and_goes_on_after_a_stop(small, tmp_path, monkeypatch):
    """fp16 with a scale that starts far too high, on a CPU: GradScaler halves it step by step, and a checkpoint keeps it."""

    def fp16(*_):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**34)
        return Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])

    monkeypatch.setattr("medssm.segment.train.fabric_for", fp16)
    train(small, tmp_path / "whole", max_steps=20, **FAST)
    with monkeypatch.context() as patched:
        patched.setattr("medssm.segment.train.Patches", Stop)
        with pytest.raises(Interrupted):
            train(small, tmp_path / "stopped", max_steps=20, **FAST)
    scale = torch.load(tmp_path / "stopped/checkpoint.pt")["scaler"]["scale"]
    train(small, tmp_path / "stopped", max_steps=20, resume=True, **FAST)
    whole, stopped = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert scale == 2.0**28 and all(torch.equal(whole[key], stopped[key]) for key in whole)


def test_workers_cut_the_same_patches(small, tmp_path):
    for workers in (0, 1):
        train(small, tmp_path / str(workers), max_steps=3, workers=workers, **FAST)
    alone, helped = weights(tmp_path / "0"), weights(tmp_path / "1")
    assert all(torch.equal(alone[key], helped[key]) for key in alone)


def test_workers_on_a_gpu_alone_unless_they_are_asked_for():
    devices = [torch.device(name) for name in ("cpu", "cuda")]
    assert [workers_for(None, device) for device in devices] == [0, 4] and [workers_for(2, device) for device in devices] == [2, 2]


def test_two_processes(small, tmp_path):
    command = [
        sys.executable,
        "-m",
        "medssm.cli",
        "train",
        str(small),
        str(tmp_path / "out"),
        *COMMAND,
        "--max-steps",
        "3",
        "--devices",
        "2",
        "--strategy",
        "ddp",
        "--fold",
        "0",
        "--folds",
        "2",
        "--validations",
        "1",
    ]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=180)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("written:") == ended.stdout.count(" 3 steps in ") == 1, ended.stdout
    assert records(tmp_path / "out")[-1]["finished"]["steps"] == 3 and weights(tmp_path / "out")


def test_nothing_is_left_of_a_training_that_is_overwritten(small, tmp_path):
    run, held_out = tmp_path / "run", ("model_best.safetensors", "postprocessing.json", "conformal.json")
    train(small, run, max_steps=2, fold=0, folds=2, **FAST)
    assert all((run / name).exists() for name in held_out)
    train(small, run, max_steps=2, overwrite=True, **FAST)
    assert not any((run / name).exists() for name in held_out) and (run / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spatial_dims": 4}, "spatial_dims: expected 2 or 3, got 4"),
        ({"patch": (16, 16)}, r"patch: expected 3 numbers of voxels, got \(16, 16\)"),
        ({"patch": (18, 16, 16)}, r"patch: the model does not take \(18, 16, 16\)"),
        ({"patch": (15, 16, 16)}, r"model: expected logits of the shape \(1, 3, 15, 16, 16\), got \(1, 3, 16, 16, 16\)"),
        ({"spacing": (1, 1, 0)}, "spacing: expected 3 lengths in millimetres"),
        ({"max_steps": 0}, "max_steps: expected more than 0, got 0"),
        ({"clip": 0.0}, "clip: expected more than 0, got 0.0"),
        ({"weight_decay": float("nan")}, "weight_decay: expected 0 or more, got nan"),
        ({"optimizer": "adam"}, "optimizer: expected one of adamw, sgd, got 'adam'"),
        ({"foreground": 2}, "foreground: expected 0 to 1, got 2"),
        ({"nan": float("inf")}, "nan: expected a finite number, got inf"),
        ({"mirror": (0, 4)}, "mirror: expected"),
        ({"mirror": "0,4"}, r'mirror: expected "auto", "swap" or some of the axes \(0, 1, 2\), got \(0, 4\)'),
        ({"mirror": "all"}, "mirror: expected auto, swap, none or axes as in 0,1, got 'all'"),
        ({"fold": 3, "folds": 9}, "folds: expected 2 to 2"),
        ({"device": "cuda:99"}, "device: cuda:99"),
        ({"model": "monai.networks.nets.Nothing"}, "MONAI has no network"),
        ({"model": "monai.networks.nets.os"}, "MONAI has no network"),
        ({"model_kwargs": {"no_such": 1}}, "no_such"),
        ({"model": nn.Conv3d(1, 7, 1)}, r"model: expected logits of the shape \(1, 3, 16, 16, 16\), got \(1, 7, 16, 16, 16\)"),
    ],
)
def test_bad_arguments_are_one_line(small, tmp_path, options, message):
    with pytest.raises(UserError, match=message) as error:
        train(small, tmp_path / "a", **{"max_steps": 1, **FAST, **options})
    assert len(str(error.value).splitlines()) == 1


def test_the_command_says_what_is_wrong_and_exits_with_2(tmp_path, capsys):
    assert cli.main(["train", str(tmp_path), str(tmp_path / "out"), *COMMAND]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"medssm train: {tmp_path}/dataset.json: no such file") and len(shown.splitlines()) == 1
