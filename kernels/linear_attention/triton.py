"""Linear attention on a GPU, in Triton: allocates and launches. The kernels for sums over all tokens are in triton_whole.py; causal sums are in
triton_causal.py.

The caller has checked shapes and dtypes. PyTorch adds the sums of segments of tokens in a fixed order; nothing is added atomically.
"""

from __future__ import annotations

import torch
import triton

from medssm.kernels.linear_attention import triton_causal
from medssm.kernels.linear_attention import triton_whole as kernels
from medssm.kernels.native import lanes, like
from medssm.kernels.triton import on, plain, pointers, strided

PROGRAMS = 1024  # of `sums`: enough to fill a large GPU
TOKENS = ("batch", "token", "head")  # the names of strides
_MAPS = {None: 0, "relu": 1, "elu": 2}
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def forward(q, k, v, cos, sin, initial_kv, initial_k, feature_map, causal, normalize, scale, eps, index, starts, reverse, sequences=None):
    """Arguments as in `reference.linear_attention`. Returns out (b,l,h,dv) contiguous and the sums, kv and z."""
    if causal:
        return triton_causal.forward(
            q, k, v, cos, sin, initial_kv, initial_k, feature_map, causal, normalize, scale, eps, index, starts, reverse, sequences
        )
    q, k, v, cos, sin, initial_kv, initial_k = (None if t is None else lanes(t) for t in plain(q, k, v, cos, sin, initial_kv, initial_k))
    out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=v.dtype, device=v.device)
    with on(q):
        kv, z = _sums(k, v, cos, sin, None, 1.0, 1.0, feature_map, k.shape[2])
        if initial_kv is not None:
            kv, z = kv + initial_kv, z + initial_k
        _outputs(q, kv, z, cos, sin, out, scale, eps, feature_map, normalize)
    return out, kv, z


def backward(
    dout, dkv, dz, kv, z, q, k, v, cos, sin, initial_kv, initial_k, feature_map, causal, normalize, scale, eps, index, starts, reverse, sequences=None
):
    """Gradients of q, k, v, initial_kv and initial_k (None where that input is), each in its input's dtype and contiguous.

    kv and z are forward's.
    """
    if causal:
        return triton_causal.backward(
            dout,
            dkv,
            dz,
            kv,
            z,
            q,
            k,
            v,
            cos,
            sin,
            initial_kv,
            initial_k,
            feature_map,
            causal,
            normalize,
            scale,
            eps,
            index,
            starts,
            reverse,
            sequences,
        )
    dout, dkv, dz, kv, z, q, k, v, cos, sin = (None if t is None else lanes(t) for t in plain(dout, dkv, dz, kv, z, q, k, v, cos, sin))
    kv, z = kv.contiguous(), z.contiguous()
    dq, dk, dv = like(q), like(k), like(v)
    groups = k.shape[2]
    with on(q):
        weights = _factors(q, dout, kv, z, cos, sin, scale, eps, feature_map) if normalize else None
        _inputs(q, dout, kv, z, cos, sin, weights, dq, scale, 0.0, feature_map)
        total_kv, total_z = _sums(q, dout, cos, sin, weights, scale, 0.0, feature_map, groups)
        total_kv = total_kv if dkv is None else total_kv + dkv
        total_z = total_z if dz is None else total_z + dz
        _inputs(k, v, total_kv, total_z, cos, sin, None, dk, 1.0, 1.0, feature_map)
        _outputs(k, total_kv, total_z, cos, sin, dv, 1.0, 0.0, feature_map, False)
    initial = (None if t is None else total.to(t.dtype) for t, total in ((initial_kv, total_kv), (initial_k, total_z)))
    return dq, dk, dv, *initial


