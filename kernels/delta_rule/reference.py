"""The delta rule in plain PyTorch: the specification of every other backend.

For each batch and head, along the walk p through the tokens, with a state S (dk, dv) that maps keys to values (Yang et al.,
arXiv 2406.06484, section 2; the decay: arXiv 2412.06464, section 3):

    S'_t = Diag(exp(g_t)) S_{t-1}
    S_t = S'_t - c_t (S'_t^T a_t)^T + k_t (w_t * v_t)^T          with erase_first a_t meets S_{t-1} in place of S'_t
    o_t = scale S_t^T q_t
"""

from __future__ import annotations

import torch

from medssm.kernels.autocast import without_autocast
from medssm.kernels.dtypes import compute_dtype
from medssm.kernels.walks import over_sequences, walk_steps


@over_sequences("q k v beta g erase erase_out write")
def delta_rule(
    q,
    k,
    v,
    beta,
    g=None,
    scale=None,
    index=None,
    starts=None,
    reverse=False,
    initial_state=None,
    erase=None,
    erase_out=None,
    write=None,
    erase_first=False,
):
    """q, k, erase, erase_out (b,l,h,dk); v (b,l,h,dv); beta (b,l,h); g (b,l,h) or (b,l,h,dk); write (b,l,h) or (b,l,h,dv); initial_state (b,h,dk,dv).

    erase is a, None for beta k; erase_out is c, None for k; write is w, None for beta; scale None is dk**-0.5.
    Returns out (b,l,h,dv) in v's dtype and the final state (b,h,dk,dv) in the compute dtype: float64 if any input is, else float32.
    """
    inputs = (q, k, v, beta, g, erase, erase_out, write, initial_state)
    dtype = compute_dtype(*inputs)
    with without_autocast(q.device):
        out_dtype = v.dtype
        q, k, v, beta, g, a, c, w, initial_state = (None if t is None else t.to(dtype) for t in inputs)
        batch, length, heads, dk = k.shape
        scale = dk**-0.5 if scale is None else scale
        a = beta[..., None] * k if a is None else a
        c = k if c is None else c
        w = beta if w is None else w
        w = w if w.dim() == v.dim() else w[..., None]
        e = q.new_ones(1, length, 1, 1) if g is None else (g if g.dim() == k.dim() else g[..., None]).exp()

        steps, fresh = walk_steps(length, index, starts, reverse, q.device)
        along = [t.index_select(1, steps).unbind(1) for t in (q, k, w * v, a, c, e)]
        zero = q.new_zeros(batch, heads, dk, v.shape[-1])
        S = zero if initial_state is None else initial_state
        o = []
        for t, (q_t, k_t, v_t, a_t, c_t, e_t) in enumerate(zip(*along, strict=True)):
            if t in fresh:
                S = zero
            decayed = e_t[..., None] * S
            recalled = ((S if erase_first else decayed) * a_t[..., None]).sum(-2)
            S = decayed - c_t[..., None] * recalled[..., None, :] + k_t[..., None] * v_t[..., None, :]
            o.append(scale * (S * q_t[..., None]).sum(-2))
        state = S.clone() if S is zero or S is initial_state else S
        if not o:
            return v.to(out_dtype, copy=True), state
        return torch.stack(o, 1).index_select(1, torch.argsort(steps)).to(out_dtype), state
