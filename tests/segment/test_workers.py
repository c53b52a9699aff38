"""Worker processes are forked after parallel regions have run: they must not start one themselves, where they would wait for ever."""

import subprocess
import sys

CODE = """
import torch
from medssm import ops

torch.set_num_threads(2)

def scan():
    u, A, B = torch.rand(1, 256, 64), -torch.rand(64, 16), torch.rand(1, 256, 16)
    return ops.selective_scan(u, u, A, B, B, backend="native") + u @ torch.rand(64, 64)

class Patches(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.get_num_threads(), scan()

scan()
for threads, _ in torch.utils.data.DataLoader(Patches(), batch_size=1, num_workers=2, multiprocessing_context="fork"):
    assert int(threads) == 1, threads
print("done")
"""


def test_a_forked_worker_computes_on_one_thread_after_a_parallel_region():
    """PyTorch's DataLoader, which `train --workers` uses, gives each worker one thread."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "done", done.stderr
