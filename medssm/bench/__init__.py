"""medssm bench: our kernels against what people run on a CPU today and against the processor's ceiling, all in one run."""

from __future__ import annotations

import fnmatch
import subprocess
import time
from functools import partial
from pathlib import Path

import torch

from medssm import machine, ops
from medssm.bench import apart, measure, mixers, networks, page, report
from medssm.bench.goals import judge
from medssm.bench.peers import PEERS, installed
from medssm.bench.row import OURS
from medssm.bench.rows import QUICK, ROWS
from medssm.bench.scans import channel_first, scan_inputs
from medssm.errors import UserError
from medssm.files import read_json
from medssm.kernels import native
from medssm.kernels.selective_scan.plan import chunks
from medssm.models import list_models
from medssm.nn.mixers import MIXERS

_SECONDS = 4.0  # for the rounds of one row and number of threads
_LENGTHS = tuple(2**i for i in range(10, 22))


def add_arguments(parser) -> None:
    parser.add_argument("--rows", default="*", help=f"shell pattern of rows (default all: {', '.join(ROWS)}); 'lengths' is the plot")
    parser.add_argument("--networks", nargs="?", const="*", metavar="PATTERN", help="whole networks instead of ops: shell pattern (default all)")
    parser.add_argument(
        "--mixers", nargs="?", const="*", metavar="PATTERN", help=f"medssm_unet's mixers on a volume instead (default all: {', '.join(MIXERS)})"
    )
    parser.add_argument("--docs", metavar="PAGE", help="of --mixers: put the table into this page too (docs/mixers.md)")
    parser.add_argument("--out", help="folder for results.json, results.md and lengths.png, or networks.json, or mixers.json (default: print alone)")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="for the rounds of each row (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, in seconds: to see it work")


def run(args) -> dict:
    """Measure; with --out the files are written anew after every row, so that an interrupted run keeps what it has."""
    if native.reason():
        raise UserError(f"the benchmark needs the compiled kernels: {native.reason()}")
    if args.networks:
        return _networks(args)
    if args.mixers:
        return _mixers(args)
    table = QUICK if args.quick else ROWS
    chosen = [name for name in table if fnmatch.fnmatch(name, args.rows)]
    lengths = not args.quick and fnmatch.fnmatch("lengths", args.rows)
    if not chosen and not lengths:
        raise UserError(f"--rows: expected a pattern of {', '.join((*table, 'lengths'))}, got {args.rows!r}")
    absent = [name for name in PEERS if not installed(name)]
    about = _about()
    results = about | {"threads": torch.get_num_threads(), "absent": absent, "rows": {}, "extra": _extra()}
    kept = {} if args.quick else _earlier(args.out, "results.json", results)
    results |= {"lengths": kept["lengths"]} if "lengths" in kept else {}
    results["rows"] = {name: {key: kept[key] for key in ("commit", "date")} | row for name, row in kept.get("rows", {}).items()}
    for name in chosen:
        row = apart.row(name, 0.1 if args.quick else args.seconds, args.quick) | {key: about[key] for key in ("commit", "date")}
        results["rows"] = {key: row if key == name else results["rows"][key] for key in table if key == name or key in results["rows"]}
        _keep(results, args, report.markdown({**results, "rows": {name: row}}).split("\n\n## ", 1)[-1])
    if lengths:
        results["lengths"] = {}
        for points in _lengths(results["lengths"]):
            _keep(results, args, points)
    if not args.quick:  # the goals are about full-sized rows
        results["goals"] = [goal._asdict() for goal in judge(results)]
    _keep(results, args, "")
    if not (args.json or args.quiet or args.quick):
        for goal in results["goals"]:
            mark = {None: "      ", True: "met   ", False: "MISSED"}[goal["met"]]
            print(f"{mark} {goal['name']}: {goal['reached']} ({goal['wanted']})")
    return results


