"""The linear-time mixers as people run them on a CPU today, each written anew from its algorithm in plain PyTorch.

Heads come before tokens, q, k (b, h, l, dk), v (b, h, l, dv), unless said otherwise. Chunked forms do matrix products inside chunks of 64 tokens and
carry the states from chunk to chunk in a loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import elu, pad, silu, softplus

_CHUNK = 64


def linear_attention_of_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`linear_attention` for q, k, v (b, l, h, d), the layout that projections give: heads are moved before tokens and back."""
    return linear_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).contiguous()


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Non-causal, elu + 1, normalised: the key-value sums, then the queries."""
    q, k = elu(q) + 1, elu(k) + 1
    sums = torch.einsum("bhld,bhle->bhde", k, v)
    normaliser = 1 / (torch.einsum("bhld,bhd->bhl", q, k.sum(2)) + 1e-6)
    return torch.einsum("bhld,bhde,bhl->bhle", q, sums, normaliser)


def causal_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal, elu + 1, normalised: the normaliser is one more column of v."""
    ones = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    o = _chunked(elu(q) + 1, elu(k) + 1, ones, torch.zeros_like(q[..., 0]))
    return o[..., :-1] / (o[..., -1:] + 1e-6)


def plain_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal, no feature map, not normalised."""
    return _chunked(q, k, v, torch.zeros_like(q[..., 0]))


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Decay g (b, h, l) per head, or (b, h, l, dk) per key."""
    q = q * q.shape[-1] ** -0.5
    return _chunked(q, k, v, g) if g.dim() == 3 else _chunked_per_key(q, k, v, g)


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
    """Mamba-2's state-space duality: x, z (b, h, l, p); dt (b, h, l); A, D, dt_bias (h,); B, C (b, 1, l, n), shared by the heads."""
    step = softplus(dt + dt_bias[:, None])
    heads = x.shape[1]
    y = _chunked(C.expand(-1, heads, -1, -1), B.expand(-1, heads, -1, -1), x * step[..., None], step * A[:, None])
    return (y + D[:, None, None] * x) * silu(z)


def ssd3(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, trap: Tensor, angles: Tensor, D: Tensor, z: Tensor, B_bias: Tensor, C_bias: Tensor
) -> Tensor:
    """Mamba-3 of one rank: x, z (b, h, l, p); dt, A, trap (b, h, l); angles (b, h, l, a); B, C (b, 1, l, n), their biases (h, n); D (h,)."""
    mix, turns = torch.sigmoid(trap), torch.cumsum(math.pi * torch.tanh(angles) * dt[..., None], 2)
    q, k = _turned(C + C_bias[:, None], turns), _turned(B + B_bias[:, None], turns)
    later = pad(((1 - mix) * dt)[..., 1:], (0, 1))
    y = _chunked(q, k, x * (mix * dt + later)[..., None], dt * A) - (later * (q * k).sum(-1))[..., None] * x
    return (y + D[:, None, None] * x) * silu(z)


def _turned(t: Tensor, turns: Tensor) -> Tensor:
    """The first pairs of channels (2i, 2i+1) turned."""
    turning, rest = t.split([2 * turns.shape[-1], t.shape[-1] - 2 * turns.shape[-1]], -1)
    one, two = turning.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = torch.cos(turns), torch.sin(turns)
    return torch.cat([torch.stack([one * cos - two * sin, one * sin + two * cos], -1).flatten(-2), rest], -1)


