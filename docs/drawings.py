"""Draws the pictures of the pages: `python docs/drawings.py` writes docs/how/*.svg and docs/guides/orders-*.svg. A test holds them to this file.

A kernel's picture has two parts. Above: what it reads, what stays near the processor, what it writes, what it keeps for backward. Below:
how the work is cut, and which threads take what.
"""

from __future__ import annotations

from html import escape
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from medssm import orders

HERE = Path(__file__).resolve().parent
THREADS = ("#8ecae6", "#ffd6a5")
LINES = ("#00796b", "#b5651d", "#5e548e", "#1d6fa5")  # of the segments of a walk
FACES = {"memory": "#eef2f6", "cache": "#fff6d8", "registers": "#dff3e4", "saved": "#fbe3e4"}
LINE = 17  # of text


class Kernel(NamedTuple):
    """One picture: lines of text for each place, then the work as rows of (label, the thread of each cell), and what the axes are."""

    title: str
    read: list[str]
    cache: list[str]
    registers: list[str]
    written: list[str]
    saved: list[str]
    across: str
    down: str
    work: list[tuple[str, list[int]]]
    note: list[str]
    arrow: str = "down"  # the way in which one thread goes: "down", "up", "both", or "" where cells have no order


KERNELS = {
    "selective_scan": Kernel(
        "selective_scan on a CPU, float32 with AVX-512",
        ["u, delta, z: (b, l, d)", "B, C: (b, l, n)", "A, D, bias: (d, n), (d,)"],
        ["a tile of 64 tokens x 16 channels:", "s = softplus(delta + bias), s u", "B and C: one row serves all channels"],
        ["16 channels in the lanes", "h: 16 states = 16 vectors", "y: one vector"],
        ["out: (b, l, d)", "the final state: (b, d, n)"],
        ["h every 64 ceil(n / 16) tokens:", "at most a quarter of u's float32 bytes"],
        "channels, in blocks of 16 (times the batch)",
        "time",
        [(f"tokens {64 * i} to {64 * i + 63}", [0, 0, 0, 1, 1, 1]) for i in range(4)],
        [
            "A thread takes a run of blocks, and all its blocks take a tile before any takes the next.",
            "With fewer blocks than threads, two threads share a block: half of the states each.",
        ],
    ),
    "selective_scan_nd": Kernel(
        "selective_scan_nd: k orders over one volume",
        ["x: (b, z, y, x, d), never permuted", "delta, B, C: one for each order", "index: the token of each step"],
        ["a tile of 64 steps of the order,", "gathered through the index:", "a token's channels are one row"],
        ["as selective_scan"],
        ["order 1: total = y1", "order 2: total = total + y2", "order k: out = (total + yk) silu(z)"],
        ["h every 64 ceil(n / 16) steps,", "for each order"],
        "channels, in blocks of 16 (times the batch)",
        "orders",
        [(name, [0, 0, 0, 1, 1, 1]) for name in ("along x", "along y", "along z", "and back: 3 more")],
        [
            "Orders run one after another. They share one buffer of x's size, so k orders need no k copies.",
            "The sums are added in the order of the list: the same bits at any number of threads.",
        ],
    ),
    "causal_conv1d": Kernel(
        "causal_conv1d on a CPU, width 4",
        ["x: (b, l, d), each token in place", "weight, bias: (d, 4), (d,)"],
        ["pointers to 4 + 3 rows of tokens;", "only rows of another type are copied"],
        ["taps of a vector of channels", "4 outputs: an input vector is loaded", "once for all outputs that see it"],
        ["out: act(bias + taps * x): (b, l, d)", "the last 3 tokens: (b, d, 3)"],
        ["nothing but the inputs:", "backward computes the sum anew"],
        "channels, 256 a task (times the batch)",
        "time",
        [(f"steps {128 * i} to {128 * i + 127}", [i // 2] * 3) for i in range(4)],
        [
            "Tasks are independent. A task reads the 3 tokens before its first one again.",
            "Backward: each task sums its share of dweight; the shares are added in order.",
        ],
        "",
    ),
    "depthwise_conv": Kernel(
        "depthwise_conv on a CPU, 3 x 3 x 3",
        ["x: (b, z, y, x, d), once for a box", "weight, bias: (d, 3, 3, 3), (d,)"],
        ["a ring of 3 planes of the box:", "dense rows, one vector of channels,", "float32, zeros beyond the edges"],
        ["2 x 8 outputs of 16 channels", "an input vector feeds every output", "that sees it: up to 6 multiply-adds"],
        ["out: act(bias + taps * x)"],
        ["nothing but the inputs:", "backward computes the sum anew"],
        "boxes of the volume (times the batch)",
        "channels",
        [(f"vectors {i}", [0, 0, 0, 1, 1, 1]) for i in ("0 to 3", "4 to 7")],
        [
            "A task goes through the planes of its box; each plane of input enters the ring once.",
            "Backward: each box sums its share of dweight; the shares are added in order, in float64.",
        ],
        "",
    ),
    "linear_attention": Kernel(
        "linear_attention over all tokens, on a CPU",
        ["pass 1: k, v: (b, l, h, dk), (…, dv)", "pass 2: q: (b, l, h, dk)"],
        ["a tile of 32 tokens of some heads:", "f(k), or f(q), dense; v in place", "where it is float32"],
        ["rows of kv = sum f(k) v^T", "16 values in the lanes"],
        ["pass 1: kv (b, h, dk, dv), z (b, h, dk)", "pass 2: o = f(q) kv / (f(q) . z + eps)"],
        ["kv and z: their size does not", "depend on the length"],
        "heads (times the batch)",
        "tokens",
        [(f"segment {i + 1}", [i // 2] * 4) for i in range(4)],
        [
            "Pass 1: each segment sums its own kv; the sums are added in order. Pass 2 has no order at all.",
            "How tokens are cut depends on shapes alone: the same bits at any number of threads.",
        ],
        "",
    ),
    "matrix_state": Kernel(
        "gated_linear_attention and ssd on a CPU, float32 with AVX-512",
        ["q, k, v: (b, l, h, dk), (…, dv)", "g: (b, l, h) or (b, l, h, dk)", "ssd: C, B, s x, and s A in their place"],
        ["a tile of 64 tokens of a head:", "q, k as rows, v as vectors,", "exp(g)", "the other rows of the state"],
        ["16 values in the lanes", "16 rows of the state at a time,", "through the whole tile"],
        ["o: (b, l, h, dv)", "the final state: (b, h, dk, dv)"],
        ["nothing but the inputs", "(ssd with z: y before the gate)"],
        "heads (times the batch), in blocks of 16 values",
        "time",
        [(f"tokens {64 * i} to {64 * i + 63}", [0, 0, 0, 1, 1, 1]) for i in range(4)],
        [
            "A block of values needs no other block: so threads may share a head.",
            "Backward: three more passes of this kind, one along the walk and two against it.",
        ],
    ),
    "delta_rule": Kernel(
        "delta_rule on a CPU, float32 with AVX-512",
        ["q, k: (b, l, h, dk); v: (b, l, h, dv)", "beta, g: (b, l, h)"],
        ["the state: dk rows of 32 values", "4 tokens at a time: their k and q,", "their products k . k and q . k"],
        ["a row of the state: loaded once,", "4 updates added, 8 sums taken,", "stored once"],
        ["o: (b, l, h, dv)", "the final state: (b, h, dk, dv)"],
        ["recalled: what the state held for", "each key, (b, l, h, dv)"],
        "heads (times the batch), in blocks of 32 values",
        "time",
        [(f"tokens {4 * i} to {4 * i + 3}", [0, 0, 0, 1, 1, 1]) for i in range(4)],
        [
            "Four tokens share one sweep over the state; what they do to each other follows from their products.",
            "A block of values needs no other block: so threads may share a head.",
        ],
    ),
    "bi_wkv": Kernel(
        "bi_wkv on a CPU",
        ["k, v: (b, l, d), twice", "w, u: (d,)"],
        ["a tile of 32 tokens", "the sums that lie ahead of each tile:", "one for every 32 tokens"],
        ["16 channels in the lanes", "two sums, of weights and of weighted", "values, and their largest exponent"],
        ["out: (b, l, d)"],
        ["nothing but the inputs:", "backward makes the forward pass again"],
        "channels, in blocks of 16 (times the batch)",
        "tokens",
        [(f"tokens {32 * i} to {32 * i + 31}", [0, 0, 0, 1, 1, 1]) for i in range(4)],
        [
            "First from the end to the start: what lies ahead of each tile is kept.",
            "Then from the start to the end: what lies behind is at hand, what lies ahead is looked up.",
        ],
        "both",
    ),
}

ORDERS = {
    "raster": orders.raster(),
    "raster-columns": orders.raster((1, 0)),
    "snake": orders.snake(),
    "window": orders.window(4),
    "dilated": orders.dilated(2),
    "interleaved": orders.interleaved(8),
    "zigzag": orders.zigzag(),
    "hilbert": orders.hilbert(),
}


def kernel_svg(kernel: Kernel) -> str:
    """The picture of one kernel."""
    parts = [_text(20, 28, kernel.title, size=16, weight="bold")]
    height = LINE * max(3, len(kernel.read), len(kernel.cache), len(kernel.registers), len(kernel.written)) + 40
    places = (("memory, read", kernel.read), ("cache", kernel.cache), ("registers", kernel.registers), ("memory, written", kernel.written))
    for i, (name, lines) in enumerate(places):
        x, face = 20 + 250 * i, FACES["memory" if i in (0, 3) else "cache" if i == 1 else "registers"]
        parts += _box(x, 45, 234, height, face, name, lines)
        if i < 3:
            parts.append(_arrow(x + 234, 45 + height / 2, x + 250, 45 + height / 2))
    below = 45 + height + 22
    saved_height = LINE * len(kernel.saved) + 40
    parts += _box(770, below, 234, saved_height, FACES["saved"], "kept for backward", kernel.saved)
    parts += _work(kernel, below)
    bottom = below + max(saved_height, 34 + 30 * len(kernel.work) + 14) + 8
    parts += [_text(20, bottom + LINE * i + 8, line) for i, line in enumerate(kernel.note)]
    return _svg(1024, bottom + LINE * len(kernel.note) + 10, parts)


def _work(kernel: Kernel, top: float) -> list[str]:
    """The cut of the work: a row of cells for each part along `down`, coloured by thread."""
    parts = [_text(190, top + 12, f"across: {kernel.across}", colour="#555")]
    count = max(len(threads) for _, threads in kernel.work)
    width = 510 / count
    for row, (label, threads) in enumerate(kernel.work):
        y = top + 22 + 30 * row
        parts.append(_text(178, y + 19, label, anchor="end"))
        for column, thread in enumerate(threads):
            x = 190 + width * column
            parts.append(f'<rect x="{x:g}" y="{y}" width="{width - 4:g}" height="26" rx="3" fill="{THREADS[thread]}" stroke="#345"/>')
            parts.append(_text(x + (width - 4) / 2, y + 18, f"thread {thread + 1}", anchor="middle", size=11, colour="#345"))
    end = top + 22 + 30 * len(kernel.work)
    parts.append(_text(30, top + 12, f"down: {kernel.down}", colour="#555"))
    if kernel.arrow:
        parts.append(_arrow(22, top + 24, 22, end - 6, both=kernel.arrow == "both"))
    return parts


def order_svg(order: orders.Order, side: int = 8, cell: int = 26) -> str:
    """The walk of an order over a square of pixels: from the filled dot along the line; a new segment begins at each dot."""
    length = side * side
    index, starts = order.index((side, side)).tolist(), [*order.starts((side, side)).tolist(), length]
    size = side * cell + 16

    def at(step: int) -> tuple[int, int]:
        return 8 + cell * (index[step] % side) + cell // 2, 8 + cell * (index[step] // side) + cell // 2

    parts = [
        f'<rect x="{8 + cell * c}" y="{8 + cell * r}" width="{cell}" height="{cell}" fill="#f7f9fb" stroke="#cfd8e0"/>'
        for r in range(side)
        for c in range(side)
    ]
    for number, (begin, end) in enumerate(pairwise(starts)):
        points = " ".join(f"{x},{y}" for x, y in map(at, range(begin, end)))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{LINES[number % len(LINES)]}" stroke-width="2"/>')
        x, y = at(begin)
        parts.append(f'<circle cx="{x}" cy="{y}" r="5" fill="#d1495b"/>')
    return _svg(size, size, parts)


def pictures() -> dict[Path, str]:
    """Every picture by its file."""
    drawn = {HERE / "how" / f"{name}.svg": kernel_svg(kernel) for name, kernel in KERNELS.items()}
    return drawn | {HERE / "guides" / f"orders-{name}.svg": order_svg(order) for name, order in ORDERS.items()}


# -- SVG --------------------------------------------------------------------------------------------------------------------------


def _svg(width: float, height: float, parts: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="Helvetica, Arial, sans-serif">\n'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto-start-reverse">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#345"/></marker></defs>\n'
        f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>\n'
    )
    return head + "\n".join(parts) + "\n</svg>\n"


def _box(x: float, y: float, width: float, height: float, face: str, name: str, lines: list[str]) -> list[str]:
    return [
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{face}" stroke="#345"/>',
        _text(x + 10, y + 20, name, weight="bold"),
        *(_text(x + 10, y + 42 + LINE * i, line) for i, line in enumerate(lines)),
    ]


def _text(x: float, y: float, text: str, size: int = 12, weight: str = "normal", anchor: str = "start", colour: str = "#123") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def _arrow(x1: float, y1: float, x2: float, y2: float, both: bool = False) -> str:
    start = ' marker-start="url(#tip)"' if both else ""
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="#345" stroke-width="1.5" marker-end="url(#tip)"{start}/>'


if __name__ == "__main__":
    for file, drawing in pictures().items():
        file.write_text(drawing)
