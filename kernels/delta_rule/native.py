"""The delta rule on the CPU: allocates, packs one argument block, calls csrc/delta_rule.

The caller has checked shapes, dtypes and the walk.
"""

from __future__ import annotations

import torch

from medssm.kernels import native
from medssm.kernels.delta_rule.general import is_general
from medssm.kernels.dtypes import compute_dtype
from medssm.kernels.native import fields

# The structs of csrc/delta_rule: arguments.h's Tokens (also of scalars) and Problem, general.h's General, then Forward and Backward of the cpu*.cpp.
_TOKENS = fields("data type batch token head")
_PROBLEM = fields(("q k v beta g", _TOKENS), "initial", ("walk", native.WALK), "batch length heads keys values", "wide threads", ("scale", "d"))
_GENERAL = fields(("problem", _PROBLEM), ("erase erase_out write", _TOKENS), "shares", "per_key per_value first")
_forward = native.Kernel("delta_rule", "forward", fields(("problem", _PROBLEM), "out state recalled"))
_backward = native.Kernel("delta_rule", "backward", fields(("problem", _PROBLEM), ("dout", _TOKENS), "dstate recalled", "dq dk dv dbeta dg dinitial"))
_general_forward = native.Kernel("delta_rule", "general_forward", fields(("general", _GENERAL), "out state recalled"))
_general_backward = native.Kernel(
    "delta_rule",
    "general_backward",
    fields(("general", _GENERAL), ("dout", _TOKENS), "dstate recalled", "dq dk dv derase derase_out", "dwrite dg dinitial dbeta"),
)


def forward(
    q,
    k,
    v,
    beta,
    g,
    scale,
    index,
    starts,
    reverse,
    initial_state,
    save,
    final,
    sequences=None,
    erase=None,
    erase_out=None,
    write=None,
    erase_first=False,
):
    """Arguments as in `reference.delta_rule`; save: whether a backward will follow; final: whether the final state is wanted.

    Returns (out (b,l,h,dv) in v's dtype, state (b,h,dk,dv) or None, recalled (b,l,h,dv) or None), the last two in the compute dtype: recalled_t =
    S'_t^T k_t is what the state holds for a key before its token; in the general form S'_t^T a_t, or S_{t-1}^T a_t with erase_first.
    """
    call = _Call(q, k, v, beta, g, scale, index, starts, reverse, initial_state, sequences, erase, erase_out, write, erase_first)
    out = torch.empty(v.shape, dtype=v.dtype)
    state = native.new_state(q, (*q.shape[2:], v.shape[3]), call.dtype, call.initial_state, sequences) if final else None
    recalled = torch.empty(v.shape, dtype=call.dtype) if save else None
    if out.numel():
        (_general_forward if call.general else _forward)(*call.fields(), out.data_ptr(), native.pointer(state), native.pointer(recalled))
    return out, state, recalled


def backward(
    dout,
    dstate,
    recalled,
    q,
    k,
    v,
    beta,
    g,
    scale,
    index,
    starts,
    reverse,
    initial_state,
    sequences=None,
    erase=None,
    erase_out=None,
    write=None,
    erase_first=False,
):
    """Gradients of q, k, v, beta, g, erase, erase_out, write, initial_state (None where that input is), each in its input's dtype and contiguous."""
    inputs = (q, k, v, beta, g, erase, erase_out, write, initial_state)
    call = _Call(q, k, v, beta, g, scale, index, starts, reverse, initial_state, sequences, erase, erase_out, write, erase_first)
    dtype, dout = call.dtype, native.lanes(dout)
    dstate = native.contiguous(dstate, dtype)
    dinitial = None if initial_state is None else native.new_state(q, initial_state.shape[1:], dtype, dstate, sequences)
    if not (q.numel() and v.numel()):
        return (
            *(None if t is None else torch.zeros(t.shape, dtype=t.dtype) for t in inputs[:-1]),
            None if dinitial is None else dinitial.to(initial_state.dtype),
        )
    given = (dout.data_ptr(), native.DTYPES[dout.dtype], *dout.stride()[:3], native.pointer(dstate), recalled.data_ptr())
    dq, dk, dv, dg, derase_out = (native.like(t, dtype) for t in (q, k, v, g, erase_out))
    if call.general:
        derase, dwrite = native.like(erase, dtype), native.like(beta if write is None else write, dtype)
        dbeta = native.like(beta, dtype) if erase is None else torch.zeros(beta.shape, dtype=dtype)
        made = (dq, dk, dv, derase, derase_out, dwrite, dg, dinitial, dbeta if erase is None else None)
        _general_backward(*call.fields(), *given, *(native.pointer(t) for t in made))
        if write is None:
            dbeta, dwrite = dbeta + dwrite, None
    else:
        dbeta, derase, dwrite = native.like(beta, dtype), None, None
        _backward(*call.fields(), *given, *(native.pointer(t) for t in (dq, dk, dv, dbeta, dg, dinitial)))
    gradients = (dq, dk, dv, dbeta, dg, derase, derase_out, dwrite, dinitial)
    return tuple(None if t is None else gradient.to(t.dtype) for gradient, t in zip(gradients, inputs, strict=True))


class _Call:
    """One call's inputs as the kernels take them: tokens with adjacent features, the state dense in the compute dtype."""

    def __init__(self, q, k, v, beta, g, scale, index, starts, reverse, initial_state, sequences, erase, erase_out, write, erase_first):
        self.general = is_general(g, erase, erase_out, write, erase_first)
        self.dtype = compute_dtype(q, k, v, beta, g, erase, erase_out, write, initial_state)
        self.initial_state = native.contiguous(initial_state, self.dtype)
        self.q, self.k, self.v, self.beta, self.g = native.lanes(q), native.lanes(k), native.lanes(v), beta, g
        self.walk = native.walk(index, starts, sequences, reverse)
        self.wide, self.scale, self.first = self.dtype is torch.float64, scale, erase_first
        if self.general:
            self.per_key, self.per_value = g is not None and g.dim() == 4, write is not None and write.dim() == 4
            self.g = native.lanes(g) if self.per_key else g
            self.shares = erase is None
            self.erase = self.k if erase is None else native.lanes(erase)
            self.erase_out = None if erase_out is None else native.lanes(erase_out)
            self.write = native.lanes(write) if self.per_value else (beta if write is None else write)

    def fields(self):
        """The fields of csrc/delta_rule/arguments.h's Problem, or of general.h's General."""
        batch, length, heads, keys = self.q.shape
        problem = (
            *_tokens(self.q, self.k, self.v, self.beta, self.g),
            native.pointer(self.initial_state),
            *self.walk,
            *(batch, length, heads, keys, self.v.shape[3]),
            self.wide,
            torch.get_num_threads(),
            self.scale,
        )
        if not self.general:
            return problem
        return (*problem, *_tokens(self.erase, self.erase_out, self.write), self.shares, self.per_key, self.per_value, self.first)


def _tokens(*tensors):
    """The fields of Tokens of each tensor (b, l, h, …)."""
    return [field for t in tensors for field in ((0,) * 5 if t is None else (t.data_ptr(), native.DTYPES[t.dtype], *t.stride()[:3]))]