def _networks(args) -> dict:
    names = list_models(args.networks)
    if not names:
        raise UserError(f"--networks: expected a pattern of {', '.join(list_models('*'))}, got {args.networks!r}")
    results = _about()
    results["networks"] = _earlier(args.out, "networks.json", results).get("networks", {})
    for name in names:
        figures = networks.network(name, args.quick) | {key: results[key] for key in ("commit", "date")}
        results["networks"] = dict(sorted((results["networks"] | {name: figures}).items()))
        if args.out:
            report.write_networks(results, Path(args.out))
        if not (args.json or args.quiet):
            print(report.network_line(name, figures), flush=True)
    return results


def _mixers(args) -> dict:
    names = [name for name in MIXERS if fnmatch.fnmatch(name, args.mixers)]
    if not names:
        raise UserError(f"--mixers: expected a pattern of {', '.join(MIXERS)}, got {args.mixers!r}")
    if args.docs and not args.out:
        raise UserError("--docs: goes with --out, the folder that the figures are kept in")
    results = _about()
    results["mixers"] = _earlier(args.out, "mixers.json", results).get("mixers", {})
    for name in names:
        figures = mixers.mixer(name, args.quick) | {key: results[key] for key in ("commit", "date")}
        found = results["mixers"] | {name: figures}
        results["mixers"] = {each: found[each] for each in MIXERS if each in found}
        if args.out:
            page.write(results, Path(args.out), Path(args.docs) if args.docs else None)
        if not (args.json or args.quiet):
            print(page.line(name, figures), flush=True)
    return results


def _earlier(out: str | None, name: str, results: dict) -> dict:
    """The results of an earlier run in `out`, each with its own commit and date; {} when there are none or another machine measured them."""
    if not out or not (Path(out) / name).is_file():
        return {}
    kept = read_json(Path(out) / name)
    same = all(kept["machine"][key] == results["machine"][key] for key in ("processor", "cores", "threads", "GPU", "torch"))
    return kept if same else {}


def _about() -> dict:
    return {"date": time.strftime("%Y-%m-%d"), "commit": _commit(), "machine": machine.describe()}


def _extra() -> dict:
    """Figures that are no comparison of sides."""
    tiny = scan_inputs(1, 16, 1, 16)
    with torch.no_grad():
        overhead = measure.call_overhead(partial(ops.selective_scan, *tiny.values(), True))
        x, w = torch.randn(1, 4, 16), torch.randn(16, 4)
        convolution = measure.call_overhead(lambda: ops.causal_conv1d(x, w))
    return {"overhead_us": overhead * 1e6, "causal_conv1d_overhead_us": convolution * 1e6, "checkpoint_share": chunks(4096, 16) * 16 / 4096}


def _lengths(into: dict):
    """Seconds of a forward of 96 channels against length, up to two million tokens; a peer stops where a call takes over 4 s or 6 GB."""
    live = {OURS: None, **{name: PEERS[name] for name in PEERS if installed(name)}}
    for length in _LENGTHS:
        tensors = scan_inputs(1, 96, length, 16)
        for name in list(live):
            peer = live[name]
            if peer is not None and length * 96 * 16 * 4 * 4 > 6e9:
                del live[name]
                continue
            side_inputs = tensors if peer is None else channel_first(tensors)
            side = (
                (lambda t=side_inputs: ops.selective_scan(**t, delta_softplus=True, backend="native"))
                if peer is None
                else (lambda t=side_inputs, p=peer: p(**t))
            )
            with torch.no_grad():
                taken = measure.times({name: side}, 0.3, 1, limit=1.0)[name]["min"]
            into.setdefault(name, []).append((length, taken))
            if peer is not None and taken > 4:
                del live[name]
        yield f"{length} tokens: " + ", ".join(f"{name} {points[-1][1] * 1e3:.1f} ms" for name, points in into.items() if points[-1][0] == length)


def _keep(results: dict, args, text: str) -> None:
    if args.out:
        report.write(results, Path(args.out))
    if text and not (args.json or args.quiet):
        print(text, flush=True)


def _commit() -> str:
    """The checkout's commit, "-dirty" where its code was changed since, or the version of an installed package."""
    import medssm

    root = Path(medssm.__file__).resolve().parent.parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    if commit.returncode:
        return f"version {medssm.__version__}"
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "medssm", "kernels", "csrc"], cwd=root).returncode
    return commit.stdout.strip() + "-dirty" * changed
