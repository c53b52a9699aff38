"""Causal linear attention on a GPU, in Triton: two scans of matrix_state/triton_core.py, without decay.

One scan gives the numerator, from rotated features and v. The other gives the denominator and the running sum of features, from features and v = 1.
PyTorch computes the features, their rotation and the quotient, one pass over the tokens each. The caller has checked shapes, dtypes and the walk.
"""

from __future__ import annotations

import torch

from medssm.kernels.autocast import without_autocast
from medssm.kernels.linear_attention.reference import feature, rotate
from medssm.kernels.matrix_state import triton_core as core
from medssm.kernels.native import lanes
from medssm.kernels.triton import plain


def forward(q, k, v, cos, sin, initial_kv, initial_k, feature_map, causal, normalize, scale, eps, index, starts, reverse, sequences):
    """Arguments as in `reference.linear_attention`. Returns out (b,l,h,dv) contiguous and the sums, kv and z."""
    q, k, v, cos, sin, initial_kv, initial_k = plain(q, k, v, cos, sin, initial_kv, initial_k)
    with without_autocast(q.device):
        above, below = _scans(q, k, v, cos, sin, feature_map, scale, index, starts, reverse, sequences)
        out, kv, _ = core.forward(above, _each_head(initial_kv, above))
        denominator, z, _ = core.forward(below, _each_head(initial_k, below))
        if normalize:
            out = out / (denominator + eps)
        return out.to(v.dtype), _of_group(kv, v), _of_group(z, v).squeeze(3)


def backward(
    dout, dkv, dz, kv, z, q, k, v, cos, sin, initial_kv, initial_k, feature_map, causal, normalize, scale, eps, index, starts, reverse, sequences
):
    """Gradients of q, k, v, initial_kv and initial_k (None where that input is), each in its input's dtype and contiguous."""
    dout, dkv, dz, q, k, v, cos, sin, initial_kv, initial_k = plain(dout, dkv, dz, q, k, v, cos, sin, initial_kv, initial_k)
    with without_autocast(q.device):
        above, below = _scans(q, k, v, cos, sin, feature_map, scale, index, starts, reverse, sequences)
        first_kv, first_k = _each_head(initial_kv, above), _each_head(initial_k, below)
        dnumerator, ddenominator = dout.float(), q.new_zeros((*q.shape[:3], 1), dtype=torch.float32)
        if normalize:
            out, denominator = core.forward(above, first_kv)[0], core.forward(below, first_k)[0] + eps
            dnumerator = dnumerator / denominator
            ddenominator = -(dnumerator * out).sum(3, keepdim=True) / denominator
        a = core.backward(dnumerator, _one_head(dkv, above), above, first_kv)
        b = core.backward(ddenominator, _one_head(dz, below), below, first_k)
        per_group = q.shape[2] // k.shape[2]
        turned = (t if t is None else t.repeat_interleave(per_group, 1) for t in (cos, sin))
        dq = _feature_gradient(_turn_back(a.dq, *turned) + b.dq, q, feature_map)
        dk = _feature_gradient(_turn_back(a.dk, cos, sin) + b.dk, k, feature_map)
        initial = (None if t is None else _group_sum(d, v).view(t.shape).to(t.dtype) for t, d in ((initial_kv, a.dinitial), (initial_k, b.dinitial)))
        return dq.to(q.dtype), dk.to(k.dtype), a.dv.to(v.dtype), *initial


def _scans(q, k, v, cos, sin, feature_map, scale, index, starts, reverse, sequences):
    """The scans of the numerator and of the denominator."""
    heads, groups = q.shape[2], k.shape[2]
    q, k = feature(q.float(), feature_map), feature(k.float(), feature_map)
    cos, sin = (t if t is None else t.float() for t in (cos, sin))
    q_turned = rotate(q, *(t if t is None else t.repeat_interleave(heads // groups, 1) for t in (cos, sin)))
    above = core.scan_of(q_turned, rotate(k, cos, sin), v.float(), None, scale, heads, index, starts, reverse, sequences)
    return above, above._replace(q=lanes(q), k=lanes(k), v=q.new_ones((*k.shape[:3], 1)), scale=1.0)


def _turn_back(gradient, cos, sin):
    """The transpose of `rotate`."""
    if cos is None:
        return gradient
    even, odd = (gradient * sin).unflatten(3, (-1, 2)).unbind(4)
    return gradient * cos + torch.stack([odd, -even], -1).flatten(-2)


def _feature_gradient(gradient, x, feature_map):
    if feature_map == "elu":
        return gradient * torch.exp(x.float().clamp(max=0))
    return gradient.where(x > 0, 0.0) if feature_map == "relu" else gradient


def _each_head(state, scan):
    """A group's state (b,g,dk[,dv]) for every head of q (b,h,dk,dv)."""
    if state is None:
        return None
    return state.reshape(*state.shape[:3], -1).repeat_interleave(scan.heads // state.shape[1], 1)


def _one_head(gradient, scan):
    """The gradient of a group's state (b,g,dk[,dv]) as the gradient of its first head's state, which is the one returned."""
    if gradient is None:
        return None
    batch, groups, dk = gradient.shape[:3]
    wide = gradient.new_zeros((batch, groups, scan.heads // groups, dk, scan.v.shape[3]))
    wide[:, :, 0] = gradient.reshape(batch, groups, dk, -1)
    return wide.flatten(1, 2)


def _of_group(state, v):
    """A group's state; its heads' states are all equal."""
    return state.unflatten(1, (v.shape[2], -1))[:, :, 0].contiguous()


def _group_sum(gradient, v):
    return gradient.unflatten(1, (v.shape[2], -1)).sum(2)
