"""The delta rule in plain PyTorch: the specification of every other backend.

For each batch and head, along the walk p through the tokens, with a state S (dk, dv) that maps keys to values (Yang et al.,
arXiv 2406.06484, section 2; the decay: arXiv 2412.06464, section 3):

    S'_t = exp(g_t) S_{t-1}
    S_t = S'_t + k_t (beta_t (v_t - S'_t^T k_t))^T
    o_t = scale S_t^T q_t
"""

from __future__ import annotations

import torch

from medssm.kernels.autocast import without_autocast
from medssm.kernels.dtypes import compute_dtype
from medssm.kernels.walks import over_sequences, walk_steps


@over_sequences("q k v beta g")
def delta_rule(q, k, v, beta, g=None, scale=None, index=None, starts=None, reverse=False, initial_state=None):
    """q, k (b,l,h,dk); v (b,l,h,dv); beta, g (b,l,h); initial_state (b,h,dk,dv); scale None is dk**-0.5.

    Returns out (b,l,h,dv) in v's dtype and the final state (b,h,dk,dv) in the compute dtype: float64 if any input is, else float32.
    """
    inputs = (q, k, v, beta, g, initial_state)
    dtype = compute_dtype(*inputs)
    with without_autocast(q.device):
        out_dtype = v.dtype
        q, k, v, beta, g, initial_state = (None if t is None else t.to(dtype) for t in inputs)
        batch, length, heads, dk = k.shape
        scale = dk**-0.5 if scale is None else scale

        steps, fresh = walk_steps(length, index, starts, reverse, q.device)
        along = [t.index_select(1, steps).unbind(1) for t in (q, k, v, beta)]
        decay = [None] * length if g is None else g.index_select(1, steps).exp().unbind(1)
        zero = q.new_zeros(batch, heads, dk, v.shape[-1])
        S = zero if initial_state is None else initial_state
        o = []
        for t, (q_t, k_t, v_t, beta_t, decay_t) in enumerate(zip(*along, decay, strict=True)):
            if t in fresh:
                S = zero
            if decay_t is not None:
                S = decay_t[..., None, None] * S
            recalled = (S * k_t[..., None]).sum(-2)
            S = S + k_t[..., None] * (beta_t[..., None] * (v_t - recalled))[..., None, :]
            o.append(scale * (S * q_t[..., None]).sum(-2))
        state = S.clone() if S is zero or S is initial_state else S
        if not o:
            return v.to(out_dtype, copy=True), state
        return torch.stack(o, 1).index_select(1, torch.argsort(steps)).to(out_dtype), state
