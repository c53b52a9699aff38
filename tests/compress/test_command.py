"""medssm compress: a run in, a smaller run out, whole or not at all."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from medssm import cli
from medssm.compare.sources import _trained
from medssm.compress.command import compress
from medssm.errors import UserError
from medssm.segment import networks
from medssm.segment.loop import Interrupted, Loop
from medssm.segment.predict import predict
from medssm.segment.train import train
from tests.compress.conftest import KWARGS
from tests.segment.synthetic import nnunet_folder

LOGITS = """
import sys, torch
from pathlib import Path
from medssm.segment import networks
network = networks.load(Path(sys.argv[1])).eval()
x = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
torch.save(network(x)[0].detach(), sys.argv[2])
"""


def logits(network):
    x = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return network.eval()(x)[0]


@pytest.mark.thorough
def test_openvino_s_8_bits_have_ranges_from_the_training_cases(folder, tmp_path, capsys):
    for package in ("openvino", "nncf", "onnxscript"):
        pytest.importorskip(package, reason=f"needs the package {package}")
    out, file = tmp_path / "run", tmp_path / "net.xml"
    options = {"patch": (16, 16, 16), "fold": 0, "folds": 4, "max_steps": 2, "device": "cpu", "validations": 1, "quiet": True}
    train(folder, out, model_kwargs=KWARGS | {"mixer": "linear_attention", "d_state": None}, **options)
    assert cli.main(["export", "openvino", str(out), str(file), "--int8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["error"] < 0.05
    assert "8-bit integers" in file.with_name(f"{file.name}.md").read_text()


def test_a_pruned_and_trained_run_is_a_run_like_any_other(run, tmp_path, capsys):
    out = tmp_path / "small"
    assert (
        cli.main(["compress", str(run), str(out), "--prune", "0.5", "--low-rank", "0.6", "--steps", "2", "--batches", "2", "--quiet", "--json"]) == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == ["prune", "factorize"] and result["validation"]["mean"] >= 0
    before, after = result["before"], result["after"]
    assert after["multiply_adds"] <= 0.5 * before["multiply_adds"]
    assert after["parameters"] < before["parameters"] and after["file"] == (out / "model.safetensors").stat().st_size < before["file"]
    assert not list(tmp_path.glob(".partial*"))

    # in a fresh process, from the files alone
    code = subprocess.run([sys.executable, "-c", LOGITS, str(out), str(tmp_path / "logits.pt")], capture_output=True, text=True)
    assert code.returncode == 0, code.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(networks.load(out)), atol=0, rtol=0)

    held_out = json.loads((out / "cases.json").read_text())["validation"][0]
    assert held_out["name"] == json.loads((run / "cases.json").read_text())["validation"][0]["name"]
    assert predict(out, held_out["images"][0], tmp_path / "labels", device="cpu", quiet=True)["failed"] == {}
    facts = _trained(out)
    assert facts["parameters"] == after["parameters"] and facts["multiply_adds"] == after["multiply_adds"]
    done = train(run.parent, out, resume=True, quiet=True)
    assert done["steps"] == 2 and done["out"] == str(out)
    assert cli.main(["export", "bundle", str(out), str(tmp_path / "bundle")]) == 2
    assert "compressed, and a bundle builds its network by name alone" in capsys.readouterr().err


def test_a_run_is_pruned_twice(run, tmp_path):
    compress(run, tmp_path / "once", prune=0.8, criterion="magnitude", steps=0, multiple=8, quiet=True)
    result = compress(tmp_path / "once", tmp_path / "twice", prune=0.8, criterion="magnitude", steps=0, multiple=8, quiet=True)
    assert result["steps"] == ["prune", "prune"] and result["validation"] == {}
    assert logits(networks.load(tmp_path / "twice")).shape == (1, 3, 16, 16, 16)


def test_a_student_learns_from_a_teacher(run, tmp_path):
    result = compress(run, tmp_path / "student", prune=0.5, distil=run, steps=2, batches=1, quiet=True)
    assert result["steps"] == ["prune"]
    again = train(run.parent, tmp_path / "student", resume=True, quiet=True)
    assert again["steps"] == 2
    assert "distil: " + str(run) in (tmp_path / "student/train.yaml").read_text()


def test_folded_norms_give_the_same_logits_and_nothing_is_trained(run, tmp_path):
    result = compress(run, tmp_path / "folded", fold_norms=True, quiet=True)
    assert result["steps"] == ["fold"]
    torch.testing.assert_close(logits(networks.load(tmp_path / "folded")), logits(networks.load(run)), atol=1e-4, rtol=1e-4)
    assert not (tmp_path / "folded/model_best.safetensors").exists()
    inference = r"its network has the step fold, which is for inference alone: take the run that it was made of"
    with pytest.raises(UserError, match=f"^run: {inference}"):
        compress(tmp_path / "folded", tmp_path / "no", prune=0.5, criterion="magnitude")
    with pytest.raises(UserError, match=f"^start: {inference}"):
        train(run.parent, tmp_path / "no", start=tmp_path / "folded")


def test_the_folder_where_one_stands(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compress(run, ".", fold_norms=True, quiet=True)["out"] == "." and (tmp_path / "model.safetensors").is_file()
    assert not list(tmp_path.parent.glob(".partial*"))


def test_eight_bits(run, tmp_path):
    result = compress(run, tmp_path / "int8", int8=True, batches=1, quiet=True)
    config = json.loads((tmp_path / "int8/config.json").read_text())  # what export prints is counted by it
    assert networks.count_parameters(config) == result["before"]["parameters"] > sum(p.numel() for p in networks.load(tmp_path / "int8").parameters())
    assert result["steps"] == ["int8"] and result["after"]["file"] < 0.6 * result["before"]["file"]
    one, two = logits(networks.load(tmp_path / "int8")), logits(networks.load(run))
    assert 0 < (one - two).abs().max() < 0.2 * two.std()
    with pytest.raises(UserError, match=r"^run: .*: its network is in 8 bits already"):
        compress(tmp_path / "int8", tmp_path / "again", int8=True)


def test_all_steps_at_once(run, tmp_path):
    out = tmp_path / "all"
    options = {"prune": 0.6, "low_rank": 0.7, "distil": run, "fold_norms": True, "int8": True, "steps": 1, "batches": 1}
    result = compress(run, out, **options, criterion="magnitude", quiet=True)
    assert result["steps"] == ["prune", "factorize", "fold", "int8"]
    assert result["after"]["file"] < 0.4 * result["before"]["file"]
    held_out = json.loads((out / "cases.json").read_text())["validation"][0]
    assert predict(out, held_out["images"][0], tmp_path / "labels", device="cpu", quiet=True)["failed"] == {}


def test_an_interrupted_training_goes_on(run, tmp_path, monkeypatch):
    step = Loop._step

    def stopped(loop, batch):
        if loop.done.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(loop, batch)

    options = {"prune": 0.5, "criterion": "magnitude", "steps": 3, "quiet": True}
    monkeypatch.setattr(Loop, "_step", stopped)
    with pytest.raises(Interrupted):
        compress(run, tmp_path / "stopped", **options)
    assert not (tmp_path / "stopped").exists()
    monkeypatch.setattr(Loop, "_step", step)
    compress(run, tmp_path / "stopped", **options, resume=True)
    steps = [json.loads(line)["step"] for line in (tmp_path / "stopped/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and 2 in steps and steps[-1] == 3  # a slow machine has a line of step 1 too


def test_a_failure_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "save", lambda *args: (_ for _ in ()).throw(UserError("the disk is full")))
    with pytest.raises(UserError, match="the disk is full"):
        compress(run, tmp_path / "out", prune=0.5, criterion="magnitude", steps=0)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_do_not_fit_the_steps_are_one_clear_line(run, tmp_path):
    compress(run, tmp_path / "small", prune=0.6, criterion="magnitude", steps=0, quiet=True)
    config = json.loads((tmp_path / "small/config.json").read_text())
    sizes = config["compression"][0]["sizes"]
    sizes[next(iter(sizes))] -= 1
    (tmp_path / "small/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"model\.safetensors: does not fit the network"):
        networks.load(tmp_path / "small")
    config["compression"][0]["sizes"] = {"encoder.nowhere": 3}
    (tmp_path / "small/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"^compression: the step 'prune' does not fit the network"):
        networks.load(tmp_path / "small")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected at least one of --prune, --low-rank, --distil, --fold-norms and --int8, got none"),
        (["--prune", "1.5"], "prune: expected a share of the multiply-adds to keep, above 0 and below 1, got 1.5"),
        (["--low-rank", "0"], "low_rank: expected a share of the multiply-adds to keep, above 0 and below 1, got 0.0"),
        (["--prune", "0.5", "--steps", "-1"], "steps: expected 0 or more, got -1"),
        (["--prune", "0.5", "--multiple", "6"], "multiple: expected a multiple of 4, got 6"),
        (["--prune", "0.5", "--batches", "0"], "batches: expected at least 1, got 0"),
        (["--distil", "nowhere"], "distil: nowhere: expected a folder that medssm train wrote, there is none"),
        (["--prune", "0.5", "--data", "nowhere"], "data: nowhere: no such file or folder"),
    ],
)
def test_wrong_options_are_one_clear_line(run, tmp_path, words, message, capsys):
    assert cli.main(["compress", str(run), str(tmp_path / "out"), *words, "--criterion", "magnitude"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"medssm compress: {message}") and shown.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_run_data_set_or_teacher_is_one_clear_line(run, folder, tmp_path):
    def refused(message, run=run, out=tmp_path / "out", **options):
        with pytest.raises(UserError, match=message):
            compress(run, out, **{"prune": 0.5, "criterion": "magnitude", "steps": 1, "quiet": True, **options})
        assert not (tmp_path / "out").exists()

    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    refused("^out: expected a new folder", out=tmp_path / "full")
    refused("^run: .*: no fitted.json in it: not written by medssm train", run=tmp_path / "full")
    refused("^run: .*: expected one network, got the folds run: name one of them", run=run.parent)
    refused("^run: .*: expected a folder that medssm train wrote, got a file", run=run / "config.json")
    refused("^steps: expected at least 1 to learn from a teacher, got 0", prune=None, distil=run, steps=0)
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    (unfinished / "model.safetensors").unlink()
    refused("^distil: .*model.safetensors: no such file", distil=unfinished)
    fitted = json.loads((run / "fitted.json").read_text())
    (unfinished / "fitted.json").write_text(json.dumps({**fitted, "task": "classify"}))
    (unfinished / "model.safetensors").touch()
    refused("^distil: .*: expected a network that segments, got a classifier", distil=unfinished)
    for argument in ("start", "distil"):
        with pytest.raises(UserError, match=f"^{argument}: .*: expected a network that segments, got a classifier"):
            train(folder, tmp_path / "no", **{argument: unfinished})
    other = nnunet_folder(tmp_path / "ct", shape=(24, 20, 16), channels=("CT",))
    refused(r"^dataset: .*: expected the channels that the network was trained for, MR, got CT", data=other)
    more = nnunet_folder(tmp_path / "more", cases=6, shape=(24, 20, 16))
    refused(r"^data: .*: expected the 3 training cases of .*, got \d: ", data=more)
    copied = tmp_path / "teacher"
    shutil.copytree(run, copied)
    cases = json.loads((copied / "cases.json").read_text())
    (copied / "cases.json").write_text(json.dumps({"training": cases["training"] + cases["validation"], "validation": []}))
    refused("^distil: .* was trained on 1 of the cases that are held out", distil=copied)
    fitted = json.loads((copied / "fitted.json").read_text())
    (copied / "fitted.json").write_text(json.dumps({**fitted, "spacing": [2.0, 1.0, 1.0]}))
    refused(r"^distil: expected a teacher with the spacing \(1\.0, 1\.0, 1\.0\), got \(2\.0, 1\.0, 1\.0\)", distil=copied)


def test_a_recipe_of_another_version(run, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(run, other)
    recipe = (other / "train.yaml").read_text()
    (other / "train.yaml").write_text(recipe.replace("distil: null\n", ""))
    assert compress(other, tmp_path / "out", low_rank=0.6, steps=0)["steps"] == ["factorize"]
    (other / "train.yaml").write_text(recipe + "melt: 3\n")
    with pytest.raises(UserError, match=r"^run: .*train\.yaml: medssm train of this version has no option melt"):
        compress(other, tmp_path / "no", low_rank=0.6)


def test_a_training_begins_with_a_trained_network(run, folder, tmp_path):
    result = train(folder, tmp_path / "on", start=run, fold=0, folds=4, max_steps=1, lr=1e-9, device="cpu", validations=0, quiet=True)
    assert result["patch"] == [16, 16, 16]
    before, after = (safetensors.torch.load_file(path / "model.safetensors") for path in (run, tmp_path / "on"))
    assert all(torch.allclose(before[key], after[key], atol=1e-5) for key in before if "running" not in key and "tracked" not in key)
    assert json.loads((tmp_path / "on/config.json").read_text()) == json.loads((run / "config.json").read_text())
