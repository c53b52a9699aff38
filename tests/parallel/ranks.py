"""Runs checks on several local processes."""

import os
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOADED = ["torch", "medssm.models", "medssm.parallel", "tests.parallel.checks", "tests.segment.dying", "medssm.segment.train"]
TIMEOUT = 30  # seconds that a rank waits for another one, whose check may have failed


def run(count, checks, folder):
    """Run functions of tests.parallel.checks, the same on all ranks; AssertionError says what went wrong first."""
    mp.set_forkserver_preload(PRELOADED)
    mp.start_processes(_work, (count, str(folder), checks), nprocs=count, start_method="forkserver")
    wrong = [file.read_text() for file in sorted(Path(folder).glob("rank-*"))]
    assert not wrong, "\n".join(wrong)


def _work(rank, count, folder, names):
    from tests.parallel import checks

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count, timeout=timedelta(seconds=TIMEOUT))
    for name in names:
        try:
            getattr(checks, name)()
        except (Exception, pytest.fail.Exception):
            Path(folder, f"rank-{rank}").write_text(f"rank {rank}, {name}: {traceback.format_exc()}")
            return
    dist.destroy_process_group()
