"""bench/gpu.py without a GPU: it runs from end to end at toy sizes, and the peers' sides compute what ours do."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

# The peers' calls go to the stand-in here: so what is checked is how their inputs are laid out.
SAME = """
import torch
import medssm.integrations.mamba_ssm as stand_in
stand_in.install()
import mamba_ssm
from gpu_parts import mixers, peers, rows, timing
from medssm import ops
rows.served = mixers.served = lambda op: ["native"]
peers.mamba_chunk_scan = lambda: (lambda x, dt, A, B, C, chunk, D, z, dt_softplus: ops.ssd(x, dt, A, B, C, D, z, dt_softplus=dt_softplus), None)
checked = 0
for row in rows.rows(True):
    sides, _ = row.make(timing.Floor.of(True), True)
    peer = next((name for name in sides if name not in ("native", "fla chunk_hgrn")), None)
    if peer is None:
        continue
    ours, theirs = sides["native"](0), sides[peer](0)
    if isinstance(ours, tuple):
        ours, theirs = ours[0], theirs[0]  # the gradient of the first input
    if ours.shape != theirs.shape:  # channels first
        ours, theirs = ours.flatten(1, -2), theirs.flatten(2).transpose(1, 2)
    error = float((ours.double() - theirs.double()).abs().max() / ours.double().abs().max())
    assert error < 0.03, (row.title, error)
    checked += 1
print(checked)
"""


def python(*arguments, **changes):
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'bench'}", **changes}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=env, capture_output=True, text=True)


def test_the_sides_of_a_row_do_the_same_work():
    done = python("-c", SAME)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) >= 22


def test_without_a_gpu_it_says_so(tmp_path):
    done = python("bench/gpu.py", "--out", tmp_path)
    assert done.returncode == 2 and "torch finds no GPU" in done.stderr and not list(tmp_path.iterdir())


def test_a_rehearsal_runs_every_check_and_row(tmp_path):
    done = python("bench/gpu.py", "--rehearse", "--out", tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["rehearsal"] and not [name for name, outcome in results["checks"].items() if outcome["failed"]]
    assert len(results["rows"]) > 15 and "Goals" in (tmp_path / "gpu.md").read_text() and (tmp_path / "gpu.png").stat().st_size
    assert "a rehearsal" in done.stdout
