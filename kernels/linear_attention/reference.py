"""Linear attention in plain PyTorch: the specification of every other backend.

With q' = f(q), k' = f(k), f the feature map, and R the rotation of a token's position (Katharopoulos et al., arXiv 2006.16236, section 3;
the rotation in the numerator alone: Han et al., MLLA, arXiv 2405.16605, section 4.2):

    kv = sum_s R_s k'_s v_s^T,    z = sum_s k'_s
    o_t = scale (R_t q'_t) kv / (q'_t . z + eps), the denominator only with normalize

The sums run over all tokens; causal, along the walk up to step t.
"""

from __future__ import annotations

import torch

from medssm.kernels.autocast import without_autocast
from medssm.kernels.dtypes import compute_dtype
from medssm.kernels.walks import over_sequences, walk_steps


def feature(x, feature_map):
    """elu(x) + 1 as "elu", relu(x) as "relu", x itself as None."""
    if feature_map == "elu":
        return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))  # elu(x) + 1 without the cancellation at x << 0
    return torch.relu(x) if feature_map == "relu" else x


def rotate(x, cos, sin):
    """The pairs (2i, 2i+1) of x (b,l,h,dk) as complex numbers, rotated: cos and sin (l,h,dk) hold each pair's value twice."""
    if cos is None:
        return x
    even, odd = x[..., 0::2], x[..., 1::2]
    return x * cos + torch.stack([-odd, even], -1).flatten(-2) * sin


@over_sequences("q k v", "initial_kv initial_k", "cos sin")
def linear_attention(
    q,
    k,
    v,
    cos=None,
    sin=None,
    initial_kv=None,
    initial_k=None,
    feature_map="elu",
    causal=False,
    normalize=True,
    scale=1.0,
    eps=1e-6,
    index=None,
    starts=None,
    reverse=False,
):
    """q (b,l,h,dk); k (b,l,g,dk), v (b,l,g,dv): head j uses group j // (h / g); cos, sin (l,g,dk); state (b,g,dk,dv), (b,g,dk).

    Not causal, q's length may differ from k's. Returns out (b,l,h,dv) in v's dtype and the final state, kv and z, in the compute dtype: float64 if
    any input is, else float32.
    """
    inputs = (q, k, v, cos, sin, initial_kv, initial_k)
    dtype = compute_dtype(*inputs)
    with without_autocast(q.device):
        out_dtype = v.dtype
        q, k, v, cos, sin, initial_kv, initial_k = (None if t is None else t.to(dtype) for t in inputs)
        batch, length, heads, dk = q.shape
        groups, dv = v.shape[2:]
        q, k = feature(q, feature_map), feature(k, feature_map)
        per_group = heads // groups
        q_turned = rotate(q, *(None if t is None else t.repeat_interleave(per_group, 1) for t in (cos, sin)))
        q, q_turned = (t.unflatten(2, (groups, per_group)) for t in (q, q_turned))
        k_turned = rotate(k, cos, sin)

        kv, z = q.new_zeros(batch, groups, dk, dv), q.new_zeros(batch, groups, dk)
        if initial_kv is not None:
            kv, z = kv + initial_kv, z + initial_k
        if causal:
            steps, fresh = walk_steps(length, index, starts, reverse, q.device)
            numerators, denominators = [], []
            for t, p in enumerate(steps.tolist()):
                if t in fresh:
                    kv, z = torch.zeros_like(kv), torch.zeros_like(z)
                kv = kv + k_turned[:, p, :, :, None] * v[:, p, :, None, :]
                z = z + k[:, p]
                numerators.append(torch.einsum("bgjk,bgkv->bgjv", q_turned[:, p], kv))
                denominators.append(torch.einsum("bgjk,bgk->bgj", q[:, p], z))
            back = torch.argsort(steps)
            numerator = torch.stack(numerators, 1).index_select(1, back) if length else q.new_zeros(*q.shape[:-1], dv)
            denominator = torch.stack(denominators, 1).index_select(1, back) if length else q.new_zeros(q.shape[:-1])
        else:
            kv = kv + torch.einsum("blgk,blgv->bgkv", k_turned, v)
            z = z + k.sum(1)
            numerator = torch.einsum("blgjk,bgkv->blgjv", q_turned, kv)
            denominator = torch.einsum("blgjk,bgk->blgj", q, z)
        out = scale * numerator
        if normalize:
            out = out / (denominator + eps).unsqueeze(-1)
        return out.flatten(2, 3).to(out_dtype), kv, z
