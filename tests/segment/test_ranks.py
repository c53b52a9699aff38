"""Several processes: training shares the batch, prediction the volume."""

import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medssm import cli
from medssm.segment.predict import predict
from tests.segment.synthetic import nnunet_folder, volume, write
from tests.segment.test_stream import weights


def run(*words):
    return subprocess.run([sys.executable, "-m", "medssm.cli", *map(str, words)], capture_output=True, text=True, check=False)


def mean_loss(folder):
    """Over all steps: a line of the log is the mean of those since the line before it, which are as many as the time allows."""
    records = [record for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in record]
    before = [0, *(record["step"] for record in records)]
    return sum(record["loss"] * (record["step"] - first) for record, first in zip(records, before, strict=False)) / before[-1]


@pytest.mark.thorough
def test_two_processes_train_as_one_with_the_double_batch(tmp_path):
    """All patches are the same here, since they are the whole case: so every process has the samples of the one."""
    data = nnunet_folder(tmp_path / "data", 1, (16, 16, 16))
    recipe = [
        "--size",
        "tiny",
        "--device",
        "cpu",
        "--precision",
        "32-true",
        "--patch",
        16,
        16,
        16,
        "--mirror",
        "none",
        "--no-augment",
        "--optimizer",
        "sgd",
        "--max-steps",
        3,
    ]
    one = run("train", data, tmp_path / "one", *recipe, "--batch", 2)
    assert one.returncode == 0, one.stderr
    two = run("train", data, tmp_path / "two", *recipe, "--batch", 1, "--devices", 2, "--strategy", "ddp")
    assert two.returncode == 0, two.stderr
    assert "2 process(es)" in two.stderr + two.stdout
    np.testing.assert_allclose(mean_loss(tmp_path / "two"), mean_loss(tmp_path / "one"), rtol=1e-4)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for key, value in first.items():
        torch.testing.assert_close(second[key].float(), value.float(), rtol=1e-3, atol=1e-4, msg=key)


def test_fsdp_on_a_cpu_is_one_clear_error(tmp_path, capsys):
    data = nnunet_folder(tmp_path / "data", 1, (16, 16, 16))
    assert cli.main(["train", str(data), str(tmp_path / "run"), "--device", "cpu", "--devices", "2", "--strategy", "fsdp"]) == 2
    assert "strategy fsdp" in capsys.readouterr().err


@pytest.mark.thorough
def test_ranks_predict_what_one_process_streams(tmp_path):
    (tmp_path / "run").mkdir()
    weights(tmp_path / "run")
    scan = write(tmp_path / "a.nii.gz", volume(7, (37, 26, 19))[0][..., 0])
    options = {"save_probabilities": True, "mirror": True, "quiet": True}
    predict(tmp_path / "run", scan, tmp_path / "streamed.nii.gz", stream=True, **options)
    predict(tmp_path / "run", scan, tmp_path / "shared.nii.gz", ranks=2, **options)
    wanted, found = (np.asarray(nib.load(tmp_path / f"{name}_probabilities.nii.gz").dataobj) for name in ("streamed", "shared"))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert wanted.std() > 0.01


@pytest.mark.parametrize(
    ("options", "expected"),
    [(["--ranks", "0"], "ranks: expected 1 or more"), (["--ranks", "2", "--stream"], "ranks: neither stream nor dropout is possible over ranks")],
)
def test_errors(tmp_path, capsys, options, expected):
    weights(tmp_path)
    scan = write(tmp_path / "a.nii.gz", volume(7, (8, 8, 8))[0][..., 0])
    assert cli.main(["predict", str(tmp_path), str(scan), str(tmp_path / "out.nii.gz"), *options]) == 2
    assert expected in capsys.readouterr().err


def test_a_network_that_does_not_work_over_ranks_is_named(tmp_path, capsys):
    weights(tmp_path, name="umamba_bot", features=(4, 8))
    scan = write(tmp_path / "a.nii.gz", volume(7, (8, 8, 8))[0][..., 0])
    assert cli.main(["predict", str(tmp_path), str(scan), str(tmp_path / "out.nii.gz"), "--ranks", "2"]) == 2
    assert "is no layer that is known to work on slabs" in capsys.readouterr().err
