"""A process that is killed or stopped: the others end with one clear line, what was done is there and can be gone on with."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from tests.parallel.ranks import PRELOADED
from tests.segment.dying import member
from tests.segment.synthetic import nnunet_folder, volume, write
from tests.segment.test_stream import weights
from tests.segment.test_train import COMMAND

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SCRIPT = str(Path(__file__).with_name("dying.py"))
TRAINING = [*COMMAND, "--devices", "2", "--strategy", "ddp", "--rank-timeout", "10", "--save-seconds", "0", "--quiet"]
MARKED = pytest.mark.thorough


def ended(script, words):
    """(exit status, what it said on standard error) of a command; `dying.py` where `script` has its first arguments."""
    command = [sys.executable, *([SCRIPT, *map(str, script)] if script else ["-m", "medssm.cli"]), *map(str, words)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stderr


def the_line(said, command):
    lines = [line for line in said.splitlines() if re.search(r"rank \d", line)]
    assert len(lines) == 1 and "Traceback" not in said, said
    assert lines[0].startswith(command), lines[0]
    return lines[0]


@pytest.mark.parametrize("how", [(1, "SIGKILL"), pytest.param((0, "SIGKILL"), marks=MARKED), pytest.param((1, "SIGSTOP"), marks=MARKED)])
def test_a_training_ends_when_another_process_does(how, tmp_path):
    data, out = nnunet_folder(tmp_path / "data", 2, (16, 16, 16)), tmp_path / "run"
    words = [*map(str, ("train", data, out)), *TRAINING, "--max-steps", "1000"]
    mp.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    given = (2, port, str(tmp_path), (*how, 4), words)
    processes = mp.start_processes(member, given, nprocs=2, join=False, start_method="forkserver").processes
    try:
        left = 1 - how[0]
        processes[left].join(600)
        assert processes[left].exitcode == 2
    finally:
        for process in processes:
            process.kill()
    line = the_line((tmp_path / str(left)).read_text(), "medssm train: ")
    assert f"rank {how[0]} of 2 has ended, or did not answer in time" in line and line.endswith(f"go on with --resume from {out}/checkpoint.pt")
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 3
    assert not (out / "model.safetensors").exists()


@MARKED
@pytest.mark.parametrize("rank", [0, 1])
def test_a_training_goes_on_where_it_was(rank, tmp_path):
    data, out = nnunet_folder(tmp_path / "data", 2, (16, 16, 16)), tmp_path / "run"
    status, said = ended((rank, "SIGKILL", 4), ["train", data, out, *TRAINING, "--max-steps", 6])
    assert status and f"rank {rank} of 2 has ended" in the_line(said, "medssm train: ")
    status, said = ended((), ["train", data, out, *TRAINING, "--max-steps", 6, "--resume"])
    assert status == 0, said
    status, said = ended((), ["train", data, tmp_path / "whole", *TRAINING, "--max-steps", 6])
    assert status == 0, said
    torch.testing.assert_close(*(load_file(folder / "model.safetensors") for folder in (out, tmp_path / "whole")))


@MARKED
@pytest.mark.parametrize("how", [(1, "SIGKILL"), (1, "SIGSTOP")])
def test_a_prediction_ends_when_another_process_does(how, tmp_path):
    (tmp_path / "run").mkdir()
    weights(tmp_path / "run")
    for name in ("a", "b"):
        write(tmp_path / "scans" / f"{name}.nii.gz", volume(7, (37, 8, 8))[0][..., 0])
    words = ["predict", tmp_path / "run", tmp_path / "scans", tmp_path / "out", "--ranks", 2, "--rank-timeout", 10]
    status, said = ended((*how, 2), words)
    assert status
    line = the_line(said, "medssm predict: ranks: ")
    assert f"rank {how[0]} of 2 has ended" in line
    left = {file.name for file in (tmp_path / "out").iterdir()}
    assert "a.nii.gz" in left and "b.nii.gz" not in left
    assert left <= {"a.nii.gz", "volumes.csv"} and line.endswith("--skip-existing goes on after them")
    assert np.asarray(nib.load(tmp_path / "out" / "a.nii.gz").dataobj).shape == (37, 8, 8)
    status, said = ended((), [*words, "--skip-existing"])
    assert status == 0, said
    assert (tmp_path / "out" / "b.nii.gz").exists()
