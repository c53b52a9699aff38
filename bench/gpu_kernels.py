"""What the GPU kernels should cost, counted from their machine code without a GPU: python bench/gpu_kernels.py [OP ...] [--out FOLDER]

Every op is called as its users would, at the sizes of CASES in bfloat16. The launches are recorded, compiled for sm_90 and sm_100, disassembled, and
their instructions counted by pipe. A loop's instructions count once for each of its passes (PASSES). So a count is one of a whole launch, divided by
the tokens and channels of the case.

    cycles of a pipe   the warp instructions of a token and 32 channels, each with the cycles that it holds that pipe of a quarter of a multiprocessor
    bound of a pipe    these cycles over all quarters at the GPU's clock, in picoseconds for a token and channel
    floor              the time that no kernel for this op can go below: its tensors read or written once, its special functions, its arithmetic

Writes results.json, results.md and summary.md. Nothing is measured: latency, bank conflicts and idle warps are in none of these figures.

--cubin FILE PASSES UNITS: count the kernels of a compiled file instead. PASSES: of their loops, as 128,16; UNITS: tokens and channels of a warp.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.kernels import resources  # noqa: E402 (found by the path above)

# -- machine code -------------------------------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    address: int
    op: str  # with its modifiers: "LDG.E.64"
    operands: str
    conditional: bool


_FUNCTION = re.compile(r"\s*Function : (\S+)")
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")


def functions(listing: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel in a listing of cuobjdump -sass."""
    found: dict[str, list[Instruction]] = {}
    for line in listing.splitlines():
        if name := _FUNCTION.match(line):
            found[name[1]] = []
        elif code := _INSTRUCTION.match(line):
            conditional = code[2] is not None or re.match(r"!?U?P\d", code[4]) is not None  # BRA.U !UP0, 0x130
            list(found.values())[-1].append(Instruction(int(code[1], 16), code[3], code[4].strip(), conditional))
    return found


def loops(code: list[Instruction]) -> list[set[int]]:
    """The numbers of the instructions in each loop, in the order in which the loops begin.

    A branch back ends a loop if its target is on every way to it. (Code that waits for a barrier is moved behind the rest and branches back, too.) A
    loop that only waits, for a barrier or to catch what runs past the end, is not counted as one.
    """
    at = {instruction.address: i for i, instruction in enumerate(code)}
    after = [_after(code, i, at) for i in range(len(code))]
    before: list[list[int]] = [[] for _ in code]
    for i, targets in enumerate(after):
        for target in targets:
            before[target].append(i)
    found: dict[int, set[int]] = {}
    for i, targets in enumerate(after):
        for target in targets:
            if target < i and i not in _reached(after, 0, without=target):
                found[target] = found.get(target, set()) | _reached(before, i, without=target) | {target}
    return [body for _, body in sorted(found.items()) if not _waits({code[i].op.split(".")[0] for i in body})]


def _waits(names: set[str]) -> bool:
    return "NANOSLEEP" in names or names <= {"SYNCS", "BRA", "NOP", "WARPSYNC"}


def _after(code: list[Instruction], i: int, at: dict[int, int]) -> list[int]:
    """The instructions that may follow one."""
    instruction = code[i]
    name = instruction.op.split(".")[0]
    target = re.search(r"0x([0-9a-f]+)\s*$", instruction.operands) if name == "BRA" else None
    follows = [at[int(target[1], 16)]] if target else []
    ends = name in ("BRA", "EXIT", "RET") and not instruction.conditional
    return follows if ends or i + 1 == len(code) else [*follows, i + 1]


def _reached(after: list[list[int]], first: int, without: int) -> set[int]:
    """What can be reached from the first instruction, itself included, on ways that avoid another."""
    left = [first] if first != without else []
    found = set(left)
    while left:
        for target in after[left.pop()]:
            if target != without and target not in found:
                found.add(target)
                left.append(target)
    return found


