"""Rows of the scans and convolutions, and of a whole network on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from medssm import ops, orders
from medssm.bench import peers
from medssm.bench.measure import Side
from medssm.bench.row import OURS, Row, call
from medssm.kernels import native


def scan_inputs(batch: int, channels: int, length: int, state: int, grad: bool = False) -> dict[str, torch.Tensor]:
    """Random inputs of a selective scan in our layout, with steps as Mamba starts with: softplus(delta + bias) from 1e-3 to 1e-1."""
    g = torch.Generator().manual_seed(0)
    shapes = {
        "u": (batch, length, channels),
        "delta": (batch, length, channels),
        "A": (channels, state),
        "B": (batch, length, state),
        "C": (batch, length, state),
        "D": (channels,),
        "z": (batch, length, channels),
        "delta_bias": (channels,),
    }
    tensors = {k: torch.randn(s, generator=g) for k, s in shapes.items()}
    tensors["A"] = -torch.arange(1, state + 1, dtype=torch.float32).repeat(channels, 1)
    tensors["delta"] *= 0.5
    tensors["delta_bias"] = tensors["delta_bias"] - 4
    return {k: t.requires_grad_() if grad else t for k, t in tensors.items()}


def channel_first(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same inputs as the peers take them."""
    return {k: (t.detach().transpose(1, 2).contiguous() if t.dim() == 3 else t.detach()).requires_grad_(t.requires_grad) for k, t in tensors.items()}


def _scan(shape: tuple[int, int, int], state: int, grad: bool, others: tuple[str, ...]) -> dict[str, Side]:
    tensors = scan_inputs(*shape, state, grad)
    sides = {OURS: call(ops.selective_scan, tensors, delta_softplus=True, backend="native")}
    if others:
        theirs = channel_first(tensors)
        sides |= {name: call(peers.PEERS[name], theirs) for name in others if peers.installed(name)}
    if not grad and state == 16 and "ceiling" not in sides:
        sides["ceiling"] = partial(_ceiling, shape[0] * shape[1], shape[2])
    return sides


def _ceiling(channels: int, tokens: int) -> None:
    """The compiled exp-and-FMA loop alone, on as many token-channels."""
    result = torch.zeros(1)
    native.Kernel("ceiling", "scan", native.fields("channels tokens threads sum"))(channels, tokens, torch.get_num_threads(), result.data_ptr())


SIX = orders.axes3d()


def _volume_inputs(n: int, channels: int, rank: int | None) -> dict[str, Any]:
    """Random tensors of a scan of a volume of n^3 voxels along the six orders, with a low-rank delta if `rank` is given."""
    g, k, state = torch.Generator().manual_seed(0), len(SIX), 16
    tensors = {
        "x": torch.randn(1, n, n, n, channels, generator=g),
        "A": -torch.arange(1, state + 1, dtype=torch.float32).repeat(k, channels, 1),
        "B": torch.randn(1, n, n, n, k, state, generator=g),
        "C": torch.randn(1, n, n, n, k, state, generator=g),
        "D": torch.randn(k, channels, generator=g),
        "delta_bias": torch.randn(k, channels, generator=g) - 4,
    }
    tensors["delta"] = torch.randn(1, n, n, n, k, rank or channels, generator=g) * 0.5
    if rank:
        tensors["delta_proj"] = torch.randn(k, channels, rank, generator=g) * 0.3
    return tensors


def _six_orders(n: int = 64, channels: int = 96) -> dict[str, Side]:
    """Scans in place, against SS2D's way in three dimensions: six permuted copies, six scans by the same kernel, six results permuted back."""
    tensors = _volume_inputs(n, channels, None)
    axes = [order.parameters["axes"] for order in SIX]
    copies: dict[str, Any] = {k: [_along(tensors[k][..., i, :], axes[i], SIX[i].reverse) for i in range(len(SIX))] for k in ("delta", "B", "C")}

    def scanned(i: int, u: torch.Tensor) -> torch.Tensor:
        """An order's copy by the same kernel, and the result back in the volume's axes."""
        of = {k: copies[k][i] for k in copies} | {k: tensors[k][i] for k in ("A", "D", "delta_bias")}
        y = ops.selective_scan(u, **of, delta_softplus=True, backend="native")
        y = (y.flip(1) if SIX[i].reverse else y).view(1, n, n, n, channels)
        return y.permute(0, *(1 + axes[i].index(j) for j in range(3)), 4)

    def copied() -> torch.Tensor:
        with torch.no_grad():
            total = scanned(0, _along(tensors["x"], axes[0], SIX[0].reverse)).contiguous()
            for i, order in enumerate(SIX[1:], 1):
                total = total + scanned(i, _along(tensors["x"], axes[i], order.reverse)).contiguous()
            return total

    def stacked() -> torch.Tensor:
        """As VMamba does: all six copies first, all six results, then the merge."""
        with torch.no_grad():
            us = [_along(tensors["x"], a, order.reverse) for a, order in zip(axes, SIX, strict=True)]
            first, *others = [scanned(i, u) for i, u in enumerate(us)]
            return sum(others, first)

    def ours() -> torch.Tensor:
        with torch.no_grad():
            return ops.selective_scan_nd(**tensors, delta_softplus=True, orders=SIX, backend="native")

    return {OURS: ours, "permute, copy, scan": stacked, "the same, one at a time": copied}


