"""A volume over several ranks: every rank computes its part of what one process computes, forward and backward. One start serves all checks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.test_pages import blocks
from tests.parallel.ranks import run

PAGE = Path(__file__).resolve().parents[2] / "docs/guides/ranks.md"

SCANS = ["selective_scan", "ssd", "ssd3", "gated_linear_attention", "delta_rule", "causal_conv1d", "linear_attention", "selective_scan_nd", "bi_wkv"]
NETWORKS = ["networks", "deep_supervision", "inference"]


def test_two_ranks_compute_what_one_process_does(tmp_path):
    run(2, [*SCANS, "depthwise_conv", "shifts", "layers", *NETWORKS, "other_axes", "errors", "late"], tmp_path)


@pytest.mark.thorough
def test_four_ranks_compute_what_one_process_does(tmp_path):
    """There are ranks between the first and the last of a walk: their decays count too."""
    run(4, [*SCANS, "depthwise_conv", "shifts", *NETWORKS, "other_axes_of_every_mixer"], tmp_path)


@pytest.mark.thorough
def test_the_guides_lines_start_two_processes(tmp_path):
    """torchrun's, and SLURM's with stand-ins for its commands that know this machine alone; alone the script gives the same loss."""
    (tmp_path / "slabs.py").write_text(blocks(PAGE, "python")[0][1])
    for name, body in (("srun", 'exec "$@"'), ("scontrol", "echo localhost")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    known = {"SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": ""}
    lines = [code for _, code in blocks(PAGE, "bash") if "torchrun" in code]
    assert len(lines) == 2
    said = []
    for line in (*lines, f"{sys.executable} slabs.py"):
        found = subprocess.run(
            ["sh", "-c", line], cwd=tmp_path, env={**os.environ, **known, "PATH": path}, capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, found.stderr
        said.append(found.stdout.strip())
    assert said[0].startswith("loss 0.") and said[0] == said[1] == said[2]
