"""Compiles the Triton kernels for GPUs that are not here, and reads what they take.

    python tests/kernels/triton_resources.py [--all | --known | --record] [--op OP] [TARGET ...]

The ops' own wrappers run on tensors of the CPU with the launcher replaced by a recorder, so that what is compiled is what they would launch: the same
kernels, constants, types and divisibilities. Prints a line of JSON a kernel. --all: every configuration of the table, else the first of each op.

A compiler gives the same code for the same source, so what was found is kept in triton_resources.json, by a digest of the source of a kernel with all
that it calls, its types and constants, and Triton's version. --known compiles only what is not there; --record compiles all and writes the file.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from medssm.files import read_json, write_json  # noqa: E402 (found by the path above)
from medssm.kernels.walks import Sequences  # noqa: E402 (found by the path above)
from tests.kernels import resources  # noqa: E402

TARGETS = ("80", "90", "100")
RECORD = Path(__file__).with_suffix(".json")
_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32"}


# -- the calls ----------------------------------------------------------------------------------------------------------------------

PACKED = "packed"  # options: every one that there is, and two sequences


def _sequences(options):
    """(the argument of that name, rows of a state)."""
    return (Sequences(2, torch.arange(2)), 2) if options == PACKED else (None, 1)


def _scan(n, dtype, options, rank=None, length=65536, channels=96, batch=1):
    """Forward and backward of selective_scan, over several chunks; with options every one that there is."""
    from medssm.kernels.selective_scan import plan
    from medssm.kernels.selective_scan import triton as kernel

    def new(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype)

    weight = torch.float32
    sequences, rows = _sequences(options)
    u, few = new(batch, length, channels), torch.tensor([0, 64])
    given = [u, new(batch, length, rank or channels), new(channels, n, dtype=weight), new(batch, length, 1, n), new(batch, length, 1, n)]
    given += [new(channels, dtype=weight), new(batch, length, channels), new(channels, dtype=weight)] if options else [None] * 3
    given += [True, None if rank is None else new(channels, rank, dtype=weight)]
    state = new(rows, channels, n, dtype=weight) if options else None
    given += [torch.arange(length), few, True, state] if options else [None, None, False, None]
    kernel.forward(*given, True, bool(options), sequences)
    saved = torch.empty(batch, plan.chunks(length, n), n, channels)
    kernel.backward(torch.empty_like(u), state, saved, *given, sequences)


def _scan_nd(n, dtype, length=65536, channels=96):
    """Two walks, the second adding to the first."""
    from medssm.kernels.selective_scan import plan
    from medssm.kernels.selective_scan import triton as kernel

    x = torch.empty(1, length, channels, dtype=dtype)
    rows = torch.empty(1, length, 2, 1, n, dtype=dtype)
    given = [x, torch.empty(1, length, 2, channels, dtype=dtype), torch.empty(2, channels, n), rows, rows]
    given += [torch.empty(2, channels), x, None, True, None]
    walks = [(None, None, False), (torch.arange(length), None, False)]
    kernel.forward_nd(*given, walks, "sum", True)
    kernel.backward_nd(x, torch.empty(1, 2, plan.chunks(length, n), n, channels), *given, walks, "sum")


def _causal(width, dtype, options, length=4096, channels=96):
    from medssm.kernels.causal_conv1d import triton as kernel

    sequences, _ = _sequences(options)
    x = torch.empty(2 if sequences is None else 1, length, channels, dtype=dtype)
    initial = torch.empty(2, channels, width - 1, dtype=dtype)
    given = [x, torch.empty(channels, width)]
    if options:
        given += [torch.empty(channels), "silu", torch.arange(length), torch.tensor([0, 64]), True, initial]
    else:
        given += [None, None, None, None, False, None]
    kernel.forward(*given, bool(options), sequences)
    kernel.backward(torch.empty_like(x), initial if options else None, *given, sequences)


def _depthwise(side, dims, dtype, options, channels=96, size=12):
    from medssm.kernels.depthwise_conv import triton as kernel

    x = torch.empty(1, *(size,) * dims, channels, dtype=dtype)
    given = [x, torch.empty(channels, *(side,) * dims), torch.empty(channels) if options else None, "silu" if options else None]
    kernel.forward(*given)
    kernel.backward(torch.empty_like(x), *given)


def _bi_wkv(mode, dtype, options, length=4096, channels=96):
    """Over several chunks; with options a walk with segments."""
    from medssm.kernels.bi_wkv import triton as kernel

    k, w = torch.empty(1, length, channels, dtype=dtype), torch.empty(channels)
    given = [w, w, k, k, mode, *((torch.arange(length), torch.tensor([0, 64]), True) if options else (None, None, False))]
    kernel.forward(*given)
    kernel.backward(k, *given)


def _delta(dk, dv, dtype, options, length=4096, heads=2, general=None):
    """general: None, or whether the gates of the general form are per key and value."""
    from medssm.kernels.delta_rule import triton as kernel

    def new(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype)

    sequences, rows = _sequences(options)
    v, state = new(1, length, heads, dv), new(rows, heads, dk, dv, dtype=FLOAT)
    given = [new(1, length, heads, dk), new(1, length, heads, dk), v, new(1, length, heads)]
    given += [new(1, length, heads) if options else None, 0.5]
    given += [torch.arange(length), torch.tensor([0, 64]), True, state] if options else [None, None, False, None]
    rest = [sequences]
    if general is not None:
        given[4] = torch.empty_like(given[0]) if general else given[4]
        rest += [given[0], given[1], torch.empty_like(v), True] if general else [None, None, None, True]
    _, _, recalled = kernel.forward(*given, True, bool(options), *rest)
    kernel.backward(torch.empty_like(v), state if options else None, recalled, *given, *rest)


def _linear(dk, dv, dtype, options, causal=False, length=4096, heads=4):
    """With options fewer heads of keys, a rotation, the denominator, an initial state, and a walk with segments where it is causal."""
    from medssm.kernels.linear_attention import triton as kernel

    def new(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype)

    groups = 2 if options else heads
    sequences, rows = _sequences(options)
    state = new(rows, groups, dk, dv, dtype=FLOAT), new(rows, groups, dk, dtype=FLOAT)
    angles = new(length, groups, dk, dtype=FLOAT) if options else None
    given = [new(1, length, heads, dk), new(1, length, groups, dk), new(1, length, groups, dv), angles, angles]
    given += [*(state if options else (None, None)), "elu" if options else None, causal, bool(options), 0.5, 1e-6]
    given += [torch.arange(length), torch.tensor([0, 64]), True] if options and causal else [None, None, False]
    given.append(sequences)
    out, *sums = kernel.forward(*given)
    kernel.backward(out, *(state if options else (None, None)), *sums, *given)


def _gated(dk, dv, per_key, dtype, options, length=4096, heads=4):
    """gated_linear_attention over several chunks; LONG has so many that the carry has two levels."""
    from medssm.kernels.gated_linear_attention import triton as kernel

    q, v = torch.empty(1, length, heads, dk, dtype=dtype), torch.empty(1, length, heads, dv, dtype=dtype)
    sequences, rows = _sequences(options)
    g, state = q if per_key else q[..., 0].contiguous(), torch.empty(rows, heads, dk, dv)
    way = (torch.arange(length), torch.tensor([0, 64]), True, state) if options else (None, None, False, None)
    kernel.forward(q, q, v, g, 1.0, *way, bool(options), sequences)
    kernel.backward(v, state if options else None, q, q, v, g, 1.0, *way, sequences)


def _ssd(p, n, dtype, options, length=4096, heads=4):
    """ssd over several chunks (LONG: a carry in two levels), two heads a group; with options every one that there is."""
    from medssm.kernels.ssd import triton as kernel

    sequences, rows = _sequences(options)
    x, B, state = torch.empty(1, length, heads, p, dtype=dtype), torch.empty(1, length, heads // 2, n, dtype=dtype), torch.empty(rows, heads, p, n)
    weight = torch.empty(heads)
    optional = (weight, x, weight) if options else (None, None, None)
    way = (torch.arange(length), torch.tensor([0, 64]), True, state) if options else (None, None, False, None)
    given = (x, torch.empty(1, length, heads, dtype=dtype), weight, B, B, *optional, True, 0.0, math.inf, *way)
    kernel.forward(*given, bool(options), bool(options), sequences)
    kernel.backward(x, state if options else None, torch.empty(x.shape) if options else None, *given, sequences)


def _ssd3(p, n, dtype, length=4096, heads=2):
    """ssd3 of one rank with a rotation, by gated linear attention's kernels."""
    from medssm.kernels.ssd3 import triton as kernel

    x, steps = torch.empty(1, length, heads, p, dtype=dtype), torch.empty(1, length, heads)
    rows = torch.empty(1, length, 1, 1, n, dtype=dtype)
    given = {"x": x, "dt": steps, "A": steps, "B": rows, "C": rows, "trap": steps, "angles": torch.empty(1, length, n // 4, dtype=dtype)}
    given |= dict.fromkeys(("D", "z", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o"))
    given |= dict.fromkeys(("initial_angle", "initial_state", "initial_k", "initial_v"))
    walk = {"index": None, "starts": None, "reverse": False, "pairs": "adjacent", "per_rank": False}
    *_, y = kernel.forward(save=True, final=False, **given, **walk)
    kernel.backward(dout=x, dangle=None, dstate=None, dk=None, dv=None, y=y, **given, **walk)


BF16, FLOAT = torch.bfloat16, torch.float32
LONG = {"length": 65536, "heads": 2}
CALLS = {
    "selective_scan": [lambda: _scan(8, BF16, True, 6)]
    + [
        lambda n=n, d=d, o=o, r=r: _scan(n, d, o, r)
        for n, d, (o, r) in itertools.product((1, 2, 4, 8, 16, 24), (BF16, FLOAT), ((False, None), (True, None), (True, 6)))
    ]
    + [lambda: _scan(16, BF16, True, channels=128), lambda: _scan(16, torch.float16, True, channels=67)]
    + [lambda n=n, d=d: _scan(n, d, PACKED, 6) for n, d in ((16, BF16), (8, FLOAT))],
    "selective_scan_nd": [lambda: _scan_nd(1, BF16), lambda: _scan_nd(16, BF16), lambda: _scan_nd(8, FLOAT)],
    "bi_wkv": [lambda: _bi_wkv("upstream", BF16, True)]
    + [lambda m=m, d=d, o=o: _bi_wkv(m, d, o) for m, d, o in itertools.product(("exact", "upstream"), (BF16, FLOAT), (False, True))],
    "gated_linear_attention": [
        lambda: _gated(64, 64, True, BF16, True, **LONG),
        lambda: _gated(24, 40, True, FLOAT, False, **LONG),
        lambda: _gated(64, 64, True, BF16, PACKED),
    ]
    + [lambda d=d: _gated(64, 128, False, d, PACKED) for d in (BF16, FLOAT)]
    + [
        lambda k=k, v=v, o=o, d=d, y=y: _gated(k, v, y, d, o)
        for (k, v), o, d, y in itertools.product(((16, 16), (64, 128), (24, 40)), (False, True), (BF16, FLOAT), (False, True))
    ],
    "ssd": [lambda: _ssd(64, 64, BF16, True, **LONG), lambda: _ssd(64, 128, FLOAT, PACKED)]
    + [lambda p=p, n=n, o=o, d=d: _ssd(p, n, d, o) for (p, n), o, d in itertools.product(((16, 16), (64, 128)), (False, True), (BF16, FLOAT))],
    "causal_conv1d": [lambda: _causal(4, BF16, True), lambda: _causal(4, BF16, PACKED), lambda: _causal(8, FLOAT, PACKED)]
    + [lambda w=w, d=d, o=o: _causal(w, d, o) for w, d, o in itertools.product((1, 2, 3, 4, 8), (BF16, FLOAT), (False, True))],
    "depthwise_conv": [lambda: _depthwise(3, 3, BF16, True)]
    + [lambda s=s, n=n, d=d, o=o: _depthwise(s, n, d, o) for s, n, d, o in itertools.product((3, 7), (1, 2, 3), (BF16, FLOAT), (False, True))],
    "linear_attention": [lambda: _linear(32, 32, BF16, True)]
    + [
        lambda k=k, v=v, d=d, o=o: _linear(k, v, d, o)
        for (k, v), d, o in itertools.product(((16, 16), (32, 64), (40, 24)), (BF16, FLOAT), (False, True))
    ],
    "linear_attention_causal": [lambda: _linear(32, 32, BF16, True, True), lambda: _linear(64, 64, FLOAT, PACKED, True)]
    + [lambda k=k, v=v, o=o: _linear(k, v, FLOAT, o, True) for (k, v), o in itertools.product(((16, 16), (64, 64), (40, 24)), (False, True))],
    "delta_rule": [
        lambda: (_delta(64, 64, BF16, True), _delta(64, 64, BF16, True, general=True)),
        lambda: _delta(64, 64, FLOAT, PACKED),
        lambda: _delta(130, 100, BF16, PACKED),
    ]
    + [
        lambda k=k, v=v, d=d, o=o: _delta(k, v, d, o)
        for (k, v), d, o in itertools.product(
            ((16, 16), (64, 64), (128, 128), (256, 256), (24, 40), (40, 24), (130, 100)), (BF16, FLOAT), (False, True)
        )
    ]
    + [
        lambda k=k, v=v, o=o, g=g: _delta(k, v, FLOAT, o, general=g)
        for (k, v), o, g in itertools.product(((16, 16), (64, 64), (256, 256), (1100, 20), (40, 24)), (False, True, PACKED), (False, True))
    ],
}


# -- recording and compiling --------------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    kernel: JITFunction
    arguments: dict  # and options, by name
    grid: tuple[int, ...]
    backward: bool  # made by a function of that name


def launches(call) -> list[Launch]:
    """Those that a call makes, recorded in place of them."""
    seen = []

    def record(self, *args, grid, warmup, **kwargs):
        backward = any(frame.name == "backward" for frame in traceback.extract_stack())
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        seen.append(Launch(self, arguments, grid(arguments) if callable(grid) else grid, backward))

    real, JITFunction.run = JITFunction.run, record
    try:
        call()
    finally:
        JITFunction.run = real
    return seen


def recorded(everything: bool, ops: list[str]) -> list[tuple]:
    """(op, kernel, arguments and options by name) of every launch that the calls of ops make."""
    calls = [(op, call) for op in ops for call in (CALLS[op] if everything else CALLS[op][:1])]
    return [(op, launch.kernel, launch.arguments) for op, call in calls for launch in launches(call)]


def source(kernel, arguments):
    """What a launch compiles, the kernel with its types, constants and divisibilities; the compiler's options; and all of it as text."""
    options = {k: v for k, v in arguments.items() if k not in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr:
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            signature[name], constants[(i,)] = "constexpr", 1
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    text = f"{kernel.__name__} {signature} {constants} {attributes} {options}"
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes), options, text


def compiled(number: int, target: str, everything: bool, ops: list[str]) -> dict:
    """The resources of one of the distinct launches; made anew here, since a kernel does not travel between processes."""
    op, kernel, arguments = distinct(everything, ops)[number]
    made, options, _ = source(kernel, arguments)
    result = triton.compile(made, target=GPUTarget("cuda", int(target), 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(result.asm["cubin"])
        (row,) = resources.usage(cubin)
    constants = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr}
    return {
        "op": op,
        "kernel": kernel.__name__,
        "target": f"sm_{target}",
        "registers": row.registers,
        "stack": row.stack,
        "shared": row.shared,
        "local": row.local,
        "constants": constants,
    }


def digest(launch: tuple, target: str) -> str:
    """Of all that decides what a launch compiles to."""
    op, kernel, arguments = launch
    text = "\n".join([triton.__version__, target, op, kernel.cache_key, source(kernel, arguments)[2]])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def distinct(everything: bool, ops: list[str]) -> list[tuple]:
    found = {}
    for launch in recorded(everything, ops):
        found.setdefault((launch[0], source(*launch[1:])[2]), launch)
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=TARGETS)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--op", choices=CALLS, action="append", help="of this op alone; may be given again")
    parser.add_argument("--known", action="store_true", help="compile only what triton_resources.json does not have")
    parser.add_argument("--record", action="store_true", help="write triton_resources.json")
    args = parser.parse_args()
    ops = args.op or list(CALLS)
    jobs = [(i, digest(launch, target), target) for i, launch in enumerate(distinct(args.all, ops)) for target in args.targets]
    known = read_json(RECORD) if args.known else {}
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        found = {key: pool.submit(compiled, i, target, args.all, ops) for i, key, target in jobs if key not in known}
        rows = {key: known[key] if key in known else found[key].result() for _, key, _ in jobs}
    for row in rows.values():
        print(json.dumps(row), flush=True)
    if args.record:
        write_json(RECORD, rows)


def rows(*arguments: str) -> list[dict]:
    """This script in a process of its own, not interpreted."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


if __name__ == "__main__":
    main()
