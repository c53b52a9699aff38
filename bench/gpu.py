"""Everything that needs a GPU, in one command of under eight minutes: python bench/gpu.py [--out bench/results] [--peers FOLDER] [--rehearse]

Correctness first: the contract suite on CUDA tensors for the Triton and the CUDA backend, compute-sanitizer on a small case of each kernel, offsets
beyond 2**31, a second stream, graph capture and replay, compile and autocast, equal bits, memory. Then the table of times against what a user would
run instead and against the floors. Writes gpu.json, gpu.md and gpu.png; the summary comes last; exits with 1 where a check failed.

--peers: a folder with a built mamba_ssm (and causal_conv1d) and fla; a peer that does not import is reported absent. --rehearse: everything at toy
sizes, on the CPU where there is no GPU (MEDSSM_CUDA_LIBRARY=an emulated library, TRITON_INTERPRET=1): the script runs, its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from gpu_parts import checks, report, rows, timing  # noqa: E402 (found by the path above)
from gpu_parts.row import measure  # noqa: E402 (found by the path above)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    if args.peers:
        sys.path.insert(0, str(args.peers.resolve()))
    machine = report.machine()
    if machine["device"] is None and not args.rehearse:
        parser.error("torch finds no GPU; --rehearse runs everything at toy sizes without one")
    begun = time.perf_counter()
    results = {"machine": machine, "rehearsal": args.rehearse, "checks": {}, "rows": []}
    for name, check in checks.CHECKS.items():
        results["checks"][name] = outcome = checks.outcome(check, args.rehearse)
        print(f"{time.perf_counter() - begun:5.0f} s  {name}: {outcome['said']}", flush=True)
    floor = timing.Floor.of(args.rehearse)
    results["floor"] = floor.describe()
    for row in rows.rows(args.rehearse):
        results["rows"].append(measure(row, floor, args.rehearse))
        print(f"{time.perf_counter() - begun:5.0f} s  {report.line(results['rows'][-1])}", flush=True)
    results["seconds"] = time.perf_counter() - begun
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "gpu.md").write_text(report.markdown(results))
    report.plot(results, args.out / "gpu.png")
    print(report.summary(results))
    return int(any(outcome["failed"] for outcome in results["checks"].values()))


if __name__ == "__main__":
    sys.exit(main())
