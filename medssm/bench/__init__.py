"""medssm bench: our kernels against what people run on a CPU today and against the processor's ceiling, all in one run."""

from __future__ import annotations

import fnmatch
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch

from medssm import machine, ops
from medssm.bench import apart, measure, mixers, networks, page, report
from medssm.bench.goals import judge
from medssm.bench.network_goals import network_goals
from medssm.bench.peers import PEERS, absent, installed
from medssm.bench.row import OURS
from medssm.bench.rows import QUICK, ROWS
from medssm.bench.scans import channel_first, scan_inputs
from medssm.errors import UserError
from medssm.files import read_json
from medssm.kernels import native
from medssm.kernels.selective_scan.plan import chunks
from medssm.models import list_models
from medssm.nn.mixers import MIXERS
from medssm.options import Option

_LENGTHS = tuple(2**i for i in range(10, 22))


def bench(
    *,
    rows: str = "*",
    networks: Annotated[str | None, Option(alone="*")] = None,
    mixers: Annotated[str | None, Option(alone="*")] = None,
    out: Path | str | None = None,
    docs: Path | str | None = None,
    seconds: float = 4.0,
    quick: bool = False,
    compiled: bool = False,
    resume: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Time our kernels on this machine against what people run on a CPU today and against the processor's ceiling, all in one run.

    With `out` the files are written anew after every row, so that an interrupted run keeps what it has measured.

    Args: What is measured
        rows: shell pattern of the rows; lengths is the plot of time against length; a pattern that fits none lists them
        networks: whole networks instead of ops: a shell pattern of their names (without one: all)
        mixers: medssm_unet's mixers on a volume instead: a shell pattern of their names (without one: all)
    Args: How
        out: folder for results.json, results.md and lengths.png, or networks.json, or mixers.json; without it the results are printed only
        docs: with `mixers`, put the table into this page too (docs/mixers.md)
        seconds: for the rounds of each row
        quick: tiny shapes, in seconds: to see it work
        compiled: with `networks`, also what torch.compile makes of each, which takes it a minute or more
        resume: with `networks` or `mixers`, leave out those of which `out` has figures

    Returns:
        The results, as the JSON file holds them.

    Raises:
        UserError: a pattern fits nothing, or the compiled kernels are missing.
    """
    if native.reason():
        raise UserError(f"the benchmark needs the compiled kernels: {native.reason()}")
    folder = Path(out) if out else None
    if networks:
        return _networks(networks, folder, quick, compiled, resume, quiet)
    if mixers:
        return _mixers(mixers, folder, Path(docs) if docs else None, quick, resume, quiet)
    return _rows(rows, folder, seconds, quick, quiet)


def show(result: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Print which goals are met; what was measured is printed as it comes."""
    for goal in result.get("goals", ()):
        mark = {None: "      ", True: "met   ", False: "MISSED"}[goal["met"]]
        print(f"{mark} {goal['name']}: {goal['reached']} ({goal['wanted']})")


def _rows(pattern: str, out: Path | None, seconds: float, quick: bool, quiet: bool) -> dict[str, Any]:
    table = QUICK if quick else ROWS
    chosen = [name for name in table if fnmatch.fnmatch(name, pattern)]
    lengths = not quick and fnmatch.fnmatch("lengths", pattern)
    if not chosen and not lengths:
        raise UserError(f"--rows: expected a pattern of {', '.join((*table, 'lengths'))}, got {pattern!r}")
    about = origin()
    results = about | {"threads": torch.get_num_threads(), "absent": absent(), "rows": {}, "extra": _extra()}
    kept = {} if quick else _earlier(out, "results.json", results)
    results |= {"lengths": kept["lengths"]} if "lengths" in kept else {}
    results["rows"] = {name: {key: kept[key] for key in ("commit", "date")} | row for name, row in kept.get("rows", {}).items()}

    def keep(text: str) -> None:
        if out:
            report.write(results, out)
        if text and not quiet:
            print(text, flush=True)

    if results["absent"] and not quiet:
        print(f"not installed: {', '.join(results['absent'])}; rows lack these sides", flush=True)
    for name in chosen:
        row = apart.row(name, 0.1 if quick else seconds, quick) | {key: about[key] for key in ("commit", "date")}
        results["rows"] = _inserted(results["rows"], name, row, table)
        keep(report.markdown({**results, "rows": {name: row}}).split("\n\n## ", 1)[-1])
    if lengths:
        results["lengths"] = {}
        for points in _lengths(results["lengths"]):
            keep(points)
    if not quick:  # the goals are about full-sized rows
        results["goals"] = [goal._asdict() for goal in judge(results)]
    keep("")
    return results


def _networks(pattern: str, out: Path | None, quick: bool, compiled: bool, resume: bool, quiet: bool) -> dict[str, Any]:
    names = list_models(pattern)
    if not names:
        raise UserError(f"--networks: expected a pattern of {', '.join(list_models('*'))}, got {pattern!r}")

    def write(results: dict[str, Any]) -> None:
        if out:
            report.write_networks(results, out)

    measured = partial(networks.network, quick=quick, compiled=compiled)
    results = _each("networks", names, sorted(list_models("*")), measured, report.network_line, write, out, quick, resume, quiet)
    return results if quick else {**results, "goals": [goal._asdict() for goal in network_goals(results["networks"])]}


def _mixers(pattern: str, out: Path | None, docs: Path | None, quick: bool, resume: bool, quiet: bool) -> dict[str, Any]:
    names = [name for name in MIXERS if fnmatch.fnmatch(name, pattern)]
    if not names:
        raise UserError(f"--mixers: expected a pattern of {', '.join(MIXERS)}, got {pattern!r}")
    if docs and not out:
        raise UserError("--docs: goes with --out, the folder that the figures are kept in")

    def write(results: dict[str, Any]) -> None:
        if out:
            page.write(results, out, docs)

    return _each("mixers", names, MIXERS, partial(mixers.mixer, quick=quick), page.line, write, out, quick, resume, quiet)


def _each(
    kind: str,
    names: Sequence[str],
    order: Iterable[str],
    measured: Callable[[str], dict[str, Any]],
    line: Callable[[str, dict[str, Any]], str],
    write: Callable[[dict[str, Any]], None],
    out: Path | None,
    quick: bool,
    resume: bool,
    quiet: bool,
) -> dict[str, Any]:
    """Measure each of `names` into results[kind], written and printed one by one; earlier results of this machine in `out` stay, and with `resume`
    they are not measured again, but for quick ones where these are not. UserError names those that failed, once the others are measured."""
    results, failed = origin(), list[str]()
    results[kind] = _earlier(out, f"{kind}.json", results).get(kind, {})
    for name in names:
        if resume and name in results[kind] and results[kind][name].get("quick", False) == quick:
            continue
        try:
            figures = measured(name) | {key: results[key] for key in ("commit", "date")} | ({"quick": True} if quick else {})
        except RuntimeError as error:  # of the process that measures it, which has said more
            print(error, file=sys.stderr)
            failed.append(name)
            continue
        results[kind] = _inserted(results[kind], name, figures, order)
        write(results)
        if not quiet:
            print(line(name, figures), flush=True)
    if failed:
        raise UserError(f"not measured: {', '.join(failed)}; --resume measures them alone")
    return results


def _inserted(table: Mapping[str, Any], name: str, value: Any, order: Iterable[str]) -> dict[str, Any]:
    """`table` with one entry more or replaced, in the given order of names."""
    table = {**table, name: value}
    return {each: table[each] for each in order if each in table}


def _earlier(out: Path | None, name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """The results of an earlier run in `out`, each with its own commit and date; {} if there are none or another machine measured them."""
    if not out or not (out / name).is_file():
        return {}
    kept = read_json(out / name)
    return kept if _same(kept["machine"], results["machine"]) else {}


def _same(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two descriptions are of one machine. Hosts call different processors by one name, so the kernels' instruction set counts too."""
    kernels = (about["medssm"].partition(" ")[2] for about in (one, other))  # behind the version
    return len(set(kernels)) == 1 and all(one[key] == other[key] for key in ("processor", "cores", "threads", "GPU", "torch"))


def origin() -> dict[str, Any]:
    return {"date": time.strftime("%Y-%m-%d"), "commit": machine.commit(), "machine": machine.describe()}


def _extra() -> dict[str, float]:
    """Figures that are not a comparison of sides: the overhead of a call, and the size of what is kept for the backward."""
    u, delta, A, B, C, D, z, bias = scan_inputs(1, 16, 1, 16).values()
    with torch.no_grad():
        overhead = measure.call_overhead(partial(ops.selective_scan, u, delta, A, B, C, D, z, bias, True))
        x, w = torch.randn(1, 4, 16), torch.randn(16, 4)
        convolution = measure.call_overhead(lambda: ops.causal_conv1d(x, w))
    return {"overhead_us": overhead * 1e6, "causal_conv1d_overhead_us": convolution * 1e6, "checkpoint_share": chunks(4096, 16) * 16 / 4096}


def _lengths(into: dict[str, list[tuple[int, float]]]) -> Iterator[str]:
    """Seconds of a forward of 96 channels against length, up to two million tokens, as (length, seconds) by side; yields a line per length.

    A peer is left out from the length on at which a call takes over 4 s or would take over 6 GB.
    """
    live: dict[str, Callable[..., torch.Tensor]] = {OURS: partial(ops.selective_scan, delta_softplus=True, backend="native")}
    live |= {name: peer for name, peer in PEERS.items() if installed(name)}
    for length in _LENGTHS:
        tensors = scan_inputs(1, 96, length, 16)
        for name in list(live):
            if name != OURS and length * 96 * 16 * 4 * 4 > 6e9:
                del live[name]
                continue
            side = partial(live[name], **(tensors if name == OURS else channel_first(tensors)))
            with torch.no_grad():
                taken = measure.times({name: side}, 0.3, 1, limit=1.0)[name]["min"]
            into.setdefault(name, []).append((length, taken))
            if name != OURS and taken > 4:
                del live[name]
        yield f"{length} tokens: " + ", ".join(f"{name} {points[-1][1] * 1e3:.1f} ms" for name, points in into.items() if points[-1][0] == length)
