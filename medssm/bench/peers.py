"""What people run on a CPU today, each written anew from its algorithm: scans in the channel-first layout (b, d, l) of their users, and a way
to run our networks on one of them.

All scans take u, delta, z (b, d, l); A (d, n); B, C (b, n, l); D, delta_bias (d,) and apply bias, softplus, D and the gate as mamba_ssm does.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad, silu, softplus

import medssm
from medssm import ops
from medssm.bench import onnxruntime_peer
from medssm.nn import convolution
from medssm.orders import Order

Scan: TypeAlias = Callable[..., Tensor]


def _prepare(delta: Tensor, delta_bias: Tensor) -> Tensor:
    return softplus(delta + delta_bias[:, None])


def _finish(y: Tensor, u: Tensor, D: Tensor, z: Tensor | None) -> Tensor:
    y = y + D[:, None] * u
    return y if z is None else y * silu(z)


def literal(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, delta_bias: Tensor) -> Tensor:
    """mamba_ssm's reference as its users run it where there is no CUDA: the whole of exp(delta A) and delta B u (b, d, l, n), then a Python
    loop that indexes one step at a time."""
    delta = _prepare(delta, delta_bias)
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    inputs = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    h, y = u.new_zeros(u.shape[0], u.shape[1], A.shape[1]), []
    for t in range(u.shape[2]):
        h = decay[:, :, t] * h + inputs[:, :, t]
        y.append(torch.einsum("bdn,bn->bd", h, C[:, :, t]))
    return _finish(torch.stack(y, 2), u, D, z)


def unbound(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, delta_bias: Tensor) -> Tensor:
    """The same loop over tensors unbound once: indexing each step would cost its backward O(l^2)."""
    delta = _prepare(delta, delta_bias)
    decay = torch.exp(torch.einsum("bdl,dn->ldbn", delta, A)).unbind(0)
    inputs = torch.einsum("bdl,bnl,bdl->ldbn", delta, B, u).unbind(0)
    h, y = u.new_zeros(u.shape[1], u.shape[0], A.shape[1]), []
    for a, x, c in zip(decay, inputs, C.permute(2, 0, 1).unbind(0), strict=True):
        h = a * h + x
        y.append((h * c).sum(-1))
    return _finish(torch.stack(y, 2).transpose(0, 1), u, D, z)


def mambapy(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, delta_bias: Tensor) -> Tensor:
    """mambapy's parallel scan (a Blelloch scan in PyTorch), from its package."""
    from mambapy.pscan import pscan

    delta = _prepare(delta, delta_bias).transpose(1, 2)
    decay = torch.exp(delta.unsqueeze(-1) * A)
    inputs = (delta * u.transpose(1, 2)).unsqueeze(-1) * B.transpose(1, 2).unsqueeze(2)
    h = pscan(decay, inputs)
    return _finish((h @ C.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2), u, D, z)


def two_level(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, delta_bias: Tensor, chunk: int = 64) -> Tensor:
    """The best that plain PyTorch gives: all chunks step together in a loop of `chunk` steps, then the states are carried from chunk to
    chunk, with exponentials of sums instead of products."""
    batch, channels, length = u.shape
    chunks = math.ceil(length / chunk)
    missing = chunks * chunk - length
    delta_ = pad(_prepare(delta, delta_bias), (0, missing)).view(batch, channels, chunks, chunk)
    u_, B_, C_ = pad(u, (0, missing)).view(batch, channels, chunks, chunk), _chunks(B, missing, chunks), _chunks(C, missing, chunks)
    inside = torch.cumsum(delta_, -1)
    h, states = u.new_zeros(batch, channels, chunks, A.shape[1]), []
    for t in range(chunk):
        step = delta_[..., t, None]
        h = torch.exp(step * A[:, None]) * h + step * u_[..., t, None] * B_[:, None, :, t]
        states.append(h)
    carry, before = u.new_zeros(batch, channels, A.shape[1]), []
    whole = torch.exp(inside[..., -1, None] * A[:, None]).unbind(2)
    for a, last in zip(whole, h.unbind(2), strict=True):
        before.append(carry)
        carry = a * carry + last
    carried = torch.stack(before, 2)
    y = [((states[t] + torch.exp(inside[..., t, None] * A[:, None]) * carried) * C_[:, None, :, t]).sum(-1) for t in range(chunk)]
    return _finish(torch.stack(y, -1).flatten(2)[..., :length], u, D, z)


