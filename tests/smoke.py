"""What an installed package must do: `python tests/smoke.py [--kernels]` with the Python it is installed in. --kernels: the compiled ones serve."""

import json
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import torch

import medssm

assert "site-packages" in medssm.__file__ and metadata.version("medssm") == medssm.__version__, medssm.__file__

scan = (torch.randn(1, 20, 4), torch.rand(1, 20, 4), -torch.rand(4, 3), torch.randn(1, 20, 3), torch.randn(1, 20, 3))
chosen = medssm.explain("selective_scan", *scan)["chosen"]
assert chosen == ("native" if "--kernels" in sys.argv else "reference"), chosen

network = medssm.create_model("medssm_unet", spatial_dims=3, in_channels=1, out_channels=2, size="tiny")
out = network(torch.randn(1, 1, 32, 32, 32))
out.square().mean().backward()
assert out.shape == (1, 2, 32, 32, 32) and all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)

command = Path(sysconfig.get_path("scripts")) / "medssm"
report = json.loads(subprocess.run([command, "doctor", "--json"], check=True, stdout=subprocess.PIPE).stdout)
assert not report["failed"] and report["medssm"] == medssm.__version__, report
print(f"medssm {medssm.__version__} works: {chosen} kernels, torch {torch.__version__}, Python {sys.version.split()[0]}")
