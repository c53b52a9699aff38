"""Every op in a process that may take little memory: `python -m tests.kernels.out_of_memory THREADS` prints what happened, as JSON.

A call is repeated under a limit of its memory that rises until it succeeds. In between lie limits under which the outputs can be had and the
kernel's scratch memory cannot. The shapes are those whose scratch memory is large beside the outputs.
"""

from __future__ import annotations

import ctypes
import json
import sys

import torch

from medssm import ops, orders

STEP, MOST = 128 << 10, 64 << 20  # bytes: how much the limit rises each time, and where it ends


def _draw(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(shape, generator=generator).requires_grad_() for shape in shapes]


def _selective_scan(length, channels, state):
    u, delta, A, B, C = _draw((1, length, channels), (1, length, channels), (channels, state), (1, length, state), (1, length, state))
    return (u, delta, A, B, C), lambda: ops.selective_scan(u, delta, -A, B, C, backend="native")


def _selective_scan_nd(side, channels, state):
    image, walks = (1, side, side), orders.cross2d()[:2]
    x, delta, A, B, C = _draw((*image, channels), (*image, 2, channels), (2, channels, state), (*image, 2, state), (*image, 2, state))
    return (x, delta, A, B, C), lambda: ops.selective_scan_nd(x, delta, -A, B, C, orders=walks, backend="native")


def _causal_conv1d(length, channels):
    x, weight = _draw((1, length, channels), (channels, 4))
    return (x, weight), lambda: ops.causal_conv1d(x, weight, activation="silu", backend="native")


def _depthwise_conv(side, channels):
    x, weight = _draw((1, side, side, channels), (channels, 3, 3))
    return (x, weight), lambda: ops.depthwise_conv(x, weight, activation="silu", backend="native")


def _ssd(length, heads):
    x, dt, A, B, C = _draw((1, length, heads, 1), (1, length, heads), (heads,), (1, length, 1, 16), (1, length, 1, 16))
    return (x, dt, A, B, C), lambda: ops.ssd(x, dt, -A, B, C, backend="native")


def _ssd3(length, heads):
    x, dt, A, trap = _draw((1, length, heads, 1), *[(1, length, heads)] * 3)
    B, C, angles = _draw((1, length, 1, 16), (1, length, 1, 16), (1, length, heads, 8))
    return (x, dt, A, B, C, trap, angles), lambda: ops.ssd3(x, dt, -A, B, C, trap, angles, backend="native")


def _linear_attention(length, heads, causal=False):
    q, k, v = _draw(*[(1, length, heads, 64)] * 3)
    return (q, k, v), lambda: ops.linear_attention(q, k, v, causal=causal, backend="native")


def _gated_linear_attention(length, heads, size):
    q, k, v, g = _draw(*[(1, length, heads, size)] * 3, (1, length, heads))
    return (q, k, v, g), lambda: ops.gated_linear_attention(q, k, v, -g, backend="native")


def _delta_rule(length, heads, keys):
    q, k, v, beta, g = _draw((1, length, heads, keys), (1, length, heads, keys), (1, length, heads, 16), (1, length, heads), (1, length, heads))
    return (q, k, v, beta, g), lambda: ops.delta_rule(q, k / keys, v, beta, g=-g, backend="native")


def _bi_wkv(length, channels):
    w, u, k, v = _draw((channels,), (channels,), (1, length, channels), (1, length, channels))
    return (w, u, k, v), lambda: ops.bi_wkv(w, u, k, v, backend="native")


#: Each op's leaves and call, from sizes; sizes that need much scratch memory; small ones.
CALLS = {
    "selective_scan": (_selective_scan, (64, 256, 256), (5, 3, 2)),
    "selective_scan_nd": (_selective_scan_nd, (8, 256, 256), (3, 3, 2)),
    "causal_conv1d": (_causal_conv1d, (16, 16384), (5, 3)),
    "depthwise_conv": (_depthwise_conv, (16, 4096), (3, 3)),
    "ssd": (_ssd, (4096, 16), (5, 2)),
    "ssd3": (_ssd3, (4096, 16), (5, 2)),
    "linear_attention": (_linear_attention, (64, 32), (5, 2)),
    "causal_linear_attention": (lambda *sizes: _linear_attention(*sizes, causal=True), (64, 32), (5, 2)),
    "gated_linear_attention": (_gated_linear_attention, (64, 16, 128), (5, 2, 3)),
    "delta_rule": (_delta_rule, (4, 1, 4096), (5, 2, 3)),
    "bi_wkv": (_bi_wkv, (16384, 16), (5, 3)),
}


def _under(limit_above: int, call):
    """call() with the process's memory limited to what it has and so many bytes more."""
    import resource

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + limit_above, resource.RLIM_INFINITY))
    try:
        return call()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)


_libc = ctypes.CDLL(None)
_libc.malloc.restype, _libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]


def _prepare_memory() -> None:
    """Pieces of 32 KiB and more come from the system and go back to it; for smaller ones the heap has gaps."""
    for parameter, value in ((-1, 1 << 30), (-3, 32 << 10), (-8, 1)):  # glibc's M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX
        assert _libc.mallopt(parameter, value)
    for piece in [_libc.malloc(16 << 10) for _ in range(512)][::2]:
        _libc.free(piece)


def _close_larger_gaps() -> None:
    while _libc.malloc(32 << 10):
        pass


def _fail(call, small, want_small) -> dict:
    want, messages = call(), []
    _under(0, _close_larger_gaps)
    for above in range(0, MOST, STEP):
        try:
            got = _under(above, call)
        except MemoryError as error:
            messages.append(str(error))
        except RuntimeError as error:  # torch could not allocate an output
            assert "alloc" in str(error), error
        else:
            equal = all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            return {"messages": messages, "large": equal, "small": all(torch.equal(a, b) for a, b in zip(small(), want_small, strict=True))}
    raise AssertionError("no limit was enough")


def _tasks(make, sizes):
    leaves, call = make(*sizes)
    out = call()
    dout = torch.ones_like(out)

    def forward():
        with torch.no_grad():
            return (call(),)

    return forward, lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def main(threads: int) -> None:
    torch.set_num_threads(threads)
    _prepare_memory()
    report = {}
    for op, (make, large, small) in CALLS.items():
        report[op] = {}
        for name, call, little in zip(("forward", "backward"), _tasks(make, large), _tasks(make, small), strict=True):
            report[op][name] = _fail(call, little, little())
    print(json.dumps(report))


if __name__ == "__main__":
    main(int(sys.argv[1]))
