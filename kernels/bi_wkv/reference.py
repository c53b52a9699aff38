"""Bidirectional WKV in plain PyTorch: the specification of every other backend.

For each batch and channel, t and i steps of the walk within one segment of it (Duan et al., Vision-RWKV, arXiv 2403.02308, section 3.2):

    o_t = (sum_{i != t} e^{k_i - (|t-i|-1) w} v_i + e^{u+k_t} v_t) / (the same with 1 for v)

mode "upstream" is what the published CUDA kernels compute. They cut a segment into CHUNKS of equal length; with s the first step of t's chunk:

    i < s          e^{k_i - |t-i| w}                          one step too far
    s <= i < t     e^{k_i - (|t-i|-1) w}
    i > t          e^{k_i - |t-i| w}                          one step too far
    s < i <= t     e^{k_i} (1 - e^w) e^{(t-i) w}              an error: the sum over i > t is found by subtracting tokens from the sum over all,
                                                              whose weights are one step too far, so that each subtraction leaves a remainder
    i = t          e^{u+k_t}

and add EPS to the denominator, relative to the largest exponent so far (their running maximum, a constant to the gradient).
"""

from __future__ import annotations

import itertools

import torch

from medssm.kernels.autocast import without_autocast
from medssm.kernels.dtypes import compute_dtype
from medssm.kernels.walks import walk_steps

CHUNKS, EPS = 32, 1e-6


def bi_wkv(w, u, k, v, mode="exact", index=None, starts=None, reverse=False):
    """w, u (d,); k, v (b,l,d). Returns (b,l,d) in v's dtype. The arithmetic is in float64 if any input is, else in float32."""
    dtype = compute_dtype(w, u, k, v)
    with without_autocast(v.device):
        out_dtype = v.dtype
        w, u, k, v = (t.to(dtype) for t in (w, u, k, v))
        length = v.shape[1]
        steps, fresh = walk_steps(length, index, starts, reverse, v.device)
        ends = [0, *sorted(fresh), length]
        keys, values = k.index_select(1, steps).unbind(1), v.index_select(1, steps).unbind(1)
        o = []
        for begin, end in itertools.pairwise(ends):
            o += _segment(w, u, keys[begin:end], values[begin:end], mode)
        if not o:
            return v.to(out_dtype, copy=True)
        return torch.stack(o, 1).index_select(1, torch.argsort(steps)).to(out_dtype)


def _segment(w, u, k, v, mode):
    """The outputs of a list of tokens (b,d)."""
    length = len(k)
    past, future = _sums(w, k, v), _sums(w, k[::-1], v[::-1])[-2::-1]
    chunk = length if mode == "exact" else -(-length // CHUNKS)
    o = []
    for s in range(0, length, max(chunk, 1)):
        here, there = k[s : s + chunk], v[s : s + chunk]
        if mode == "upstream":
            within, left = _sums(w, here, there), _sums(-w, here[1:], there[1:])
        for t, (k_t, v_t) in enumerate(zip(here, there, strict=True), s):
            own = ((u + k_t).detach(), torch.exp(u + k_t - (u + k_t).detach()) * v_t, torch.exp(u + k_t - (u + k_t).detach()))
            if mode == "exact":
                o.append(_ratio([past[t], future[t], own]))
            else:
                terms = [_aged(past[s], t - s + 1, w), within[t - s], _aged(future[t], 1, w), _taken(left[t - s], w), own]
                met = (k[s] + (t - s) * w).detach()  # the whole that they take from had the chunk's first token too
                o.append(_ratio(terms, met, EPS))
    return o


def _sums(w, k, v):
    """Before each step t and after the last: the sums over i < t of e^{k_i - (t-i-1) w} (v_i, 1), as (shift, numerator, denominator).

    Sums are stored scaled: sum = e^shift times the stored numbers. The shift, a constant to autograd, is the exponent of the token with the largest
    weight. It is computed from that token's key and its distance, so that rounding errors do not add up.
    """
    numerator = denominator = torch.zeros_like(k[0]) if len(k) else None
    heaviest, since = torch.full_like(w, -torch.inf), torch.zeros_like(w)
    sums = [(heaviest, 0.0, 0.0)]
    fade = torch.exp(w.detach() - w)  # 1: the shift has the value of e^-w, this its derivative
    for k_t, v_t in zip(k, v, strict=True):
        key, shift = k_t.detach(), heaviest - (since + 1) * w.detach()
        joins = key > shift
        heaviest, since = torch.where(joins, key, heaviest), torch.where(joins, -1.0, since) + 1
        top = torch.maximum(key, shift)
        kept, new = torch.exp(shift - top) * fade, torch.exp(k_t - top)
        numerator, denominator = numerator * kept + new * v_t, denominator * kept + new
        sums.append((top, numerator, denominator))
    return sums


def _aged(sums, steps, w):
    """The sums seen from `steps` steps further away."""
    shift, numerator, denominator = sums
    fade = torch.exp(steps * (w.detach() - w))
    return shift - steps * w.detach(), numerator * fade, denominator * fade


def _taken(sums, w):
    """The sums times 1 - e^w; the new shift is the exponent of the larger of the two subtracted weights."""
    shift, numerator, denominator = sums
    high = w.clamp_min(0).detach()
    factor = torch.expm1(-high) - torch.expm1(w - high)  # (1 - e^w) e^-high
    return shift + high, numerator * factor, denominator * factor


def _ratio(terms, met=None, eps=0.0):
    """The quotient of the terms' summed numerators and denominators."""
    top = terms[-1][0] if met is None else torch.maximum(met, terms[-1][0])
    for shift, _, _ in terms:
        top = torch.maximum(top, shift)
    scales = [torch.exp(shift - top) for shift, _, _ in terms]
    numerator = sum(scale * n for scale, (_, n, _) in zip(scales, terms, strict=True))
    denominator = sum(scale * d for scale, (_, _, d) in zip(scales, terms, strict=True))
    return numerator / (denominator + eps)