def _along(t: torch.Tensor, axes: Sequence[int], reverse: bool) -> torch.Tensor:
    """(1, *spatial, c) as a contiguous sequence along an order."""
    flat = t.permute(0, *(1 + a for a in axes), 4).flatten(1, 3)
    return (flat.flip(1) if reverse else flat).contiguous()


def _low_rank(n: int = 64, channels: int = 96, rank: int = 6) -> dict[str, Side]:
    """delta expanded inside the kernel, against the full delta of six orders made before the scan."""
    tensors = _volume_inputs(n, channels, rank)

    def ours() -> torch.Tensor:
        with torch.no_grad():
            return ops.selective_scan_nd(**tensors, delta_softplus=True, orders=SIX, backend="native")

    def full() -> torch.Tensor:
        with torch.no_grad():
            rest = {k: t for k, t in tensors.items() if k not in ("delta", "delta_proj")}
            delta = torch.einsum("bxyzkr,kdr->bxyzkd", tensors["delta"], tensors["delta_proj"])
            return ops.selective_scan_nd(delta=delta, **rest, delta_softplus=True, orders=SIX, backend="native")

    return {OURS: ours, "full delta": full}


def _depthwise(n: int = 48, channels: int = 96, grad: bool = False) -> dict[str, Side]:
    g = torch.Generator().manual_seed(0)
    x, w, b = torch.randn(1, n, n, n, channels, generator=g), torch.randn(channels, 3, 3, 3, generator=g), torch.randn(channels, generator=g)
    w5 = w.unsqueeze(1).contiguous(memory_format=torch.channels_last_3d)
    leaves = [t.requires_grad_(grad) for t in (x, w, b)]
    theirs = [x.detach().movedim(-1, 1).requires_grad_(grad), w5.detach().requires_grad_(grad), b]

    return {
        OURS: _both_ways(lambda: ops.depthwise_conv(x, w, b, "silu", backend="native"), leaves, grad),
        "PyTorch, channels_last_3d": _both_ways(
            lambda: torch.nn.functional.silu(torch.nn.functional.conv3d(theirs[0], theirs[1], b, padding=1, groups=channels)), theirs, grad
        ),
    }


def _causal(length: int = 4096, channels: int = 192, grad: bool = False) -> dict[str, Side]:
    g = torch.Generator().manual_seed(0)
    x, w, b = torch.randn(1, length, channels, generator=g), torch.randn(channels, 4, generator=g), torch.randn(channels, generator=g)
    leaves = [t.requires_grad_(grad) for t in (x, w, b)]
    theirs = [x.detach().transpose(1, 2).contiguous().requires_grad_(grad), w.detach().unsqueeze(1).requires_grad_(grad), b]

    def in_pytorch() -> torch.Tensor:
        x, w, b = theirs
        return torch.nn.functional.silu(torch.nn.functional.conv1d(x, w, b, padding=3, groups=channels)[..., :length])

    return {
        OURS: _both_ways(lambda: ops.causal_conv1d(x, w, b, "silu", backend="native"), leaves, grad),
        "PyTorch": _both_ways(in_pytorch, theirs, grad),
    }


def _both_ways(function: Callable[[], torch.Tensor], leaves: list[torch.Tensor], grad: bool) -> Side:
    """The function without gradients, or with those of the leaves."""

    def both() -> tuple[torch.Tensor, ...]:
        out = function()
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return function()

    return both if grad else forward


