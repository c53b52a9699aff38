"""Causal depthwise convolution in plain PyTorch: the specification of every other backend.

For each batch and channel, along the walk p through the tokens (Gu and Dao, arXiv 2312.00752, section 3.4):

    y_t = act(bias + sum_{j=0}^{w-1} weight_j x_{p(t-w+1+j)})

Before step 0 come the w-1 tokens of initial_state (oldest first), or zeros; where the taps begin anew, zeros.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from medssm.kernels.autocast import without_autocast
from medssm.kernels.dtypes import compute_dtype
from medssm.kernels.walks import over_sequences, walk_steps


@over_sequences("x")
def causal_conv1d(x, weight, bias=None, activation=None, index=None, starts=None, reverse=False, initial_state=None):
    """x (b,l,d); weight (d,w), w at least 1; bias (d,); initial_state (b,d,w-1).

    Returns out (b,l,d) and the final state (b,d,w-1): the last w-1 taps, oldest first; both in x's dtype. The arithmetic is in
    float64 if any input is, else in float32.
    """
    inputs = (x, weight, bias, initial_state)
    dtype = compute_dtype(*inputs)
    with without_autocast(x.device):
        out_dtype = x.dtype
        x, weight, bias, initial_state = (None if t is None else t.to(dtype) for t in inputs)
        batch, length, channels = x.shape
        past = weight.shape[1] - 1

        steps, fresh = walk_steps(length, index, starts, reverse, x.device)
        before = x.new_zeros(batch, past, channels) if initial_state is None else initial_state.transpose(1, 2)
        taps = torch.cat([before, x.index_select(1, steps)], 1)  # step t at past + t
        segment = torch.zeros(past + length, dtype=torch.int64, device=x.device)
        for s in fresh:
            segment[past + s :] += 1  # a step sees its own segment only

        y = x.new_zeros(batch, length, channels)
        own = segment[past:, None]
        for j in range(past + 1):
            y = y + weight[:, j] * taps[:, j : j + length].where(segment[j : j + length, None] == own, 0.0)
        if bias is not None:
            y = y + bias
        if activation == "silu":
            y = functional.silu(y)

        last = taps[:, length:].where(segment[length:, None] == len(fresh), 0.0)  # what the last segment has seen
        return y.index_select(1, torch.argsort(steps)).to(out_dtype), last.transpose(1, 2).to(out_dtype)