def _sums(x, v, cos, sin, weights, scale, constant, feature_map, groups):
    """(b,g,dk,dv) and (b,g,dk): the results of `sums`, over all tokens and the heads of each group."""
    (batch, length, heads, dk), dv = x.shape, v.shape[-1]
    options, tiles = _tiles(x, v, feature_map, cos)
    programs = batch * heads * tiles["BK"] * tiles["BV"]
    segments = max(1, min(triton.cdiv(length, 4 * options["T"]), triton.cdiv(PROGRAMS, max(programs, 1))))
    steps = triton.cdiv(triton.cdiv(length, segments), options["T"]) * options["T"]
    kv = torch.empty((batch, heads, segments, dk, dv), dtype=torch.float32, device=x.device)
    z = torch.empty((batch, heads, segments, dk), dtype=torch.float32, device=x.device)
    if kv.numel():
        kernels.sums[programs * segments,](
            **strided(TOKENS, x, x=x, v=v),
            **_weights(x, weights),
            to_kv=kv,
            to_z=z,
            scale=scale,
            constant=constant,
            segments=segments,
            steps=steps,
            **_shared(x, dv, groups, cos, sin),
            **options,
        )
    elif z.numel():
        z.zero_()
    return tuple(t.reshape(batch, groups, -1, *t.shape[3:]).sum(2) for t in (kv, z))


def _outputs(x, kv, z, cos, sin, out, scale, eps, feature_map, normalize):
    """Fills out (b,l,h,dv)."""
    batch, length, heads, _ = x.shape
    options, tiles = _tiles(x, out, feature_map, cos)
    if out.numel():
        kernels.outputs[batch * heads * triton.cdiv(length, options["T"]) * tiles["BV"],](
            **strided(TOKENS, x, x=x),
            kv=kv,
            z=z,
            out=out,
            scale=scale,
            eps=eps,
            **_shared(x, out.shape[-1], kv.shape[1], cos, sin),
            NORMALIZE=normalize,
            **options,
        )


def _factors(q, dout, kv, z, cos, sin, scale, eps, feature_map):
    """Two tensors (b*h, l)."""
    batch, length, heads, _ = q.shape
    factor, weight = (torch.empty((batch * heads, length), dtype=torch.float32, device=q.device) for _ in range(2))
    options, _ = _tiles(q, dout, feature_map, cos)
    if factor.numel():
        kernels.factors[batch * heads * triton.cdiv(length, options["T"]),](
            **strided(TOKENS, q, x=q, y=dout),
            kv=kv,
            z=z,
            factor=factor,
            weight=weight,
            scale=scale,
            eps=eps,
            **_shared(q, dout.shape[-1], kv.shape[1], cos, sin),
            **options,
        )
    return factor, weight


def _inputs(x, y, kv, z, cos, sin, weights, dx, scale, constant, feature_map):
    """Fills dx (b,l,h,dk)."""
    batch, length, heads, _ = x.shape
    options, tiles = _tiles(x, y, feature_map, cos)
    if dx.numel():
        kernels.inputs[batch * heads * triton.cdiv(length, options["T"]) * tiles["BK"],](
            **strided(TOKENS, x, x=x, y=y),
            kv=kv,
            z=z,
            **_weights(x, weights),
            to_x=dx,
            scale=scale,
            constant=constant,
            **_shared(x, y.shape[-1], kv.shape[1], cos, sin),
            **options,
        )


def _shared(x, dv, groups, cos, sin) -> dict:
    """The arguments that every kernel takes."""
    _, length, heads, dk = x.shape
    sizes = {"length": length, "heads": heads, "groups": groups, "dk": dk, "dv": dv}
    return strided(("token", "group"), x, cos=cos, sin=sin) | sizes


def _weights(instead, weights) -> dict:
    """The results of `factors`, or None, as arguments."""
    factor, weight = weights or (None, None)
    return {**pointers(instead, factor=factor, weight=weight), "FACTORS": weights is not None}


def _tiles(x, v, feature_map, cos):
    """The constants of a launch, and how many tiles of keys and of values there are."""
    dk, dv = x.shape[-1], v.shape[-1]
    BK, BV = (min(max(16, triton.next_power_of_2(n)), 32) for n in (dk, dv))
    options = {"MAP": _MAPS[feature_map], "ROTARY": cos is not None, "T": 32, "BK": BK, "BV": BV, **_OPTIONS}
    return options, {"BK": triton.cdiv(dk, BK), "BV": triton.cdiv(dv, BV)}