def _whole_model() -> dict[str, Side]:
    """U-Mamba's 3D networks at nnU-Net's widths on a 96^3 patch, with the native and the reference backend; MONAI's SegResNet for scale."""
    import medssm

    torch.manual_seed(0)
    x = torch.randn(1, 1, 96, 96, 96)

    def infer(model: torch.nn.Module, backend: str | None = None) -> Side:
        model = model.eval()

        def run() -> torch.Tensor:
            with torch.no_grad():
                if backend is None:
                    return model(x)
                with medssm.use_backend(backend, strict=True):
                    return model(x)

        return run

    enc = medssm.create_model("umamba_enc", 3, 1, 14)
    bot = medssm.create_model("umamba_bot", 3, 1, 14)
    sides = {
        OURS: infer(enc, "native"),
        "U-Mamba Enc, reference backend": infer(enc, "reference"),
        "U-Mamba Bot, native": infer(bot, "native"),
        "U-Mamba Bot, reference backend": infer(bot, "reference"),
    }
    try:
        from monai.networks.nets import SegResNet
    except ModuleNotFoundError:
        return sides
    return sides | {"MONAI SegResNet": infer(SegResNet(3, 32, 1, 14))}


_PEERS = tuple(peers.PEERS)
_MAIN, _WIDE, _DEEP, _LONG, _NARROW = (1, 96, 4096), (2, 384, 4096), (1, 192, 32768), (1, 96, 262144), (1, 16, 262144)


def _scan_row(
    shape: tuple[int, int, int], state: int = 16, grad: bool = False, others: tuple[str, ...] = (), limit: float = 2.0, memory: bool = False
) -> Row:
    batch, channels, length = shape
    name = "forward and backward" if grad else "forward"
    return Row(
        f"selective_scan {name}, (batch {batch}, {channels} channels, {length} tokens, state {state})",
        partial(_scan, shape, state, grad, others),
        limit=limit,
        memory=memory,
        tokens=batch * channels * length,
    )


ROWS: dict[str, Row] = {
    "scan": _scan_row(_MAIN, others=_PEERS, memory=True),
    "scan-train": _scan_row(_MAIN, grad=True, others=_PEERS[1:], memory=True),
    "scan-wide": _scan_row(_WIDE, others=("two-level",)),
    "scan-wide-train": _scan_row(_WIDE, grad=True, others=("two-level",), limit=1.0),
    "scan-deep": _scan_row(_DEEP, others=("two-level",), limit=1.0),
    "scan-deep-train": _scan_row(_DEEP, grad=True, others=("two-level",), limit=1.0, memory=True),
    "scan-state1": _scan_row(_DEEP, state=1, others=("two-level",), limit=1.0),
    "scan-long": _scan_row(_LONG),
    "scan-long-train": _scan_row(_LONG, grad=True),
    "scan-narrow": _scan_row(_NARROW),
    "scan-narrow-train": _scan_row(_NARROW, grad=True),
    "six-orders": Row("six orders over 64^3, 96 channels, state 16", _six_orders, memory=True, tokens=6 * 96 * 64**3),
    "low-rank": Row(
        "six orders over 64^3, 96 channels: delta of rank 6 against the full delta", _low_rank, "all", memory=True, tokens=6 * 96 * 64**3
    ),
    "depthwise": Row("depthwise_conv 3x3x3 with silu, 96 channels, 48^3, forward", _depthwise, tokens=96 * 48**3),
    "depthwise-kept": Row(
        "depthwise_conv 3x3x3 with silu, 96 channels, 48^3, forward, the allocator keeping freed memory", _depthwise, kept=True, tokens=96 * 48**3
    ),
    "depthwise-train": Row(
        "depthwise_conv 3x3x3 with silu, 96 channels, 48^3, forward and backward", partial(_depthwise, grad=True), limit=1.0, tokens=96 * 48**3
    ),
    "causal": Row("causal_conv1d of 4 taps with silu, 192 channels, 4,096 tokens, forward", _causal, tokens=192 * 4096),
    "causal-train": Row(
        "causal_conv1d of 4 taps with silu, 192 channels, 4,096 tokens, forward and backward", partial(_causal, grad=True), tokens=192 * 4096
    ),
    "model": Row("U-Mamba Enc, 3D, inference on a 96^3 patch", _whole_model, "all", limit=5.0),
}

# The backward of the literal reference is O(l^2): it is measured at small lengths only.
QUICK: dict[str, Row] = {
    "scan": _scan_row((1, 16, 256), others=_PEERS, memory=True),
    "scan-train": _scan_row((1, 16, 256), grad=True, others=_PEERS),
    "depthwise": Row("depthwise_conv 3x3x3 with silu, 16 channels, 12^3, forward", partial(_depthwise, 12, 16), tokens=16 * 12**3),
}
