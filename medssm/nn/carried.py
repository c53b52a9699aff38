"""Mixers over a volume in slabs: what they compute voxel by voxel, and how their scans carry a state from one slab to the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from medssm import ops
from medssm.kernels.dtypes import compute_dtype, widened
from medssm.kernels.linear_attention.reference import feature, rotate
from medssm.nn.blocks import depthwise
from medssm.nn.deltanet import DeltaNet
from medssm.nn.gla import GatedLinearAttention
from medssm.nn.inner import plain
from medssm.nn.mamba2 import Mamba2
from medssm.nn.mamba3 import Mamba3
from medssm.nn.mlla import MLLA, turned_from
from medssm.nn.rwkv import SpatialMix, mixed
from medssm.nn.ssnd import SSND
from medssm.orders import Order, raster

_STEEPEST = -60.0  # a decay below this, which makes weights grow, takes them out of float32 over the length of a volume
Scan = Callable[[Tensor, Tensor, Any, Any], tuple[Tensor, Any]]


class Carried(NamedTuple):
    """A mixer in parts, all of them on slabs (1, *spatial, c); `row` is the slab's first one in the volume:

        u = before(x);   total = totals(u, row, total) slab after slab
        y = sum over scans of y_k, with (y_k, state) = scan_k(u, x, state, total) slab after slab along order k;   out = after(y, u, x, row, total)

    halo        rows on both sides that `before` needs, and that `after` needs
    before      None where u is x itself
    scans       (order, scan), the state None at first; an order is a raster, so its slabs are cut along its slowest axis. Without scans y is None
    width       channels of u and of y
    totals      what is known only once all voxels were seen, None at first; without it the total stays None
    """

    halo: tuple[int, int]
    before: Callable[[Tensor], Tensor] | None
    scans: Sequence[tuple[Order, Scan]]
    after: Callable[..., Tensor]
    width: tuple[int, int]
    totals: Callable[[Tensor, int, Any], Any] | None = None


def carried(mixer: nn.Module, spatial: Sequence[int]) -> Carried | None:
    """The parts of a mixer for a volume (*spatial); None for a mixer that needs the whole volume at once."""
    parts = _KINDS[type(mixer)](mixer, spatial) if type(mixer) in _KINDS else None
    return None if parts is None or any(order.kind != "raster" for order, _ in parts.scans) else parts


def _ssnd(m: SSND, spatial: Sequence[int]) -> Carried:
    k, inner = len(m.orders), m.out_proj.in_features
    convolution: nn.Module | None = getattr(m, f"conv{m.spatial_dims}d", None)

    def gates(x: Tensor) -> tuple[Tensor, Tensor | None]:
        u, z = m.in_proj(x).chunk(2, dim=-1) if m.gate else (m.in_proj(x), None)
        return u, z

    def before(x: Tensor) -> Tensor:
        u = gates(x)[0]
        return functional.silu(u) if convolution is None else depthwise(convolution, u, "silu")

    def scan(u: Tensor, x: Tensor, state: Tensor | None, total: Any, i: int) -> tuple[Tensor, Tensor]:
        dt, B, C = functional.linear(u, m.x_proj_weight[i]).split([m.dt_rank, m.d_state, m.d_state], dim=-1)
        A, D = -torch.exp(widened(m.A_logs.unflatten(0, (k, -1))[i])), m.Ds.unflatten(0, (k, -1))[i]
        steps: dict[str, Any] = {"delta_bias": m.dt_projs_bias[i], "delta_softplus": True, "delta_proj": m.dt_projs_weight[i]}
        y, state = ops.selective_scan(u, dt, A, B, C, D, **steps, order=m.orders[i], initial_state=state, return_final_state=True)
        return y, state

    def after(y: Tensor, u: Tensor, x: Tensor, row: int, total: Any) -> Tensor:
        y, z = m.out_norm(y), gates(x)[1]
        if z is not None:
            y = y * (functional.silu(z) if m.gate == "silu" else z)
        out: Tensor = m.dropout(m.out_proj(y))
        return out

    scans = [(order, partial(scan, i=i)) for i, order in enumerate(m.orders)]
    return Carried((0 if convolution is None else _reach(convolution), 0), before, scans, after, (inner, inner))


def _gla(m: GatedLinearAttention, spatial: Sequence[int]) -> Carried:
    def scan(u: Tensor, x: Tensor, state: Tensor | None, total: Any, i: int) -> tuple[Tensor, Tensor]:
        q, k, v = (project(x).unflatten(-1, (m.heads, -1)) for project in (m.q_proj, m.k_proj, m.v_proj))
        g = functional.linear(m.decay_in(x), m.decay_weight[i], m.decay_bias[i]).to(compute_dtype(v))
        g = functional.logsigmoid(g) / m.slowness
        g = g.unflatten(-1, (m.heads, -1)) if m.decay_by == "key" else g
        y, state = ops.gated_linear_attention(q, k, v, g, order=m.orders[i], initial_state=state, return_final_state=True)
        return y.flatten(-2), state

    def after(y: Tensor, u: Tensor, x: Tensor, row: int, total: Any) -> Tensor:
        y = m.o_norm(y.unflatten(-1, (m.heads, -1))).flatten(-2)
        out: Tensor = m.o_proj(y if m.g_proj is None else y * functional.silu(m.g_proj(x)))
        return out

    return Carried((0, 0), None, [(order, partial(scan, i=i)) for i, order in enumerate(m.orders)], after, (0, m.o_proj.in_features))


def _delta(m: DeltaNet, spatial: Sequence[int]) -> Carried | None:
    if m.conv == "order":
        return None

    def before(x: Tensor) -> Tensor:
        u = m.qkv_proj(x)
        return depthwise(m.convolution, u, "silu") if m.conv == "space" else functional.silu(u)

    def scan(u: Tensor, x: Tensor, state: Tensor | None, total: Any, i: int) -> tuple[Tensor, Tensor]:
        y, state = m.recur(*m._heads(u), m.gates(x), order=m.orders[i], initial_state=state, return_final_state=True)
        return y.flatten(-2), state

    def after(y: Tensor, u: Tensor, x: Tensor, row: int, total: Any) -> Tensor:
        y = m.o_norm((y / len(m.orders)).unflatten(-1, (m.heads, -1))).flatten(-2)
        out: Tensor = m.o_proj(y if m.g_proj is None else y * functional.silu(m.g_proj(x)))
        return out

    halo = _reach(m.convolution) if m.conv == "space" else 0
    scans = [(order, partial(scan, i=i)) for i, order in enumerate(m.orders)]
    return Carried((halo, 0), before, scans, after, (sum(m.split), m.split[-1]))


def _mamba2(m: Mamba2, spatial: Sequence[int]) -> Carried | None:
    if not plain(m.conv1d):
        return None

    def scan(u: Tensor, x: Tensor, state: tuple[Tensor, Tensor] | None, total: Any, i: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        _, t, dt = m.in_proj(x).split(m.split, dim=-1)
        taps, sums = state or (None, None)
        along: dict[str, Any] = {"order": m.orders[i], "return_final_state": True}
        t, taps = ops.causal_conv1d(t, m.conv1d.weight.squeeze(1), m.conv1d.bias, "silu", initial_state=taps, **along)
        y, sums = ops.ssd(*m._operands(t, dt), dt_limit=m.dt_limit, initial_state=sums, **along)
        return y.flatten(-2), (taps, sums)

    def after(y: Tensor, u: Tensor, x: Tensor, row: int, total: Any) -> Tensor:
        out: Tensor = m.out_proj(m._gate(y / len(m.orders), m.in_proj(x).split(m.split, dim=-1)[0]))
        return out

    return Carried((0, 0), None, [(order, partial(scan, i=i)) for i, order in enumerate(m.orders)], after, (0, m.split[0]))


def _mamba3(m: Mamba3, spatial: Sequence[int]) -> Carried | None:
    if m.is_outproj_norm and m.is_mimo:  # the scans have an output for each rank
        return None

    def scan(u: Tensor, x: Tensor, state: Any, total: Any, i: int) -> tuple[Tensor, Any]:
        y, state = ops.ssd3(**m._operands(x)[0], order=m.orders[i], initial_state=state, return_final_state=True)
        return y.flatten(-2), state

    def after(y: Tensor, u: Tensor, x: Tensor, row: int, total: Any) -> Tensor:
        return m._out((y / len(m.orders)).unflatten(-1, (-1, m.headdim)), m.in_proj(x).split(m.split, dim=-1)[0])

    return Carried((0, 0), None, [(order, partial(scan, i=i)) for i, order in enumerate(m.orders)], after, (0, m.split[0]))


def _mlla(m: MLLA, spatial: Sequence[int]) -> Carried:
    """Not causal: a first walk sums keys times values, a second one gives each query the sums."""
    attention = m.attn
    heads, length = attention.heads, math.prod(spatial)

    def before(x: Tensor) -> Tensor:
        return depthwise(m.dwc, m.in_proj(x), "silu")

    def turned(x: Tensor, row: int) -> tuple[Tensor, Tensor] | None:
        if not attention.rotary:
            return None
        return attention.by_heads(turned_from(row, x.shape[1:-1], attention.angles, x.device, compute_dtype(x)))

    def rows(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = attention.qk(u).flatten(1, -2).unflatten(-1, (2, heads, -1)).unbind(2)
        return q, k, u.flatten(1, -2).unflatten(-1, (heads, -1))

    def totals(u: Tensor, row: int, total: Any) -> Any:
        q, k, v = rows(u)
        return ops.linear_attention(q, k, v, feature_map="elu", rotary=turned(u, row), initial_state=total, return_final_state=True)[1]

    def after(y: None, u: Tensor, x: Tensor, row: int, total: Any) -> Tensor:
        kv, z = total
        q: Tensor = feature(rows(u)[0].to(kv.dtype), "elu")  # type: ignore[no-untyped-call]
        rotated: Tensor = rotate(q, *(turned(u, row) or (None, None)))  # type: ignore[no-untyped-call]
        num = torch.einsum("blhk,bhkv->blhv", rotated, kv)
        o = num / (torch.einsum("blhk,bhk->blh", q, z) + 1e-6 * length).unsqueeze(-1)
        o = o.flatten(-2).to(u.dtype).view_as(u) + depthwise(attention.lepe, u)
        out: Tensor = m.out_proj(o * functional.silu(m.act_proj(x)))
        return out

    return Carried((_reach(m.dwc), _reach(attention.lepe)), before, [], after, (m.in_proj.out_features, 0), totals)


def _rwkv(m: SpatialMix, spatial: Sequence[int]) -> Carried | None:
    """Both directions are scans that see the voxel itself too; `after` takes it out of them. Keys are shifted by each channel's largest one."""
    length, walk = max(math.prod(spatial), 1), m.order or raster()
    if m.mode != "exact" or (not m.spatial_decay.is_meta and m.spatial_decay.min() < _STEEPEST):
        return None
    w, bonus = widened(m.spatial_decay) / length, widened(m.spatial_first) / length

    def before(x: Tensor) -> Tensor:
        k, v, r = mixed(m, x, "kvr")
        return torch.cat([m.key(k), m.value(v), m.receptance(r)], -1)

    def totals(u: Tensor, row: int, total: Tensor | None) -> Tensor:
        largest = widened(u.chunk(3, -1)[0]).flatten(1, -2).amax(1)
        return largest if total is None else torch.maximum(total, largest)

    def own(u: Tensor, total: Tensor) -> Tensor:
        k, v, _ = u.chunk(3, -1)
        weight = torch.exp(widened(k) - total)
        return torch.cat([weight * v, weight], -1)

    def scan(u: Tensor, x: Tensor, state: Tensor | None, total: Any, order: Order) -> tuple[Tensor, Tensor]:
        t = own(u, total)
        A, ones = -torch.cat([w, w])[:, None], torch.ones_like(t)
        y, state = ops.selective_scan(t, ones, A, ones[..., :1], ones[..., :1], order=order, initial_state=state, return_final_state=True)
        return y, state

    def after(y: Tensor, u: Tensor, x: Tensor, row: int, total: Any) -> Tensor:
        t = own(u, total)
        over, under = (torch.exp(torch.cat([w, w])) * (y - 2 * t) + torch.exp(torch.cat([bonus, bonus])) * t).chunk(2, -1)
        o = (over / under).to(u.dtype)
        out: Tensor = m.output(torch.sigmoid(u.chunk(3, -1)[2]) * (o if m.key_norm is None else m.key_norm(o)))
        return out

    width = m.key.out_features
    return Carried(
        (m.pixels, 0), before, [(order, partial(scan, order=order)) for order in (walk, walk.reversed())], after, (3 * width, 2 * width), totals
    )


def _reach(convolution: Any) -> int:
    """Rows that a depthwise convolution sees on both sides."""
    size: int = convolution.kernel_size[0] // 2
    return size


_KINDS: dict[type[nn.Module], Callable[[Any, Sequence[int]], Carried | None]] = {
    SSND: _ssnd,
    GatedLinearAttention: _gla,
    DeltaNet: _delta,
    Mamba2: _mamba2,
    Mamba3: _mamba3,
    MLLA: _mlla,
    SpatialMix: _rwkv,
}