# The cycles for which an instruction of a warp holds a pipe of a quarter of a multiprocessor: 32 lanes over the results that the pipe gives a cycle.
# From the table of arithmetic throughput in CUDA's programming guide, 9.0 and 10.0.
_FMA = {"FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2", "FFMA32I", "FMUL32I", "FADD32I"}
_TWICE = {"FFMA2", "FMUL2", "FADD2", "IMAD", "IDP", "FSWZADD"}  # two operations, or the half of the pipe that multiplies integers
_SPECIAL = {"MUFU", "F2F", "F2I", "I2F", "I2FP", "FRND", "POPC", "FLO", "BREV", "F2IP"}
_CONTROL = {"BRA", "EXIT", "NOP", "BAR", "BSSY", "BSYNC", "BREAK", "WARPSYNC", "DEPBAR", "RET", "CALL", "BRX", "YIELD", "ERRBAR", "MEMBAR", "ACQBULK"}
_GLOBAL, _SHARED, _LOCAL = {"LDG", "STG", "LD", "ST", "RED", "ATOM", "ATOMG", "LDGSTS"}, {"LDS", "STS", "LDSM", "STSM", "ATOMS"}, {"LDL", "STL"}
PIPES = ("issue", "fma", "alu", "mufu", "memory", "tensor")


def width(op: str) -> int:
    """Bytes of a lane that a load or store moves."""
    if op.startswith(("LDSM", "STSM")):
        return 4 * int(match[1]) if (match := re.search(r"\.(\d)$", op)) else 4
    parts = op.split(".")
    return next((size for name, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("16", 2), ("U8", 1), ("S8", 1)) if name in parts), 4)


def level(op: str) -> str | None:
    """global, shared or local, of a load or store."""
    name = op.split(".")[0]
    return next((of for of, names in (("global", _GLOBAL), ("shared", _SHARED), ("local", _LOCAL)) if name in names), None)


def held(op: str) -> tuple[str, float]:
    """(pipe, cycles) of one instruction of a warp. Every instruction also takes a cycle of "issue"."""
    name = op.split(".")[0]
    if level(op):
        return "memory", 4 * max(1, width(op) / 4)  # as if no two lanes asked for the same bytes
    if name == "SHFL":
        return "memory", 4
    if name in ("HMMA", "HGMMA"):
        return "tensor", _products(op)
    if name in _SPECIAL:
        return "mufu", 8
    if name in _FMA:
        return "fma", 1
    if name in _TWICE:
        return "fma", 2
    if name in _CONTROL or name.startswith("U") or name in ("LDC", "LDCU", "S2R", "S2UR", "R2UR", "CS2R", "ELECT", "SYNCS", "FENCE", "WARPGROUP"):
        return "issue", 0
    return "alu", 2


def _products(op: str) -> float:
    """Cycles of a tensor core for one matrix product: 512 multiply-adds a cycle of 16-bit numbers, 256 of TF32."""
    rate = 256 if "TF32" in op else 512
    shape = re.search(r"\.(\d+)x(\d+)x(\d+)", op)
    if shape:
        return math.prod(map(int, shape.groups())) / 4 / rate  # of four warps
    digits = re.search(r"\.(168?)(8|16|4)(\d*)\b", op)
    depth = {"1688": 8, "16816": 16, "1684": 4}[digits[0][1:]] if digits and digits[0][1:] in ("1688", "16816", "1684") else 16
    return 16 * 8 * depth / rate


def count(code: list[Instruction], passes: list[float]) -> dict[str, Counter]:
    """Instructions by name, cycles by pipe and bytes by level of one warp that goes through each loop so many times, for each entry of the loop."""
    found = loops(code)
    if not found and all(n == 1 for n in passes):
        passes = []  # what passes once is no loop any more
    if len(found) != len(passes):
        raise ValueError(f"passes: expected one for each of the loops at {[min(loop) for loop in found]}, got {passes}")
    result: dict[str, Counter] = {"instructions": Counter(), "cycles": Counter(), "bytes": Counter()}
    for i, instruction in enumerate(code):
        times = math.prod(n for loop, n in zip(found, passes, strict=True) if i in loop)
        if instruction.op == "NOP":
            continue
        pipe, cycles = held(instruction.op)
        result["instructions"][instruction.op.split(".")[0]] += times
        result["cycles"]["issue"] += times
        result["cycles"][pipe] += times * cycles
        if where := level(instruction.op):
            result["bytes"][where] += times * 32 * width(instruction.op)
    return result


