"""Gated linear attention in plain PyTorch: the specification of every other backend.

For each batch and head, along the walk p through the tokens (Yang et al., Gated Linear Attention, arXiv 2312.06635, section 4; with a constant
decay per head it is RetNet's retention, Sun et al., arXiv 2307.08621, section 2):

    S_t = exp(g_t) S_{t-1} + k_t v_t^T
    o_t = scale q_t S_t

S is a matrix (dk, dv); exp(g_t) scales all of it, or row i by exp(g_ti) where g has a value per key.
"""

from __future__ import annotations

import torch

from medssm.kernels.autocast import without_autocast
from medssm.kernels.dtypes import compute_dtype
from medssm.kernels.walks import over_sequences, walk_steps


@over_sequences("q k v g")
def gated_linear_attention(q, k, v, g, scale, index=None, starts=None, reverse=False, initial_state=None):
    """q, k (b,l,h,dk); v (b,l,h,dv); g (b,l,h) or (b,l,h,dk); initial_state (b,h,dk,dv).

    Returns out (b,l,h,dv) in v's dtype and the final state (b,h,dk,dv) in the compute dtype: float64 if any input is, else float32.
    """
    inputs = (q, k, v, g, initial_state)
    dtype = compute_dtype(*inputs)
    with without_autocast(q.device):
        out_dtype = v.dtype
        q, k, v, g, initial_state = (None if t is None else t.to(dtype) for t in inputs)
        batch, length, heads, keys = q.shape
        decay = torch.exp(g if g.dim() == 4 else g.unsqueeze(-1)).unsqueeze(-1)  # (b,l,h,dk or 1,1)

        steps, fresh = walk_steps(length, index, starts, reverse, q.device)
        along = [t.index_select(1, steps).unbind(1) for t in (q, k, v, decay)]
        zero = q.new_zeros(batch, heads, keys, v.shape[3])
        S = zero if initial_state is None else initial_state
        out = []
        for t, (q_t, k_t, v_t, decay_t) in enumerate(zip(*along, strict=True)):
            S = decay_t * (zero if t in fresh else S) + k_t[..., :, None] * v_t[..., None, :]
            out.append(scale * (q_t[..., None, :] @ S).squeeze(-2))
        if not out:
            return v.to(out_dtype, copy=True), S.clone()
        return torch.stack(out, 1).index_select(1, torch.argsort(steps)).to(out_dtype), S
