"""The goals of the CPU kernels, each a ratio between measurements of one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from medssm.bench import attention, int8, packed
from medssm.bench.onnxruntime_peer import NAME, WITH_PYTORCH
from medssm.bench.row import OURS


class Goal(NamedTuple):
    """What was asked for, the figure reached, and whether it is met (None if the run did not measure it)."""

    name: str
    wanted: str
    reached: str
    met: bool | None


def judge(results: Mapping[str, Any]) -> list[Goal]:
    """Every goal, from the rows of a run: {row: {"times": {threads: {side: {"median", …}}}, "memory": {side: bytes}}}, and "extra"."""
    rows, extra = results["rows"], results.get("extra", {})

    def seconds(row: str, side: str = OURS, threads: str = "1") -> float | None:
        return rows.get(row, {}).get("times", {}).get(threads, {}).get(side, {}).get("median")

    def ratio(a: float | None, b: float | None) -> float | None:
        return a / b if a and b else None

    def over(row: str, peer: str) -> float | None:
        return ratio(seconds(row, peer), seconds(row))

    def both(row: str) -> float | None:
        return ratio(seconds(row), seconds(row, threads=str(results["threads"])))

    def room(row: str, ours: str, theirs: str) -> float | None:
        sides = rows.get(row, {}).get("memory", {})
        return ratio(sides.get(ours), sides.get(theirs))

    def slowest(rows: list[str], peer: str = packed.WHOLE) -> float | None:
        """The largest ratio of our time to the peer's; None unless all were measured."""
        ratios = [ratio(seconds(row), seconds(row, peer)) for row in rows]
        return max((r for r in ratios if r is not None), default=None) if None not in ratios else None

    def over_best(row: str, engine: str = NAME) -> float | None:
        """The fastest peer's time over ours; None without the engine's, which may be it."""
        sides = rows.get(row, {}).get("times", {}).get("1", {})
        return ratio(min(t["median"] for name, t in sides.items() if name != OURS), seconds(row)) if engine in sides else None

    def family(row: str) -> float | None:
        return ratio(seconds(row), seconds(row, attention.GATED))

    of_backward = slowest(["delta-train", "gated-delta-train", "kda-train", "gdn2-train"], attention.FORWARD)
    per_token = ratio(seconds("scan-long"), seconds("scan"))
    return [
        _goal("forward over the ceiling micro-kernel", ratio(seconds("scan"), seconds("scan", "ceiling")), "<=", 1.25),
        _goal("forward, mamba_ssm reference / ours", over("scan", "mamba_ssm reference"), ">=", 180),
        _goal("forward, two-level / ours", over("scan", "two-level"), ">=", 60),
        _goal("forward and backward, unbound / ours", over("scan-train", "reference, unbound"), ">=", 120),
        _goal("forward and backward, two-level / ours", over("scan-train", "two-level"), ">=", 40),
        _goal("all threads over one, forward", both("scan"), ">=", 1.8),
        _goal("all threads over one, forward and backward", both("scan-train"), ">=", 1.7),
        _goal("262,144 tokens: time per token against 4,096", per_token / 64 if per_token else None, "<=", 1.3),
        _goal("16 channels, 262,144 tokens: all threads over one, forward", both("scan-narrow"), ">=", 1.35),
        _goal("16 channels, 262,144 tokens: all threads over one, forward and backward", both("scan-narrow-train"), ">=", 1.35),
        _goal("six orders over 64^3: permute, copy, scan / ours, time", over("six-orders", "permute, copy, scan"), ">=", 3.5),
        _goal("six orders over 64^3: ours / permute, copy, scan, extra memory", room("six-orders", OURS, "permute, copy, scan"), "<=", 1 / 6),
        _goal("depthwise_conv 3x3x3 with silu: PyTorch / ours", over("depthwise", "PyTorch, channels_last_3d"), ">=", 4),
        _goal("checkpoints for backward / one float32 u", extra.get("checkpoint_share"), "<=", 0.25),
        _goal("low-rank delta / full delta, peak memory", room("low-rank", OURS, "full delta"), "<=", 0.25),
        _goal("call overhead without gradients, microseconds", extra.get("overhead_us"), "<=", 8),
        _goal("linear_attention, non-causal: eager PyTorch / ours, forward", over("linear-attention", "eager PyTorch"), ">=", 5),
        _goal("the same, forward and backward", over("linear-attention-train", "eager PyTorch"), ">=", 5),
        _goal("gated_linear_attention, decay per head: chunked PyTorch / ours, forward", over("gla", "chunked PyTorch"), ">=", 5),
        _goal("the same, forward and backward", over("gla-train", "chunked PyTorch"), ">=", 5),
        _goal("gated_linear_attention, decay per key: chunked PyTorch / ours, forward", over("gla-keys", "chunked PyTorch"), ">=", 5),
        _goal("the same, forward and backward", over("gla-keys-train", "chunked PyTorch"), ">=", 5),
        _goal("ssd: chunked PyTorch / ours, forward", over("ssd", "chunked PyTorch"), ">=", 5),
        _goal("the same, forward and backward", over("ssd-train", "chunked PyTorch"), ">=", 5),
        _goal("delta_rule: chunked PyTorch / ours, forward", over("delta", "chunked PyTorch"), ">=", 4),
        _goal("the same, forward and backward", over("delta-train", "chunked PyTorch"), ">=", 4),
        _goal("delta_rule: onnxruntime / ours, forward", over("delta", NAME), ">=", 2),
        _goal("delta_rule with a decay per head: onnxruntime / ours, forward", over("gated-delta", NAME), ">=", 2),
        _goal("gated_linear_attention, decay per head: the best peer / ours, forward", over_best("gla"), ">=", 3.5),
        _goal("gated_linear_attention, decay per key: the best peer / ours, forward", over_best("gla-keys"), ">=", 4),
        _goal("ssd: the best peer / ours, forward", over_best("ssd", WITH_PYTORCH), ">=", 3.5),
        _goal("delta_rule, KDA / a decay per head, forward", family("kda"), "<=", 1.25),
        _goal("the same, forward and backward", family("kda-train"), "<=", 1.25),
        _goal("delta_rule, gated DeltaNet-2 / a decay per head, forward", family("gdn2"), "<=", 1.35),
        _goal("the same, forward and backward", family("gdn2-train"), "<=", 1.35),
        _goal("delta_rule, all four: backward / forward, the slowest", of_backward and of_backward - 1, "<=", 3.5),
        _goal("bi_wkv: loop over tokens in PyTorch / ours, forward", over("wkv", "loop over tokens in PyTorch"), ">=", 50),
        _goal("the same, forward and backward", over("wkv-train", "loop over tokens in PyTorch"), ">=", 50),
        _goal("packed sequences / one sequence, the slowest op, forward", slowest([r for r in packed.ROWS if "-train" not in r]), "<=", 1.05),
        _goal("the same, forward and backward", slowest([r for r in packed.ROWS if "-train" in r]), "<=", 1.05),
        _goal("convolutions 3x3x3 in 8 bits / float32, the slowest of five", slowest([r for r in int8.ROWS if "-3-" in r], int8.FLOAT), "<=", 0.3),
        _goal("medssm_unet tiny in 8 bits / float32", slowest(["int8-tiny"], int8.FLOAT), "<=", 0.65),
        _goal("medssm_unet small in 8 bits / float32", slowest(["int8-small"], int8.FLOAT), "<=", 0.5),
    ]


def _goal(name: str, value: float | None, sense: str, bound: float) -> Goal:
    wanted = f"{'at most' if sense == '<=' else 'at least'} {bound:.3g}"
    if value is None:
        return Goal(name, wanted, "not measured", None)
    return Goal(name, wanted, f"{value:.3g}", value <= bound if sense == "<=" else value >= bound)
