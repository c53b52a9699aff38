"""Gated linear attention on a GPU, in Triton: the recurrence of matrix_state/triton_core.py with the given log decays.

The caller has checked shapes, dtypes and the walk.
"""

from __future__ import annotations

import torch

from medssm.kernels.matrix_state import triton_core as core
from medssm.kernels.triton import plain


def forward(q, k, v, g, scale, index, starts, reverse, initial_state, final, sequences=None):
    """Arguments as in `reference.gated_linear_attention`; final: whether the final state is wanted.

    Returns (out (b,l,h,dv) contiguous, state (b,h,dk,dv) or None).
    """
    q, k, v, g, initial_state = plain(q, k, v, g, initial_state)
    scan = core.scan_of(q, k, v, g, scale, q.shape[2], index, starts, reverse, sequences)
    out, state, _ = core.forward(scan, initial_state)
    return out, state if final else None


def backward(dout, dstate, q, k, v, g, scale, index, starts, reverse, initial_state, sequences=None):
    """Gradients of q, k, v, g and initial_state (None where it is), each in its input's dtype and contiguous."""
    dout, dstate, q, k, v, g, initial_state = plain(dout, dstate, q, k, v, g, initial_state)
    scan = core.scan_of(q, k, v, g, scale, q.shape[2], index, starts, reverse, sequences)
    found = core.backward(dout, dstate, scan, initial_state)
    dinitial = None if initial_state is None else found.dinitial.to(initial_state.dtype, memory_format=torch.contiguous_format, copy=True)
    return found.dq, found.dk, found.dv, found.dg, dinitial
