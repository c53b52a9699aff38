"""A rank that is killed or stopped in the middle of a step on slabs: the others end with one clear line that names it."""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from medssm.parallel import RankError, Slabs
from tests.parallel.ranks import PRELOADED


@pytest.mark.parametrize(
    ("count", "signals"),
    [(2, {1: "SIGKILL"}), *(pytest.param(*case, marks=pytest.mark.thorough) for case in [(3, {1: "SIGSTOP"}), (4, {2: "SIGKILL"})])],
)
def test_the_others_name_the_rank(count, signals, tmp_path):
    mp.set_forkserver_preload(PRELOADED)
    processes = mp.start_processes(_train, (count, str(tmp_path), signals), nprocs=count, join=False, start_method="forkserver").processes
    try:
        for rank, process in enumerate(processes):
            if rank not in signals:
                process.join(120)
                assert process.exitcode == 3, rank
    finally:
        for process in processes:
            process.kill()
    (gone,) = signals
    for rank in set(range(count)) - {gone}:
        line = (tmp_path / f"rank-{rank}").read_text()
        assert line.startswith(f"rank {rank}: rank {gone} of {count} has ended, or did not answer in time (") and "\n" not in line
    assert torch.load(tmp_path / "step-1.pt", weights_only=True)


def _train(rank, count, folder, signals):
    """Steps on slabs; at the second one's backward a rank gets its signal."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count, timeout=timedelta(seconds=5))
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.InstanceNorm3d(2), nn.Conv3d(2, 2, 3, padding=1))
    slabs = Slabs(network, (8, 4, 4), multiple=1)
    x = slabs.split(torch.randn(1, 1, 8, 4, 4)).requires_grad_()

    def get_signal(gradient):
        if rank in signals and step == 2:
            os.kill(os.getpid(), getattr(signal, signals[rank]))

    network[0].weight.register_hook(get_signal)
    try:
        for step in range(1, 100):
            network.zero_grad()
            with slabs:
                loss = network(x).square().sum()
            loss.backward()
            slabs.add_gradients(network)
            if rank == 0:
                torch.save(network.state_dict(), Path(folder, f"step-{step}.pt"))
    except RankError as error:
        Path(folder, f"rank-{rank}").write_text(str(error))
        sys.exit(3)
