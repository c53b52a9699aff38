"""The table: shapes, sides that do the same work, and goals."""

from __future__ import annotations

import torch

from gpu_parts import mixers, peers
from gpu_parts.row import Row, both_ways, normal, served
from gpu_parts.timing import DEVICE, Floor, copies
from medssm import ops, orders


def scan(batch: int, channels: int, length: int, state: int, backward: bool):
    """selective_scan in bf16 with softplus, D and z, beside mamba_ssm's CUDA kernel."""

    def make(floor: Floor, rehearse: bool):
        l, d = (96, 8) if rehearse else (length, channels)

        def inputs(seed):
            tokens = [normal(seed, batch, l, d, grad=backward), normal(seed + 1, batch, l, d, scale=0.5, shift=-4, grad=backward)]
            A = -torch.arange(1, state + 1, device=DEVICE, dtype=torch.float32).repeat(d, 1).requires_grad_(backward)
            rows = [normal(seed + 2 + i, batch, l, state, grad=backward) for i in range(2)]
            return [*tokens, A, *rows, normal(seed + 5, d, dtype=torch.float32, grad=backward), normal(seed + 6, batch, l, d, grad=backward)]

        tensors = copies(inputs, rehearse)
        sides = {
            name: both_ways(lambda *t, name=name: ops.selective_scan(*t, delta_softplus=True, backend=name), tensors, backward)
            for name in served("selective_scan")
        }
        peer, absent = peers.selective_scan_fn()
        if peer is not None:
            mirrored = [[t.detach().transpose(1, 2).contiguous().requires_grad_(backward) if t.dim() == 3 else t for t in given] for given in tensors]
            sides["mamba_ssm"] = both_ways(lambda *t: peer(*t, delta_bias=None, delta_softplus=True), mirrored, backward)
        seconds = floor.scan(batch * l * d, state, 2, False) + (floor.scan(batch * l * d, state, 2, True) if backward else 0)
        return sides, {"floor": seconds, "absent": absent}

    return make


def ss2d(batch: int, channels: int, side: int, backward: bool):
    """Four orders over an image, beside cross-scan, mamba_ssm's scan and cross-merge."""

    def make(floor: Floor, rehearse: bool):
        d, n, k = (12, 4, 4) if rehearse else (channels, 16, 4)
        s = 8 if rehearse else side

        def inputs(seed):
            return [
                normal(seed, batch, s, s, d, grad=backward),
                normal(seed + 1, batch, s, s, k, d, scale=0.5, shift=-4, grad=backward),
                -torch.arange(1, n + 1, device=DEVICE, dtype=torch.float32).repeat(k, d, 1).requires_grad_(backward),
                normal(seed + 2, batch, s, s, k, n, grad=backward),
                normal(seed + 3, batch, s, s, k, n, grad=backward),
                normal(seed + 4, k, d, dtype=torch.float32, grad=backward),
            ]

        tensors, walks = copies(inputs, rehearse), orders.cross2d()
        sides = {
            name: both_ways(lambda *t, name=name: ops.selective_scan_nd(*t, delta_softplus=True, orders=walks, backend=name), tensors, backward)
            for name in served("selective_scan_nd")
        }
        peer, absent = peers.selective_scan_fn()
        if peer is not None:
            mirrored = [_crossed(given, walks, backward) for given in tensors]

            def crossed(x, delta, A, B, C, D):
                y = peer(peers.cross_scan(x).flatten(1, 2), delta, A, B, C, D, delta_softplus=True)
                return peers.cross_merge(y.unflatten(1, (k, d)), s, s)

            sides["cross-scan, mamba_ssm, cross-merge"] = both_ways(crossed, mirrored, backward)
        tokens = batch * s * s * d * k
        seconds = floor.scan(tokens, n, 2, False) + (floor.scan(tokens, n, 2, True) if backward else 0)
        return sides, {"floor": seconds, "absent": absent}

    return make