# -- GPUs ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GPU:
    name: str
    multiprocessors: int
    clock: float  # GHz
    bandwidth: float  # TB/s
    assumed: str

    def picoseconds(self, cycles: float) -> float:
        """Of cycles for a token and 32 channels: the time of a token and channel when all quarters work."""
        return cycles / 32 / (4 * self.multiprocessors * self.clock) * 1e3


GPUS = {
    "90": GPU("H100", 132, 1.755, 3.0, "3.0 TB/s is a measured copy"),
    "100": GPU("B200", 148, 1.85, 7.2, "1.85 GHz and nine tenths of 8 TB/s are assumed"),
}
REGISTERS, SHARED, WARPS, BLOCKS = 65536, 227 * 1024, 64, 32  # of a multiprocessor, in both


def warps(registers: int, shared: int, of_program: int) -> int:
    """Warps that fit on a multiprocessor."""
    of_warp = -(-registers * 32 // 256) * 256
    by_shared = SHARED // (shared + 1024)
    return min(WARPS, min(BLOCKS, by_shared, REGISTERS // (of_warp * of_program)) * of_program)


# -- the kernels --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Floor:
    """Of one direction of an op, for a token and channel: bytes of its tensors, special functions, and instructions of arithmetic."""

    bytes: float
    special: float = 0
    arithmetic: float = 0

    def picoseconds(self, gpu: GPU) -> dict[str, float]:
        parts = {"memory": self.bytes / gpu.bandwidth, "mufu": gpu.picoseconds(8 * self.special), "fma": gpu.picoseconds(self.arithmetic)}
        return {k: round(v, 2) for k, v in parts.items()}


@dataclass(frozen=True)
class Case:
    call: Callable[[Any], None]  # of the module that records launches
    tokens: int
    channels: int
    forward: Floor
    backward: Floor
    what: str


SIDE = 64**3
CASES = {
    "selective_scan": Case(
        lambda t: t._scan(16, t.BF16, False, length=SIDE), SIDE, 96, Floor(6, 18, 90), Floor(10, 20, 244), "64^3 tokens, 96 channels, 16 states"
    ),
    "selective_scan, 128 channels": Case(
        lambda t: t._scan(16, t.BF16, False, length=SIDE, channels=128), SIDE, 128, Floor(6, 18, 90), Floor(10, 20, 244), "64^3 tokens, 128 channels"
    ),
    "selective_scan, one pass": Case(
        lambda t: t._scan(16, t.BF16, False, length=1024, batch=768), 768 * 1024, 96, Floor(6, 18, 90), Floor(10, 20, 244), "768 rows of 1,024 tokens"
    ),
    "causal_conv1d": Case(lambda t: t._causal(4, t.BF16, False, length=SIDE), 2 * SIDE, 96, Floor(4, 0, 4), Floor(6, 0, 8), "4 taps, 96 channels"),
    "depthwise_conv": Case(
        lambda t: t._depthwise(3, 3, t.BF16, False, size=64), SIDE, 96, Floor(4, 0, 27), Floor(6, 0, 54), "64^3 voxels, 3^3 taps, 96 channels"
    ),
    "linear_attention": Case(
        lambda t: t._linear(32, 32, t.BF16, False, length=SIDE, heads=3), SIDE, 96, Floor(8), Floor(14), "3 heads of 32, over all tokens"
    ),
    "linear_attention, causal": Case(
        lambda t: t._linear(32, 32, t.BF16, False, True, length=SIDE, heads=3), SIDE, 96, Floor(8), Floor(14), "3 heads of 32"
    ),
    "gated_linear_attention": Case(
        lambda t: t._gated(64, 64, True, t.BF16, False, length=SIDE, heads=2), SIDE, 128, Floor(10), Floor(18), "2 heads of 64, a decay per key"
    ),
    "ssd": Case(lambda t: t._ssd(64, 64, t.BF16, False, length=SIDE, heads=2), SIDE, 128, Floor(6), Floor(10), "2 heads of 64, 64 states"),
    "ssd3": Case(lambda t: t._ssd3(64, 64, t.BF16, length=SIDE // 4), SIDE // 4, 128, Floor(4), Floor(6), "2 heads of 64, 64 states, one rank"),
    "delta_rule": Case(lambda t: t._delta(64, 64, t.BF16, False, length=SIDE, heads=2), SIDE, 128, Floor(8), Floor(14), "2 heads of 64"),
    "bi_wkv": Case(lambda t: t._bi_wkv("exact", t.BF16, False, length=SIDE), SIDE, 96, Floor(6, 5, 20), Floor(10, 8, 60), "96 channels"),
}


def _blocks(total: str, block: str) -> Callable[[dict], list[float]]:
    return lambda a: [-(-a[total] // a[block])]


def _squares(a: dict) -> list[float]:
    return [-(-a["dk"] // a["BK"]), -(-a["dv"] // a["BV"])]


def _runs(a: dict) -> float:
    return -(-min(a["steps"], a["length"]) // a["CHUNK"])


# How often the loops of a kernel pass, in the order of the code, for each entry of the loop: of the launch's arguments.
PASSES: dict[tuple[str, str], Callable[[dict], list[float]]] = {
    ("selective_scan", "local"): lambda a: [a["steps"] // a["K"], a["steps"] % a["K"]],
    ("selective_scan", "carry"): _blocks("chunks", "GROUP"),
    ("selective_scan", "apply"): lambda a: [_runs(a), a["CHUNK"] // a["K"], a["CHUNK"] % a["K"]],
    ("selective_scan", "local_adjoint"): lambda a: [a["steps"] % a["K"], a["steps"] // a["K"]],
    ("selective_scan", "adjoint"): lambda a: [a["items"] / a["grid"], _runs(a), a["CHUNK"] / a["K"], a["CHUNK"] / a["K"]],
    ("depthwise_conv", "_conv"): lambda a: [a["KZ"] * a["KY"] * a["KX"]],
    ("depthwise_conv", "_weights"): _blocks("SHARE", "POSITIONS"),
    ("linear_attention", "sums"): _blocks("steps", "T"),
    ("linear_attention", "outputs"): _blocks("dk", "BK"),
    ("linear_attention", "inputs"): _blocks("dv", "BV"),
    ("matrix", "carry"): _blocks("length", "GROUP"),
    ("matrix", "outputs"): _blocks("dk", "BK"),
    ("matrix", "key_pairs"): _blocks("dk", "BK"),
    ("matrix", "value_gradients"): _blocks("dk", "BK"),
    ("matrix", "pair_gradients"): _blocks("dv", "BV"),
    ("matrix", "query_gradients"): _blocks("dv", "BV"),
    ("matrix", "key_gradients"): _blocks("dv", "BV"),
    ("matrix", "query_key_gradients"): _blocks("dv", "BV"),
    ("delta_rule", "inverse"): lambda a: [-(-a["dk"] // a["BK"]), a["CHUNK"] - 1],
    ("delta_rule", "compose"): lambda a: [a["chunks"] / a["segment"] - 1, a["dk"] / a["BK"], a["dk"] / a["BK"]],
    ("delta_rule", "outputs"): _blocks("dk", "BK"),
    ("delta_rule", "outer"): _blocks("dk", "BK"),
    ("delta_rule", "pair_gradients"): _blocks("dv", "BV"),
    ("delta_rule", "query_gradients"): _squares,
    ("delta_rule", "entry_key_gradients"): _squares,
    ("delta_rule", "exit_key_gradients"): _squares,
    ("bi_wkv", "carry"): _blocks("chunks", "GROUP"),
}
# Cases that use the kernels of the matrix states, and those of another case's op.
MATRIX = {"linear_attention, causal", "gated_linear_attention", "ssd", "ssd3"}
_OWN = {"selective_scan, 128 channels": "selective_scan", "selective_scan, one pass": "selective_scan"}


def passes(case: str, kernel: str, arguments: dict, found: int) -> list[float]:
    """The passes of a kernel's loops in a launch. found: how many loops the code has."""
    if case in MATRIX and kernel == "decay_gradients":
        keys, values = _squares(arguments)
        if arguments["DECAY"] != 1:
            return [values]
        inner = [values] if found == 4 else [values // 4, values % 4]  # unrolled by four, and the rest
        return [keys, *inner, arguments["parts"], 1]
    if case == "bi_wkv" and kernel != "carry":
        steps = (arguments["length"] / arguments["chunks"]) / arguments["K"]
        return [steps] if kernel == "local" else [steps, steps]
    if case == "delta_rule" and kernel in ("carry", "carry_back"):
        return [arguments["segment"]]
    of = PASSES.get(("matrix" if case in MATRIX else _OWN.get(case, case), kernel))
    return of(arguments) if of else []


@dataclass
class Row:
    """One launch. Instructions, cycles and bytes are of a token and 32 channels."""

    case: str
    direction: str
    kernel: str
    target: str
    instructions: dict[str, float]
    cycles: dict[str, float]
    bytes: dict[str, float]
    registers: int
    shared: int
    spilled: int
    warps: int
    picoseconds: float  # the largest bound of a pipe, of a token and channel
    binds: str


def rows(case: str) -> Iterator[Row]:
    """The counts of a case's launches, for each GPU."""
    import triton
    from triton.backends.compiler import GPUTarget

    from tests.kernels import triton_resources

    of = CASES[case]
    for launch in triton_resources.launches(lambda: of.call(triton_resources)):
        made, options, _ = triton_resources.source(launch.kernel, launch.arguments)
        programs, of_program, name = math.prod(launch.grid), options.get("num_warps", 4), launch.kernel.__name__
        for target, gpu in GPUS.items():
            compiled = triton.compile(made, target=GPUTarget("cuda", int(target), 32), options=options)
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder) / "kernel.cubin"
                cubin.write_bytes(compiled.asm["cubin"])
                (usage,) = resources.usage(cubin)
                ((_, code),) = functions(listing(cubin)).items()
            try:
                counts = count(code, passes(case, name, launch.arguments | {"grid": programs}, len(loops(code))))
            except ValueError as problem:
                raise ValueError(f"{case}, {name} for sm_{target}: {problem}") from None
            share = programs * of_program / (of.tokens * of.channels) * 32
            scaled = {what: {k: round(v * share, 3) for k, v in sorted(found.items())} for what, found in counts.items()}
            binds = max(scaled["cycles"], key=scaled["cycles"].__getitem__)
            yield Row(
                case,
                "backward" if launch.backward else "forward",
                name,
                f"sm_{target}",
                **scaled,
                registers=usage.registers,
                shared=compiled.metadata.shared,
                spilled=usage.stack + usage.local,
                warps=warps(usage.registers, compiled.metadata.shared, of_program),
                picoseconds=round(gpu.picoseconds(scaled["cycles"][binds]), 3),
                binds=binds,
            )


def listing(cubin: Path) -> str:
    done = subprocess.run([resources.cuobjdump(), "-sass", str(cubin)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cuobjdump: {done.stderr.strip()}")
    return done.stdout


# -- the table ----------------------------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """results.md."""
    head = ["kernel", "instructions", *(f"{pipe}" for pipe in PIPES[1:]), "bytes global, shared", "registers", "warps", "ps", "bound by"]
    lines = ["# What the GPU kernels should cost: predicted, never measured", ""]
    lines += [f"Commit {results['commit']}, {results['date']}; {', '.join(f'{k} {v}' for k, v in results['versions'].items())}.", ""]
    lines += ["Instructions and cycles of each pipe are of a token and 32 channels; bytes and picoseconds (ps) of a token and channel.", ""]
    for target, gpu in GPUS.items():
        about = f"{gpu.multiprocessors} multiprocessors, {gpu.clock} GHz, {gpu.bandwidth} TB/s; {gpu.assumed}"
        lines += [f"## sm_{target} ({gpu.name}: {about})", ""]
        for case, of in CASES.items():
            for direction in ("forward", "backward"):
                rows = [r for r in results["rows"] if (r["case"], r["direction"], r["target"]) == (case, direction, f"sm_{target}")]
                if not rows:
                    continue
                floor: dict[str, float] = getattr(of, direction).picoseconds(gpu)
                total, least = sum(r["picoseconds"] for r in rows), max(floor.values())
                lines += [f"### {case}, {direction}: {total:.1f} ps, floor {least:.1f} ps, {total / least:.1f} times ({of.what})", ""]
                lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
                for r in rows:
                    cycles = [f"{r['cycles'].get(pipe, 0):.1f}" for pipe in PIPES[1:]]
                    moved = f"{r['bytes'].get('global', 0) / 32:.1f}, {r['bytes'].get('shared', 0) / 32:.1f}"
                    spilled = f" ({r['spilled']} bytes spilled)" if r["spilled"] else ""
                    numbers = [
                        f"{r['cycles']['issue']:.1f}",
                        *cycles,
                        moved,
                        f"{r['registers']}{spilled}",
                        str(r["warps"]),
                        f"{r['picoseconds']:.2f}",
                    ]
                    lines.append(f"| {' | '.join([r['kernel'], *numbers, r['binds']])} |")
                lines.append("")
    return "\n".join(lines)


def summary(results: dict[str, Any]) -> str:
    """summary.md: each op and direction on each GPU."""
    lines = ["| op | sizes | direction | H100: ps | floor | times | B200: ps | floor | times |", "|---" * 9 + "|"]
    for case, of in CASES.items():
        for direction in ("forward", "backward"):
            cells = []
            for target, gpu in GPUS.items():
                rows = [r for r in results["rows"] if (r["case"], r["direction"], r["target"]) == (case, direction, f"sm_{target}")]
                total, least = sum(r["picoseconds"] for r in rows), max(getattr(of, direction).picoseconds(gpu).values())
                cells += [f"{total:.1f}", f"{least:.1f}", f"{total / least:.1f}"]
            if rows:
                lines.append(f"| {' | '.join([case, of.what, direction, *cells])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help=f"of {', '.join(CASES)}; all")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu-predicted")
    parser.add_argument("--cubin", nargs=3, metavar=("FILE", "PASSES", "UNITS"))
    args = parser.parse_args()
    if args.cubin:
        return count_file(Path(args.cubin[0]), [float(n) for n in args.cubin[1].split(",") if n], float(args.cubin[2]))
    if unknown := set(args.ops) - set(CASES):
        parser.error(f"ops: expected some of {', '.join(CASES)}, got {', '.join(sorted(unknown))}")

    from medssm import machine
    from medssm.files import read_json, write_json, write_text

    chosen = args.ops or list(CASES)
    counted = []
    for case in chosen:
        for found in rows(case):
            counted.append(asdict(found))
            print(f"{found.case}, {found.direction}, {found.kernel}, {found.target}: {found.picoseconds:.2f} ps, bound by {found.binds}", flush=True)
    file = args.out / "results.json"
    kept = [r for r in (read_json(file)["rows"] if file.exists() else []) if r["case"] in CASES and r["case"] not in chosen]
    order = {case: i for i, case in enumerate(CASES)}
    results = {"date": time.strftime("%Y-%m-%d"), "commit": machine.commit(), "versions": versions()}
    results["rows"] = sorted([*kept, *counted], key=lambda r: (order[r["case"]], r["target"], r["direction"] == "backward"))
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(file, results)
    write_text(args.out / "results.md", table(results))
    write_text(args.out / "summary.md", summary(results))
    print(f"written: {file}")


def versions() -> dict[str, str]:
    import triton

    said = subprocess.run([resources.cuobjdump(), "--version"], capture_output=True, text=True).stdout
    return {"Triton": triton.__version__, "cuobjdump": re.search(r"release ([\d.]+)", said)[1]}


def count_file(file: Path, passed: list[float], units: float) -> None:
    for name, code in functions(listing(file)).items():
        try:
            counts = count(code, passed)
        except ValueError as problem:
            print(f"{name}: {problem}")
            continue
        per = {what: {k: round(v * 32 / units, 1) for k, v in found.most_common()} for what, found in counts.items()}
        bound = max(per["cycles"].values())
        print(name, json.dumps(per), f"{GPUS['90'].picoseconds(bound):.2f} ps on {GPUS['90'].name}", flush=True)


if __name__ == "__main__":
    main()
