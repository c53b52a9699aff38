"""The table's rows of the linear-time mixers: each op beside fla's kernel for it, or mamba_ssm's SSD, on medical and on language-model shapes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import elu, logsigmoid, normalize

from gpu_parts import peers
from gpu_parts.row import Row, both_ways, normal, served
from gpu_parts.timing import DEVICE, Floor, copies
from medssm import ops

# (batch, heads, width, tokens) and the goal: peer / ours, at least.
_MEDICAL = ((1, 4, 32, 262144), (1, 8, 64, 32768), (2, 16, 64, 4096))
_LANGUAGE = ((8, 16, 128, 2048),)
_GOALS = {**dict.fromkeys(_MEDICAL, 1.3), **dict.fromkeys(_LANGUAGE, 1.0)}


def _heads(seed: int, batch: int, length: int, heads: int, width: int, grad: bool) -> list[torch.Tensor]:
    """q, k, v in bf16; k of unit length, as the delta rule wants it."""
    q, k, v = (normal(3 * seed + i, batch, length, heads, width) for i in range(3))
    return [t.detach().requires_grad_(grad) for t in (q, normalize(k.float(), dim=-1).bfloat16(), v)]


def _log_decays(seed: int, *shape: int, grad: bool) -> torch.Tensor:
    return logsigmoid(normal(seed + 100, *shape, dtype=torch.float32, shift=3.0)).requires_grad_(grad)


def _row(op: str, more: Callable, ours: Callable, peer: Callable | None, absent: str | None, name: str, shape, backward: bool, title: str) -> Row:
    """A row of an op on q, k, v and what `more` draws; ours(*tensors, backend=…), peer(*tensors)."""
    batch, heads, width, length = shape

    def make(floor: Floor, rehearse: bool):
        b, h, d, l = (1, 2, 16, 80) if rehearse else (batch, heads, width, length)
        tensors = copies(lambda seed: [*_heads(seed, b, l, h, d, backward), *more(seed, b, l, h, d, backward)], rehearse)
        sides = {backend: both_ways(lambda *t, backend=backend: ours(*t, backend=backend), tensors, backward) for backend in served(op)}
        if peer is not None:
            sides[name] = both_ways(peer, tensors, backward)
        # Each of q, k, v and the output once; backward reads them and dout again and writes three gradients.
        return sides, {"floor": floor.stream(b * l * h * d, 2) * (2 + 4 * backward), "absent": absent}

    where = f"({batch}, {heads} heads of {width}, {length})"
    return Row(f"{title} {where}" + (" and backward" if backward else ""), make, name, _GOALS[shape], memory=True)


def _nothing(*_) -> list[torch.Tensor]:
    return []


def _eager(q, k, v):
    """Non-causal linear attention as people write it, in float32 as EfficientViT does: sums in bf16 lose a tenth of the gradient."""
    dtype, (q, k, v) = v.dtype, (t.float() for t in (q, k, v))
    q, k = elu(q) + 1, elu(k) + 1
    sums = torch.einsum("blhd,blhe->bhde", k, v)
    normaliser = 1 / (torch.einsum("blhd,bhd->blh", q, k.sum(1)) + 1e-6)
    return torch.einsum("blhd,bhde,blh->blhe", q, sums, normaliser).to(dtype)


def _ssd(shape, backward: bool) -> Row:
    """ssd in bf16 with D, z and softplus, state as wide as a head, beside mamba_ssm's chunked kernels."""
    batch, heads, width, length = shape

    def make(floor: Floor, rehearse: bool):
        b, h, d, l = (1, 2, 16, 80) if rehearse else (batch, heads, width, length)

        def inputs(seed):
            x, z = (normal(seed + i, b, l, h, d, grad=backward) for i in (0, 1))
            dt = normal(seed + 2, b, l, h, shift=-4.0, grad=backward)
            B, C = (normal(seed + i, b, l, 1, d, grad=backward) for i in (3, 4))
            A = -torch.linspace(1, 16, h, device=DEVICE)
            return [x, dt, A.requires_grad_(backward), B, C, normal(seed + 5, h, dtype=torch.float32, grad=backward), z]

        tensors = copies(inputs, rehearse)
        sides = {
            backend: both_ways(lambda *t, backend=backend: ops.ssd(*t, dt_softplus=True, backend=backend), tensors, backward)
            for backend in served("ssd")
        }
        peer, absent = peers.mamba_chunk_scan()
        if peer is not None:
            sides["mamba_ssm"] = both_ways(lambda x, dt, A, B, C, D, z: peer(x, dt, A, B, C, 128, D=D, z=z, dt_softplus=True), tensors, backward)
        return sides, {"floor": floor.stream(b * l * (h * d * 3 / 2 + d), 2) * (1 + 1.5 * backward), "absent": absent}

    title = f"ssd ({batch}, {heads} heads of {width}, {length})" + (" and backward" if backward else "")
    return Row(title, make, "mamba_ssm", _GOALS[shape], memory=True)


def rows() -> list[Row]:
    """Every op on every shape, forward, and with backward."""
    fla = {
        name: peers.fla(module, name)
        for module, name in (
            ("linear_attn", "chunk_linear_attn"),
            ("simple_gla", "chunk_simple_gla"),
            ("gla", "chunk_gla"),
            ("delta_rule", "chunk_delta_rule"),
        )
    }

    def first(name):
        """fla's op on our arguments, its output alone; None where it is absent."""
        call = fla[name][0]
        return None if call is None else (lambda *t, **options: call(*t, **options)[0])

    causal, simple, gla, delta = (first(name) for name in fla)
    kinds = [
        ("linear_attention", _nothing, ops.linear_attention, _eager, None, "eager PyTorch", "linear_attention, non-causal"),
        (
            "linear_attention",
            _nothing,
            lambda q, k, v, backend: ops.linear_attention(q, k, v, causal=True, backend=backend),
            causal and (lambda q, k, v: causal(elu(q) + 1, elu(k) + 1, v, scale=1.0, normalize=True)),
            fla["chunk_linear_attn"][1],
            "fla",
            "linear_attention, causal",
        ),
        (
            "gated_linear_attention",
            lambda s, b, l, h, d, grad: [_log_decays(s, b, l, h, grad=grad)],
            ops.gated_linear_attention,
            simple,
            fla["chunk_simple_gla"][1],
            "fla",
            "gated_linear_attention, per head",
        ),
        (
            "gated_linear_attention",
            lambda s, b, l, h, d, grad: [_log_decays(s, b, l, h, d, grad=grad)],
            ops.gated_linear_attention,
            gla,
            fla["chunk_gla"][1],
            "fla",
            "gated_linear_attention, per key",
        ),
        (
            "delta_rule",
            lambda s, b, l, h, d, grad: [torch.sigmoid(normal(s + 100, b, l, h)).detach().requires_grad_(grad)],
            ops.delta_rule,
            delta,
            fla["chunk_delta_rule"][1],
            "fla",
            "delta_rule",
        ),
    ]
    table = []
    for shape in (*_MEDICAL, *_LANGUAGE):
        for backward in (False, True):
            table += [_row(op, more, ours, peer, absent, name, shape, backward, title) for op, more, ours, peer, absent, name, title in kinds]
            table.append(_ssd(shape, backward))
    return table