def _crossed(given: list[torch.Tensor], walks, backward: bool) -> list[torch.Tensor]:
    """As VMamba lays them out: x (b, d, h, w); delta, B and C are worked out from the crossed x there, so they come in the order of each walk."""
    x, delta, A, B, C, D = (t.detach() for t in given)
    index = [walk.index(tuple(x.shape[1:3])).to(x.device) for walk in walks]

    def along(t):  # (b, h, w, k, c) -> (b, k, c, l)
        tokens = t.flatten(1, 2)
        return torch.stack([tokens[:, p, i].transpose(1, 2) for i, p in enumerate(index)], 1).contiguous()

    laid = [x.movedim(-1, 1).contiguous(), along(delta).flatten(1, 2), A.flatten(0, 1), along(B), along(C), D.flatten()]
    return [t.clone().requires_grad_(backward) for t in laid]


def volume(side: int, channels: int):
    """Six orders over a volume, forward and backward, and the memory that it may take."""

    def make(floor: Floor, rehearse: bool):
        d, n, k = (8, 4, 6) if rehearse else (channels, 16, 6)
        s = 4 if rehearse else side

        def inputs(seed):
            return [
                normal(seed, 1, s, s, s, d, grad=True),
                normal(seed + 1, 1, s, s, s, k, d, scale=0.5, shift=-4, grad=True),
                -torch.arange(1, n + 1, device=DEVICE, dtype=torch.float32).repeat(k, d, 1).requires_grad_(),
                normal(seed + 2, 1, s, s, s, k, n, grad=True),
                normal(seed + 3, 1, s, s, s, k, n, grad=True),
            ]

        tensors, walks = [inputs(0)], orders.axes3d()
        sides = {
            name: both_ways(lambda *t, name=name: ops.selective_scan_nd(*t, delta_softplus=True, orders=walks, backend=name), tensors, True)
            for name in served("selective_scan_nd")
        }
        tokens = s**3
        # Outputs and gradients in bf16, one float32 accumulator each way, checkpoints, dB and dC in float32 while they are summed.
        allowed = tokens * d * (2 + 2 + 2 * k + 4 + 4) + tokens // 64 * k * n * d * 4 + 2 * tokens * n * (2 * k + 4)
        seconds = floor.scan(tokens * d * k, n, 2, False) + floor.scan(tokens * d * k, n, 2, True)
        return sides, {"floor": seconds, "memory": allowed}

    return make


def convolution(batch: int, channels: int, length: int, backward: bool):
    """causal_conv1d of width 4 with silu, beside causal_conv1d's kernel (which takes channels last too)."""

    def make(floor: Floor, rehearse: bool):
        l, d = (64, 8) if rehearse else (length, channels)
        tensors = copies(
            lambda seed: [
                normal(seed, batch, l, d, grad=backward),
                normal(1, d, 4, dtype=torch.float32, grad=backward),
                normal(2, d, dtype=torch.float32, grad=backward),
            ],
            rehearse,
        )
        sides = {
            name: both_ways(lambda *t, name=name: ops.causal_conv1d(*t, "silu", backend=name), tensors, backward) for name in served("causal_conv1d")
        }
        peer, absent = peers.causal_conv1d_fn()
        if peer is not None:
            sides["causal_conv1d"] = both_ways(lambda x, w, b: peer(x.transpose(1, 2), w, b, activation="silu"), tensors, backward)
        return sides, {"floor": floor.stream(batch * l * d, 2) * (2.5 if backward else 1), "absent": absent}

    return make