def _chunks(x: Tensor, missing: int, chunks: int) -> Tensor:
    """(b, n, l) -> (b, chunks, chunk, n)."""
    return pad(x, (0, missing)).unflatten(2, (chunks, -1)).permute(0, 2, 3, 1)


def installed(name: str) -> bool:
    """Whether a peer can run here. One that cannot is reported as absent, never as slower."""
    from importlib.util import find_spec

    if name == onnxruntime_peer.NAME:
        return onnxruntime_peer.installed()
    return name != "mambapy" or find_spec("mambapy") is not None


def absent() -> list[str]:
    """The peers that cannot run here."""
    return [name for name in (*PEERS, onnxruntime_peer.NAME) if not installed(name)]


PEERS: dict[str, Scan] = {"mamba_ssm reference": literal, "reference, unbound": unbound, "mambapy": mambapy, "two-level": two_level}


@contextlib.contextmanager
def in_pytorch(scan: Scan = two_level) -> Iterator[None]:
    """In this block medssm's networks run as they would without our kernels: on `scan`, with a gather and a scatter for each order, on PyTorch's
    convolutions by its own choice of algorithms, on the reference of every other op, and on attention that makes the matrix of its weights."""

    def selective_scan(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        *,
        delta_proj: Tensor | None = None,
        order: Order | None = None,
        **_: Any,
    ) -> Tensor:
        spatial = u.shape[1:-1]
        index = None if order is None else order.index(tuple(spatial))
        delta = delta if delta_proj is None else delta @ delta_proj.T

        def walk(t: Tensor) -> Tensor:
            flat = t.flatten(1, -2)
            return (flat if index is None else flat[:, index]).transpose(1, 2).contiguous()

        y = scan(walk(u), walk(delta), A, walk(B), walk(C), D, None if z is None else walk(z), delta_bias).transpose(1, 2)
        if index is not None:
            y = torch.empty_like(y).index_copy_(1, index, y)
        return y.unflatten(1, spatial).to(u.dtype)

    def selective_scan_nd(
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        *,
        delta_proj: Tensor | None = None,
        orders: Sequence[Order],
        **_: Any,
    ) -> Tensor:
        total = torch.zeros(())
        for k, order in enumerate(orders):
            total = total + selective_scan(
                x,
                delta[..., k, :],
                A[k],
                B[..., k, :],
                C[..., k, :],
                D[k],
                None,
                None if delta_bias is None else delta_bias[k],
                delta_proj=None if delta_proj is None else delta_proj[k],
                order=order,
            )
        return total

    def causal_conv1d(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, *, order: Order | None = None, **_: Any
    ) -> Tensor:
        spatial, taps = x.shape[1:-1], weight.shape[1]
        index = None if order is None else order.index(tuple(spatial))
        flat = x.flatten(1, -2)
        t = (flat if index is None else flat[:, index]).transpose(1, 2)
        y = torch.nn.functional.conv1d(pad(t, (taps - 1, 0)), weight[:, None], bias, groups=len(weight))
        y = (silu(y) if activation else y).transpose(1, 2)
        if index is not None:
            y = torch.empty_like(y).index_copy_(1, index, y)
        return y.unflatten(1, spatial)

    def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any) -> Tensor:
        of_axes = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}
        y = of_axes[x.dim() - 2](x.movedim(-1, 1), weight[:, None], bias, padding=[k // 2 for k in weight.shape[1:]], groups=len(weight)).movedim(
            1, -1
        )
        return silu(y) if activation else y

    with contextlib.ExitStack() as stack:
        for f in (selective_scan, selective_scan_nd, causal_conv1d, depthwise_conv):
            stack.enter_context(_replaced(ops, f.__name__, f))
        stack.enter_context(_replaced(torch.nn.functional, "scaled_dot_product_attention", eager_attention))
        stack.enter_context(_replaced(convolution, "_ONEDNN", False))  # no choice of ours
        stack.enter_context(medssm.use_backend("reference"))
        yield


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, *, scale: float | None = None
) -> Tensor:
    """dropout(softmax(scale q k^T + attn_mask)) v on (..., l, d), as most networks' code has it; scale is by default 1 / sqrt(d)."""
    weights = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = (weights if attn_mask is None else weights + attn_mask).softmax(-1)
    return torch.nn.functional.dropout(weights, dropout_p) @ v


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """The module with another value under a name."""
    ours = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, ours)