def delta_step(state: Tensor, q: Tensor, k: Tensor, u: Tensor, w: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """A chunk of the delta rule: its outputs, and the state after it."""
    new = u - w @ state
    return q @ state + scores @ new, state + k.transpose(-1, -2) @ new


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, step: Callable[..., tuple[Tensor, Tensor]] = delta_step) -> Tensor:
    """Ungated: inside a chunk the updates are the solution of a triangular system (Yang et al., arXiv 2406.06484). `step` replaces delta_step."""
    length = q.shape[2]
    q, k, v = (_chunks(t) for t in (q * q.shape[-1] ** -0.5, k, v))
    beta = _chunks(beta.unsqueeze(-1))
    lower = torch.tril(beta * k @ k.transpose(-1, -2), -1)
    solved = torch.linalg.solve_triangular(lower, torch.cat([beta * k, beta * v], -1), upper=False, unitriangular=True)
    w, u = solved.split([k.shape[-1], v.shape[-1]], -1)
    scores = torch.tril(q @ k.transpose(-1, -2))
    state, out = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for chunk in zip(*(t.unbind(2) for t in (q, k, u, w, scores)), strict=True):
        o, state = step(state, *chunk)
        out.append(o)
    return torch.stack(out, 2).flatten(2, 3)[:, :, :length]


def bi_wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A loop over the tokens each way with running maxima, which is what there is without the published CUDA kernels: k, v (b, l, d)."""
    left = _running(w, k, v)
    right = [t.flip(1) for t in _running(w, k.flip(1), v.flip(1))]
    own = u + k
    top = torch.maximum(torch.maximum(left[0], right[0]), own)
    weights = [torch.exp(t - top) for t in (left[0], right[0], own)]
    return (weights[0] * left[1] + weights[1] * right[1] + weights[2] * v) / (weights[0] * left[2] + weights[1] * right[2] + weights[2])


def _running(w: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Before each token: the exponent, and the sums of v and of 1 scaled by it, over the tokens before, each weighted e^(k - (distance - 1) w)."""
    top, total, count = torch.full_like(k[:, 0], -1e38), torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0])
    tops, totals, counts = [], [], []
    for key, value in zip(k.unbind(1), v.unbind(1), strict=True):
        tops.append(top)
        totals.append(total)
        counts.append(count)
        fresh = torch.maximum(top - w, key)
        old, new = torch.exp(top - w - fresh), torch.exp(key - fresh)
        top, total, count = fresh, old * total + new * value, old * count + new
    return torch.stack(tops, 1), torch.stack(totals, 1), torch.stack(counts, 1)


def _chunks(t: Tensor) -> Tensor:
    """(b, h, l, …) -> (b, h, chunks, 64, …), padded with zeros at the end."""
    return pad(t, (0, 0) * (t.dim() - 3) + (0, -t.shape[2] % _CHUNK)).unflatten(2, (-1, _CHUNK))


def _chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Linear attention with a decay per head, g (b, h, l): S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = q_t S_t."""
    length = q.shape[2]
    q, k, v, g = _chunks(q), _chunks(k), _chunks(v), torch.cumsum(_chunks(g), -1)
    inside = torch.tril(torch.exp(torch.tril(g[..., :, None] - g[..., None, :])))
    added = (k * torch.exp(g[..., -1:] - g)[..., None]).transpose(-1, -2) @ v
    out = (q @ k.transpose(-1, -2) * inside) @ v
    return _carried(out, q * torch.exp(g)[..., None], added, torch.exp(g[..., -1])[..., None, None], length)


def _chunked_per_key(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The usual factored form, exp(G_i) q . exp(-G_j) k. It is right only as long as exp(-G) of a chunk does not overflow."""
    length = q.shape[2]
    q, k, v, g = _chunks(q), _chunks(k), _chunks(v), torch.cumsum(_chunks(g), -2)
    decayed = q * torch.exp(g)
    out = torch.tril(decayed @ (k * torch.exp(-g)).transpose(-1, -2)) @ v
    added = (k * torch.exp(g[..., -1:, :] - g)).transpose(-1, -2) @ v
    return _carried(out, decayed, added, torch.exp(g[..., -1, :])[..., None], length)


def _carried(out: Tensor, q: Tensor, added: Tensor, decay: Tensor, length: int) -> Tensor:
    """The chunks' outputs with what the states before them add: state = decay * state + added, chunk after chunk."""
    state, before = torch.zeros_like(added[:, :, 0]), []
    for a, d in zip(added.unbind(2), decay.unbind(2), strict=True):
        before.append(state)
        state = d * state + a
    return (out + q @ torch.stack(before, 2)).flatten(2, 3)[:, :, :length]