def depthwise(channels: int, side: int, backward: bool):
    """depthwise_conv 3x3x3 with silu, beside PyTorch's, channels last."""

    def make(floor: Floor, rehearse: bool):
        d, s = (8, 4) if rehearse else (channels, side)
        tensors = copies(
            lambda seed: [normal(seed, 1, s, s, s, d, grad=backward), normal(1, d, 3, 3, 3, grad=backward), normal(2, d, grad=backward)], rehearse
        )

        def theirs(x, weight, bias):
            y = torch.nn.functional.conv3d(x.movedim(-1, 1), weight.unsqueeze(1), bias, padding=1, groups=d)
            return torch.nn.functional.silu(y)

        sides = {
            name: both_ways(lambda *t, name=name: ops.depthwise_conv(*t, "silu", backend=name), tensors, backward)
            for name in served("depthwise_conv")
        }
        sides["PyTorch"] = both_ways(theirs, tensors, backward)
        return sides, {"floor": floor.stream(s**3 * d, 2) * (2.5 if backward else 1)}

    return make


def nearest(channels: int, length: int):
    """One state a channel: ours, and fla's gated scan, which computes less (its decay is given, B and C are 1)."""

    def make(floor: Floor, rehearse: bool):
        l, d = (64, 8) if rehearse else (length, channels)
        tensors = copies(
            lambda seed: [
                normal(seed, 1, l, d),
                normal(seed + 1, 1, l, d, scale=0.5, shift=-4),
                -torch.ones(d, 1, device=DEVICE),
                normal(seed + 2, 1, l, 1),
                normal(seed + 3, 1, l, 1),
            ],
            rehearse,
        )
        sides = {
            name: both_ways(lambda *t, name=name: ops.selective_scan(*t, delta_softplus=True, backend=name), tensors, False)
            for name in served("selective_scan")
        }
        peer, absent = peers.fla("hgrn", "chunk_hgrn")
        if peer is not None:
            sides["fla chunk_hgrn"] = both_ways(lambda u, delta, *_: peer(u, torch.nn.functional.logsigmoid(delta))[0], tensors, False)
        return sides, {"floor": floor.scan(l * d, 1, 2, False), "absent": absent}

    return make


def rows(rehearse: bool) -> list[Row]:
    """Every row; a rehearsal has them all, at toy sizes."""
    table = []
    for batch, channels, length, ratio in ((1, 96, 64**3, 4.0), (1, 192, 32**3, 4.0), (2, 384, 4096, 1.5), (8, 2048, 2048, 1.0)):
        for backward in (False, True):
            title = f"selective_scan ({batch}, {channels}, {length})" + (" and backward" if backward else "")
            table.append(Row(title, scan(batch, channels, length, 16, backward), "mamba_ssm", ratio))
    table += [
        Row("selective_scan (1, 96, 128^3)", scan(1, 96, 128**3, 16, False), share=0.5),
        Row("selective_scan (1, 96, 128^3) and backward", scan(1, 96, 128**3, 16, True), share=0.4, memory=True),
        Row("SS2D (1, 192, 128x128)", ss2d(1, 192, 128, False), "cross-scan, mamba_ssm, cross-merge", 3.0),
        Row("SS2D (1, 192, 128x128) and backward", ss2d(1, 192, 128, True), "cross-scan, mamba_ssm, cross-merge", 3.0),
        Row("SS2D (8, 96, 56x56)", ss2d(8, 96, 56, False), "cross-scan, mamba_ssm, cross-merge", 2.0),
        Row("SS2D (8, 96, 56x56) and backward", ss2d(8, 96, 56, True), "cross-scan, mamba_ssm, cross-merge", 2.0),
        Row("six orders over (1, 96, 64^3) and backward", volume(64, 96), memory=True),
        Row("one state: (1, 96, 64^3)", nearest(96, 64**3)),
        Row("causal_conv1d (1, 192, 64^3)", convolution(1, 192, 64**3, False), "causal_conv1d"),
        Row("causal_conv1d (1, 192, 64^3) and backward", convolution(1, 192, 64**3, True), "causal_conv1d"),
        Row("depthwise_conv 3x3x3 (1, 96, 64^3)", depthwise(96, 64, False), "PyTorch"),
        Row("depthwise_conv 3x3x3 (1, 96, 64^3) and backward", depthwise(96, 64, True), "PyTorch"),
    ]
    return table + mixers.rows()
